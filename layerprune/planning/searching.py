"""From a model to a plan: search for the removal that harms least, predict what it costs, write both documents."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from layerprune.documents import Candidate, Plan, Scores, Search
from layerprune.metrics import METRICS
from layerprune.planners import SEARCHES, Constraints, parse_drop
from layerprune.planners.cascade import Cascade
from layerprune.planning.desk import Desk
from layerprune.planning.limits import keeping_period
from layerprune.planning.prediction import predict
from layerprune.planning.request import PlanRequest, ScoreRequest
from layerprune.planning.written import written
from layerprune.progress import SILENT, Progress
from layerprune.removal import Removal
from layerprune.specs import build, options_of

# Share of the selection items that no search sees: the chosen removal is judged on them once, for the prediction.
HELD_BACK = 0.2


def plan_model(request: PlanRequest, *, run_folder: Path, progress: Progress = SILENT) -> tuple[Scores, Plan]:
    """Search for the removal that harms least; writes scores.json and plan.json into ``run_folder``."""
    _, metric = build(METRICS, request.score.metric)
    search_entry, search = build(SEARCHES, request.search or metric.search)
    desk = Desk.open(request.score, run_folder, progress, held_back=HELD_BACK, drop=request.drop)
    if request.keep_period:
        desk.constraints = replace(desk.constraints, check=keeping_period(desk.subject.anatomy))
    drop = parse_drop(request.drop, desk.constraints.depth)
    desk.data.keep = _kept(request.score, desk.constraints, search, drop)

    def watch(removal: Removal, best: Candidate) -> None:
        progress.note(f"{len(removal)} of {drop} chosen: {removal}, {metric.unit} {best.score:.4f}")

    look = search.proposed_by(desk.judge_by(search.by)) if isinstance(search, Cascade) else search
    found = look(desk.judge, desk.constraints, drop, seed=request.score.seed, watch=watch)
    desk.rehearse(found.removal)
    scores = desk.scores(found.rounds)
    plan = written(
        scores,
        found,
        Search(name=search_entry.name, options=options_of(search)),
        desk.limits(request.keep_period),
        request.drop,
        predict(desk, found.removal),
        desk.subject.anatomy.misread(found.removal),
    )
    scores.save(run_folder / Scores.filename)
    plan.save(run_folder / Plan.filename)
    return scores, plan


def _kept(request: ScoreRequest, constraints: Constraints, search: Any, drop: int) -> int | None:
    """Return how many candidates of a round a race has to get right; None: no racing.

    Searches without ``next_to_go`` compare more than the next to go; moves of different sizes are compared per layer,
    which the race does not know of.
    """
    if not request.racing or not hasattr(search, "next_to_go") or len({len(move) for move in constraints.moves}) > 1:
        return None
    return int(search.next_to_go(drop))
