"""From a model to a plan: search for the removal that harms least, predict what it costs, write both documents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from layerprune import artifacts
from layerprune.artifacts import Candidate, Interval, Outcomes, Plan, PredictedTask, Prediction, Round, Scores
from layerprune.config import PlanConfig, ScoreConfig
from layerprune.errors import RefusedError, UsageError
from layerprune.files import check_places, locked
from layerprune.models.model import LoadedModel
from layerprune.planner.budget import evaluations
from layerprune.planner.goals import Goal, GoalResult, goal_of
from layerprune.planner.plan_documents import eliminated, laid, written
from layerprune.planner.session import ScoringSession, SearchRules, SplitShares
from layerprune.registry import Entry, build, options_of, spec_of
from layerprune.removal import Removal
from layerprune.scoring.aggregation import additive, no_halves, unit_of
from layerprune.scoring.metrics import METRICS, cheapest_search
from layerprune.scoring.metrics.ablation import INTACT
from layerprune.search import (
    SEARCHES,
    Constraints,
    Judge,
    Others,
    SearchResult,
    asks,
    bound,
    next_to_go,
    require_finite,
    shortfall,
)
from layerprune.search.base import require_one_finite
from layerprune.stats import bootstrap_interval, displayed, mean_interval, paired_interval
from layerprune.util import SILENT, Progress


def plan_model(
    request: PlanConfig, *, run_folder: Path, progress: Progress = SILENT, loaded: LoadedModel | None = None
) -> tuple[Scores, Plan]:
    """Search for the removal that harms least; writes scores.json and plan.json into ``run_folder``.

    ``loaded``: the model, where it is loaded already.
    """
    with locked(run_folder, request.model):
        check_places(run_folder, files=(Scores.filename, Plan.filename))
        searcher = Searcher.open(request, run_folder, progress, loaded)
        reached = searcher.goal.pursue(searcher.session, searcher)
        scores = searcher.session.scores(reached.rounds)
        plan = searcher.plan(reached, scores)
        with laid(scores, run_folder, progress, before=Plan) as new:
            plan.save(new / Plan.filename)
    return scores, plan


@dataclass
class Searcher:
    """A search at a desk, ready to look for removals of any size; what it has judged it need not judge again."""

    request: PlanConfig
    goal: Goal
    rules: SearchRules
    session: ScoringSession
    entry: Entry
    search: Any
    judges: dict[int | None, Judge] = field(default_factory=dict)  # by how many candidates a race has to get right
    asked: dict[str, Judge] = field(default_factory=dict)  # other metrics, by spec
    shown: set[str] = field(default_factory=set)

    @classmethod
    def open(
        cls, request: PlanConfig, run_folder: Path, progress: Progress, loaded: LoadedModel | None = None
    ) -> Searcher:
        """Validate everything, load model and items."""
        goal, rules = goal_of(request), SearchRules.of(request)
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
        session = ScoringSession.open(request, run_folder, progress, rules, loaded)
        goal.require(session)
        asked = None if request.budget is None else evaluations(search, session.constraints, goal.most(session))
        session.bring_items(goal.shares, asked)
        request = replace(request, limit=session.request.limit)
        return cls(request, goal, rules, session, entry, search)

    def __call__(self, drop: int) -> SearchResult:
        """Return the removal of ``drop`` units; raises ``RefusedError`` where the constraints allow none."""
        session = self.session
        judge = self._judge(next_to_go(self.search, drop))
        look = bound(self.search, Others(self._chosen_by, self._judge))

        def watch(removal: Removal, best: Candidate) -> None:
            unit = unit_of(session.metric)
            score = displayed(best.score, unit, self.request.metric)
            said = f"{len(removal)} chosen: {removal}, {unit} {score:.4f}"
            if said not in self.shown:
                self.shown.add(said)
                session.progress.note(said)

        found = look(judge, session.constraints, drop, seed=self.request.seed, watch=watch)
        if self._races and eliminated(found):  # rules passed over winners of the race: all have to be ranked
            found = look(session.judge(), session.constraints, drop, seed=self.request.seed, watch=watch)
        if misfit := session.constraints.misfit(found.removal, drop):
            raise RefusedError(f"the search {self.entry.name!r} found {found.removal}, which may not go: {misfit}")
        require_finite(found)
        self._require_floors(found, judge)
        return found

    def _judge(self, keep: int | None) -> Judge:
        """Return the metric's judgements, raced for the best ``keep`` of a round where races are allowed."""
        keep = keep if self._races else None
        if keep not in self.judges:
            self.judges[keep] = self.session.judge(keep)
        return self.judges[keep]

    @property
    def _races(self) -> bool:
        """Whether rounds may be raced.

        Moves of different sizes are compared per layer, which the race does not know of; nor does it know of floors,
        and of the worst task.
        """
        alike = len({len(move) for move in self.session.constraints.moves}) == 1
        return alike and additive(self.session.data.objective) and self.request.racing is not False

    def _chosen_by(self, metric: str, constraints: Constraints, drop: int) -> SearchResult:
        """Return what another metric removes by the cheapest search it has."""
        _, search = build(SEARCHES, cheapest_search(metric))
        found: SearchResult = search(self._judge_by(metric), constraints, drop, seed=self.request.seed)
        return found

    def _judge_by(self, metric: str) -> Judge:
        if metric not in self.asked:
            self.asked[metric] = self.session.judge_by(metric)
        return self.asked[metric]

    def _require_floors(self, found: SearchResult, judge: Judge) -> None:
        """Raise ``RefusedError`` when what was found leaves a task below its floor; judged whole if it was not yet."""
        if not self.session.data.objective.floors:
            return
        whole = found.cost or judge([found.removal])[0]
        if whole.below_floor:
            what = shortfall(whole)
            raise RefusedError(f"what was found breaks a floor: {what}; use --search greedy, or lower --floor")

    def plan(self, reached: GoalResult, scores: Scores) -> Plan:
        """Return the plan that carries out what was reached; raises ``RefusedError`` where export would."""
        session, removal = self.session, reached.found.removal
        session.dry_run(removal)
        how = artifacts.SearchRef(name=self.entry.name, options=options_of(self.search))
        limits = self.rules.limits(session.constraints.protect, session.loaded.architecture)
        plan = written(
            scores,
            reached.found,
            how,
            limits,
            self.goal.requested,
            predict(session, removal),
            (*session.loaded.architecture.misread(removal), *session.heads(removal)),
        )
        return plan.model_copy(update={"target": reached.target, "certificate": reached.certificate})


