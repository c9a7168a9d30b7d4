"""From a model to a plan: search for the removal that harms least, predict what it costs, write both documents."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from layerprune import documents
from layerprune.documents import Candidate, Objective, Plan, Scores
from layerprune.errors import RefusedError, UsageError
from layerprune.judgement import additive
from layerprune.lock import locked
from layerprune.metrics import METRICS
from layerprune.planners import SEARCHES, Constraints, Found, Judge, next_to_go, shortfall
from layerprune.planners.cascade import Cascade
from layerprune.planning.asked import PlanRequest
from layerprune.planning.desk import Desk
from layerprune.planning.goals import Reached
from layerprune.planning.prediction import predict
from layerprune.planning.request import ScoreRequest
from layerprune.planning.written import put_out, written
from layerprune.progress import SILENT, Progress
from layerprune.registry import Entry
from layerprune.removal import Removal
from layerprune.specs import build, options_of, spec_of


def plan_model(request: PlanRequest, *, run_folder: Path, progress: Progress = SILENT) -> tuple[Scores, Plan]:
    """Search for the removal that harms least; writes scores.json and plan.json into ``run_folder``."""
    with locked(run_folder):
        searcher = Searcher.open(request, run_folder, progress)
        reached = request.goal.pursue(searcher.desk, searcher)
        scores = searcher.desk.scores(reached.rounds)
        plan = searcher.plan(reached, scores)
        scores.save(run_folder / Scores.filename)
        plan.save(run_folder / Plan.filename)
    return scores, plan


@dataclass
class Searcher:
    """A search at a desk, ready to look for removals of any size; what it has judged it need not judge again."""

    request: PlanRequest
    desk: Desk
    entry: Entry
    search: Any
    judges: dict[int | None, Judge] = field(default_factory=dict)  # by how many candidates a race has to get right
    shown: set[Removal] = field(default_factory=set)

    @classmethod
    def open(cls, request: PlanRequest, run_folder: Path, progress: Progress) -> Searcher:
        """Validate everything, load model and items."""
        _, metric = build(METRICS, request.score.metric)
        entry, search = build(SEARCHES, request.search or metric.search)
        if request.score.racing and (next_to_go(search, 2) is None or metric.needs != "items"):
            what = f"the search {spec_of(entry.name, search)!r} compares more than the next to go"
            what = what if metric.needs == "items" else f"the metric {request.score.metric!r} answers no items"
            raise UsageError(f"--racing: {what}; leave it out, or use ablation with one-shot or greedy")
        if isinstance(search, Cascade):
            build(METRICS, search.by)
        desk = Desk.open(request.score, run_folder, progress, request.rules)
        request.goal.require(desk)
        desk.bring_items(request.goal.shares)
        return cls(request, desk, entry, search)

    def __call__(self, drop: int) -> Found:
        """Return the removal of ``drop`` units; raises ``RefusedError`` where the constraints allow none."""
        desk = self.desk
        keep = desk.data.keep = _kept(self.request.score, desk.data.objective, desk.constraints, self.search, drop)
        if keep not in self.judges:
            self.judges[keep] = desk.judge()
        search = self.search
        look = search.proposed_by(desk.judge_by(search.by)) if isinstance(search, Cascade) else search

        def watch(removal: Removal, best: Candidate) -> None:
            if removal not in self.shown:
                self.shown.add(removal)
                desk.progress.note(f"{len(removal)} chosen: {removal}, {desk.metric.unit} {best.score:.4f}")

        found: Found = look(self.judges[keep], desk.constraints, drop, seed=self.request.score.seed, watch=watch)
        if keep is not None and put_out(found):  # rules passed over some of the race's winners: all have to be ranked
            desk.data.keep = None
            found = look(desk.judge(), desk.constraints, drop, seed=self.request.score.seed, watch=watch)
        if refusal := desk.constraints.refusal(found.removal):
            raise RefusedError(f"the search {self.entry.name!r} found {found.removal}, which may not go: {refusal}")
        self._require_floors(found, self.judges[keep])
        return found

    def _require_floors(self, found: Found, judge: Judge) -> None:
        """Raise ``RefusedError`` when what was found leaves a task below its floor; judged whole if it was not yet."""
        if not self.desk.data.objective.floors:
            return
        whole = found.cost or judge([found.removal])[0]
        if whole.below_floor:
            what = shortfall(whole)
            raise RefusedError(f"what was found breaks a floor: {what}; use --search greedy, or lower --floor")

    def plan(self, reached: Reached, scores: Scores) -> Plan:
        """Return the plan that carries out what was reached; raises ``RefusedError`` where export would."""
        desk, removal = self.desk, reached.found.removal
        desk.rehearse(removal)
        how = documents.Search(name=self.entry.name, options=options_of(self.search))
        limits = self.request.rules.limits(desk.constraints.protect, desk.subject.anatomy)
        plan = written(
            scores,
            reached.found,
            how,
            limits,
            self.request.goal.requested,
            predict(desk, removal),
            desk.subject.anatomy.misread(removal),
        )
        return plan.model_copy(update={"target": reached.target, "certificate": reached.certificate})


def _kept(request: ScoreRequest, objective: Objective, constraints: Constraints, search: Any, drop: int) -> int | None:
    """Return how many candidates of a round a race has to get right; None: no racing.

    Moves of different sizes are compared per layer, which the race does not know of; nor does it know of floors, and of
    the worst task.
    """
    alike = len({len(move) for move in constraints.moves}) == 1
    races = alike and additive(objective) and request.racing is not False
    return next_to_go(search, drop) if races else None
