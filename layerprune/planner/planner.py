"""From a model to a plan: search for the removal that harms least, predict what it costs, write both documents."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from layerprune.artifacts import (
    Candidate,
    Interval,
    Outcomes,
    Plan,
    PredictedTask,
    Prediction,
    Round,
    Scores,
    SearchRef,
)
from layerprune.config import PlanConfig, ScoreConfig
from layerprune.errors import RefusedError, UsageError
from layerprune.exporter import dry_run
from layerprune.files import check_places, locked
from layerprune.models.model import LoadedModel
from layerprune.planner.budget import evaluations
from layerprune.planner.goals import Goal, GoalResult, goal_of
from layerprune.planner.plan_documents import build_plan, published_with
from layerprune.planner.session import ScoringSession, SearchRules, SplitShares
from layerprune.registry import Entry, build, options_of, spec_of
from layerprune.removal import Removal
from layerprune.scoring.aggregation import no_halves, unit_of
from layerprune.scoring.metrics import METRICS
from layerprune.scoring.metrics.ablation import INTACT
from layerprune.search import SEARCHES, Search, SearchResult, require_finite, shortfall
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
        planning = Planning.open(request, run_folder, progress, loaded)
        reached = planning.reach()
        scores = planning.session.scores(reached.rounds)
        plan = planning.plan(reached, scores)
        with published_with(scores, run_folder, progress, before=Plan) as new:
            plan.save(new / Plan.filename)
    return scores, plan


@dataclass
class Planning:
    """A goal, and what is searched with: a session and a search, ready to look for removals of any size."""

    request: PlanConfig
    goal: Goal
    session: ScoringSession
    entry: Entry
    search: Search
    shown: set[str] = field(default_factory=set)

    @classmethod
    def open(
        cls, request: PlanConfig, run_folder: Path, progress: Progress, loaded: LoadedModel | None = None
    ) -> Planning:
        """Validate everything, load model and items."""
        goal = goal_of(request)
        _, metric = build(METRICS, request.metric)
        entry, search = build(SEARCHES, request.search or metric.search)
        if request.racing and (search.next_to_go(2) is None or "items" not in metric.needs):
            what = f"the search {spec_of(entry.name, search)!r} compares more than the next to go"
            what = what if "items" in metric.needs else f"the metric {request.metric!r} answers no items"
            raise UsageError(f"--racing: {what}; leave it out, or use ablation with one-shot or greedy")
        for other in search.asks:
            if "items" in build(METRICS, other)[1].needs and "items" not in metric.needs:
                asked = f"the search {spec_of(entry.name, search)!r} asks the metric {other!r}"
                raise UsageError(f"{asked}, which answers items, and {request.metric!r} answers none")
        session = ScoringSession.open(request, run_folder, progress, loaded)
        goal.require(session)
        asked = None if request.budget is None else evaluations(search, session.constraints, goal.most(session))
        session.bring_items(goal.shares, asked)
        return cls(request, goal, session, entry, search)

    def reach(self) -> GoalResult:
        """Search until the goal is reached."""
        return self.goal.pursue(self.session, self.find)

    def find(self, drop: int) -> SearchResult:
        """Return the removal of ``drop`` units; raises ``RefusedError`` where the constraints allow none."""
        request, session = self.request, self.session

        def watch(removal: Removal, best: Candidate) -> None:
            unit = unit_of(session.metric)
            score = displayed(best.score, unit, request.metric)
            said = f"{len(removal)} chosen: {removal}, {unit} {score:.4f}"
            if said not in self.shown:
                self.shown.add(said)
                session.progress.note(said)

        search, racing = spec_of(self.entry.name, self.search), request.racing is not False
        found = session.runner.find(request.metric, search, session.constraints, drop, racing=racing, watch=watch)
        session.constraints.require_allowed(self.entry.name, found.removal, drop)
        require_finite(found)
        if session.data.objective.floors:  # what a one-shot search found is judged whole
            whole = found.cost or session.runner.judge(request.metric)([found.removal])[0]
            if whole.below_floor:
                what = shortfall(whole)
                raise RefusedError(f"what was found breaks a floor: {what}; use --search greedy, or lower --floor")
        return found

    def plan(self, reached: GoalResult, scores: Scores) -> Plan:
        """Return the plan that carries out what was reached; raises ``RefusedError`` where export would."""
        session, removal = self.session, reached.found.removal
        architecture = session.loaded.architecture
        # before a plan is written that nobody can carry out
        dry_run(session.checkpoint, removal, trust_remote_code=self.request.trust_remote_code)
        (weight,) = session.weigh(removal)
        plan = build_plan(
            scores,
            reached.found,
            SearchRef(name=self.entry.name, options=options_of(self.search)),
            SearchRules.of(self.request).limits(session.constraints.protect, architecture),
            self.goal.requested,
            predict(session, removal),
            # export leaves a multi-token-prediction head out
            (*architecture.misread(removal), *([] if weight.heads is None else [weight.heads.words])),
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
    if stability and "items" not in metric.needs:
        raise UsageError(f"--stability splits answered items, and the metric {entry.name!r} answers none; use ablation")
    with locked(run_folder, request.model):
        session = ScoringSession.open(request, run_folder, progress, loaded)
        removals = [Removal.of(*move) for move in session.constraints.moves]
        if stability and len(removals) < 3:
            raise UsageError(no_halves(entry.name))
        session.bring_items(SplitShares())
        candidates = tuple(session.runner.judge(request.metric)(removals))
        require_one_finite(candidates)
        return session.scores((Round(removed=(), candidates=candidates),))


# What a removal is expected to cost, on items that had no say in choosing it.


OPTIMISTIC = "the items that selected; expect it to be too good"


def predict(session: ScoringSession, removal: Removal) -> Prediction | None:
    """Judge the chosen removal on the held-back items; None for a metric that answers no items."""
    evaluator = session.held_back or session.data.evaluator
    if evaluator is None:
        return None
    found = evaluator.outcomes([INTACT, removal], "the chosen removal, on items held back")
    tasks = {name: _predicted_task(found[INTACT][name], found[removal][name]) for name in evaluator.eval_set.tasks}
    counted = counted_by_accuracy(tasks)
    differences = [task.difference for task in counted]
    items = sum(task.items for task in tasks.values())
    return Prediction(
        source=f"{items} selection items held back from the search" if session.held_back else OPTIMISTIC,
        accuracy_difference=round(sum(differences) / len(differences), 6),
        interval=_rounded(mean_interval(differences, [task.interval for task in counted])),
        tasks=tasks,
    )


def counted_by_accuracy(tasks: Mapping[str, PredictedTask]) -> list[PredictedTask]:
    """Return the tasks whose accuracies are averaged: where some have one, not those of own answers."""
    return [task for task in tasks.values() if task.nats is None] or list(tasks.values())


def _predicted_task(base: Outcomes, own: Outcomes) -> PredictedTask:
    """Return the accuracies, and what the intact model's own answers lose, where some were read."""
    answers: dict[str, Any] = {}
    if not any(part is None for part in (base.answer, base.agreed, own.answer, own.agreed)):
        lost, agreed = np.subtract(base.answer, own.answer), np.array(own.agreed)
        answers = {
            "nats": round(float(lost.mean()), 6),
            "nats_interval": _bootstrapped(lost),
            "base_agreed": round(float(np.mean(base.agreed)), 6),
            "agreed": round(float(agreed.mean()), 6),
            "agreed_interval": _bootstrapped(agreed),
        }
    return PredictedTask(
        base_accuracy=round(base.accuracy, 6),
        accuracy=round(own.accuracy, 6),
        difference=round(own.accuracy - base.accuracy, 6),
        interval=_rounded(paired_interval(base.correct, own.correct)),
        items=len(own.correct),
        **answers,
    )


def _bootstrapped(values: NDArray[np.float64]) -> Interval | None:
    return _rounded(bootstrap_interval([values])) if len(values) > 1 else None


def _rounded(interval: Interval) -> Interval:
    low, high = interval
    return round(low, 6), round(high, 6)