# Scoring: what each single removal costs, and the document that says so.


def score_model(
    request: ScoreConfig,
    *,
    run_folder: Path | None = None,
    progress: Progress = SILENT,
    stability: bool = False,
    loaded: LoadedModel | None = None,
) -> Scores:
    """Score every single removal the architecture allows; ``run_folder`` keeps what is measured, for going on.

    ``stability``: refuse, before anything slow, a metric whose ranking does not stand on answered items, and a choice
    of so few layers that it cannot be told. ``loaded``: the model, where it is loaded already.
    """
    entry, metric = build(METRICS, request.metric)
    if stability and metric.needs != "items":
        raise UsageError(f"--stability splits answered items, and the metric {entry.name!r} answers none; use ablation")
    with locked(run_folder, request.model):
        session = ScoringSession.open(request, run_folder, progress, loaded=loaded)
        removals = [Removal.of(*move) for move in session.constraints.moves]
        if stability and len(removals) < 3:
            raise UsageError(no_halves(entry.name))
        session.bring_items(SplitShares())
        candidates = tuple(session.judge()(removals))
        require_one_finite(candidates)
        return session.scores((Round(removed=(), candidates=candidates),))


# What a removal is expected to cost, on items that had no say in choosing it.


OPTIMISTIC = "the items that selected; expect it to be too good"


def prepare(session: ScoringSession, removals: Sequence[Removal]) -> None:
    """Measure several removals on the held-back items in one go; ``predict`` then finds them there."""
    if session.held_back is not None:
        session.held_back.outcomes([INTACT, *removals], "every step, on items held back")


def predict(session: ScoringSession, removal: Removal) -> Prediction | None:
    """Judge the chosen removal on the held-back items; None for a metric that answers no items."""
    evaluator = session.held_back or session.data.evaluator
    if evaluator is None:
        return None
    found = evaluator.outcomes([INTACT, removal], "the chosen removal, on items held back")
    tasks: dict[str, PredictedTask] = {}
    for name in evaluator.eval_set.tasks:
        base, own = found[INTACT][name], found[removal][name]
        low, high = paired_interval(base.correct, own.correct)
        tasks[name] = PredictedTask(
            base_accuracy=round(base.accuracy, 6),
            accuracy=round(own.accuracy, 6),
            difference=round(own.accuracy - base.accuracy, 6),
            interval=(round(low, 6), round(high, 6)),
            items=len(own.correct),
            **_own_answers(base, own),
        )
    counted = counted_by_accuracy(tasks)
    differences = [task.difference for task in counted]
    low, high = mean_interval(differences, [task.interval for task in counted])
    items = sum(task.items for task in tasks.values())
    return Prediction(
        source=f"{items} selection items held back from the search" if session.held_back else OPTIMISTIC,
        accuracy_difference=round(sum(differences) / len(differences), 6),
        interval=(round(low, 6), round(high, 6)),
        tasks=tasks,
    )


def counted_by_accuracy(tasks: Mapping[str, PredictedTask]) -> list[PredictedTask]:
    """Return the tasks whose accuracies are averaged: where some have one, not those of own answers."""
    return [task for task in tasks.values() if task.nats is None] or list(tasks.values())


def _own_answers(base: Outcomes, own: Outcomes) -> dict[str, Any]:
    """Return what the intact model's own answers lose; nothing where none were read."""
    if base.answer is None or base.agreed is None or own.answer is None or own.agreed is None:
        return {}
    lost, agreed = np.subtract(base.answer, own.answer), np.array(own.agreed)
    return {
        "nats": round(float(lost.mean()), 6),
        "nats_interval": _interval(lost),
        "base_agreed": round(float(np.mean(base.agreed)), 6),
        "agreed": round(float(agreed.mean()), 6),
        "agreed_interval": _interval(agreed),
    }


def _interval(values: NDArray[np.float64]) -> Interval | None:
    if len(values) < 2:
        return None
    low, high = bootstrap_interval([values])
    return round(low, 6), round(high, 6)
