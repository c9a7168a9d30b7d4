"""From a model to a plan: search for the removal that harms least, predict what it costs, write both documents."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from layerprune import documents
from layerprune.config import PlanConfig
from layerprune.documents import Candidate, Plan, Scores
from layerprune.errors import RefusedError, UsageError
from layerprune.judgement import additive, unit_of
from layerprune.lock import locked
from layerprune.metrics import METRICS, cheapest_search
from layerprune.output import check_places
from layerprune.planners import (
    SEARCHES,
    Constraints,
    Found,
    Judge,
    Others,
    asks,
    bound,
    next_to_go,
    require_finite,
    shortfall,
)
from layerprune.planning.asked import goal_of
from layerprune.planning.budget import evaluations
from layerprune.planning.desk import Desk
from layerprune.planning.goals import Goal, Reached
from layerprune.planning.laying import laid
from layerprune.planning.limits import Rules
from layerprune.planning.prediction import predict
from layerprune.planning.written import put_out, written
from layerprune.progress import SILENT, Progress
from layerprune.registry import Entry
from layerprune.removal import Removal
from layerprune.specs import build, options_of, spec_of
from layerprune.stats import displayed
from layerprune.subject import Subject


def plan_model(
    request: PlanConfig, *, run_folder: Path, progress: Progress = SILENT, subject: Subject | None = None
) -> tuple[Scores, Plan]:
    """Search for the removal that harms least; writes scores.json and plan.json into ``run_folder``.

    ``subject``: the model, where it is loaded already.
    """
    with locked(run_folder, request.model):
        check_places(run_folder, files=(Scores.filename, Plan.filename))
        searcher = Searcher.open(request, run_folder, progress, subject)
        reached = searcher.goal.pursue(searcher.desk, searcher)
        scores = searcher.desk.scores(reached.rounds)
        plan = searcher.plan(reached, scores)
        with laid(scores, run_folder, progress, before=Plan) as new:
            plan.save(new / Plan.filename)
    return scores, plan


@dataclass
class Searcher:
    """A search at a desk, ready to look for removals of any size; what it has judged it need not judge again."""

    request: PlanConfig
    goal: Goal
    rules: Rules
    desk: Desk
    entry: Entry
    search: Any
    judges: dict[int | None, Judge] = field(default_factory=dict)  # by how many candidates a race has to get right
    asked: dict[str, Judge] = field(default_factory=dict)  # other metrics, by spec
    shown: set[str] = field(default_factory=set)

    @classmethod
    def open(
        cls, request: PlanConfig, run_folder: Path, progress: Progress, subject: Subject | None = None
    ) -> Searcher:
        """Validate everything, load model and items."""
        goal, rules = goal_of(request), Rules.of(request)
        _, metric = build(METRICS, request.metric)
        entry, search = build(SEARCHES, request.search or metric.search)
        if request.racing and (next_to_go(search, 2) is None or metric.needs != "items"):
            what = f"the search {spec_of(entry.name, search)!r} compares more than the next to go"
            what = what if metric.needs == "items" else f"the metric {request.metric!r} answers no items"
            raise UsageError(f"--racing: {what}; leave it out, or use ablation with one-shot or greedy")
        for other in asks(search):
            if build(METRICS, other)[1].needs == "items" != metric.needs:
                asked = f"the search {spec_of(entry.name, search)!r} asks the metric {other!r}"
                raise UsageError(f"{asked}, which answers items, and {request.metric!r} answers none")
        desk = Desk.open(request, run_folder, progress, rules, subject)
        goal.require(desk)
        asked = None if request.budget is None else evaluations(search, desk.constraints, goal.most(desk))
        desk.bring_items(goal.shares, asked)
        request = replace(request, limit=desk.request.limit)
        return cls(request, goal, rules, desk, entry, search)

    def __call__(self, drop: int) -> Found:
        """Return the removal of ``drop`` units; raises ``RefusedError`` where the constraints allow none."""
        desk = self.desk
        judge = self._judge(next_to_go(self.search, drop))
        look = bound(self.search, Others(self._chosen_by, self._judge))

        def watch(removal: Removal, best: Candidate) -> None:
            unit = unit_of(desk.metric)
            score = displayed(best.score, unit, self.request.metric)
            said = f"{len(removal)} chosen: {removal}, {unit} {score:.4f}"
            if said not in self.shown:
                self.shown.add(said)
                desk.progress.note(said)

        found = look(judge, desk.constraints, drop, seed=self.request.seed, watch=watch)
        if self._races and put_out(found):  # rules passed over winners of the race: all have to be ranked
            found = look(desk.judge(), desk.constraints, drop, seed=self.request.seed, watch=watch)
        if misfit := desk.constraints.misfit(found.removal, drop):
            raise RefusedError(f"the search {self.entry.name!r} found {found.removal}, which may not go: {misfit}")
        require_finite(found)
        self._require_floors(found, judge)
        return found

    def _judge(self, keep: int | None) -> Judge:
        """Return the metric's judgements, raced for the best ``keep`` of a round where races are allowed."""
        keep = keep if self._races else None
        if keep not in self.judges:
            self.judges[keep] = self.desk.judge(keep)
        return self.judges[keep]

    @property
    def _races(self) -> bool:
        """Whether rounds may be raced.

        Moves of different sizes are compared per layer, which the race does not know of; nor does it know of floors,
        and of the worst task.
        """
        alike = len({len(move) for move in self.desk.constraints.moves}) == 1
        return alike and additive(self.desk.data.objective) and self.request.racing is not False

    def _chosen_by(self, metric: str, constraints: Constraints, drop: int) -> Found:
        """Return what another metric removes by the cheapest search it has."""
        _, search = build(SEARCHES, cheapest_search(metric))
        found: Found = search(self._judge_by(metric), constraints, drop, seed=self.request.seed)
        return found

    def _judge_by(self, metric: str) -> Judge:
        if metric not in self.asked:
            self.asked[metric] = self.desk.judge_by(metric)
        return self.asked[metric]

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
        limits = self.rules.limits(desk.constraints.protect, desk.subject.anatomy)
        plan = written(
            scores,
            reached.found,
            how,
            limits,
            self.goal.requested,
            predict(desk, removal),
            (*desk.subject.anatomy.misread(removal), *desk.heads(removal)),
        )
        return plan.model_copy(update={"target": reached.target, "certificate": reached.certificate})
