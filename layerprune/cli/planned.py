"""The two ways to a plan: from a model, and from a scores.json that is there already."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layerprune.cli import options as opt
from layerprune.documents import Front, Plan, Scores, read_scores
from layerprune.errors import UsageError
from layerprune.lock import locked
from layerprune.progress import Progress

if TYPE_CHECKING:
    from layerprune.planning import PlanRequest

RULES = ("keep_period", "no_adjacent", "contiguous")
OBJECTIVE = ("objective", "weights", "floor")
FOR_SCORES = ("drop", "protect", "search", *RULES, *OBJECTIVE)  # what can still be said when the scores are there


def plan_anew(*, output: Path, progress: Progress, **options: Any) -> tuple[Scores, Plan]:
    """Score a model and plan."""
    from layerprune.planning import plan_model

    return plan_model(asked(output=output, **options), run_folder=output, progress=progress)


def front_anew(*, output: Path, progress: Progress, **options: Any) -> Front:
    """Score a model and plan every step of one path."""
    from layerprune.planning import front_model

    return front_model(asked(output=output, **options), run_folder=output, progress=progress)[1]


def asked(
    *, model: str | None, search: str | None, scores: Path | None, output: Path, force: bool, **options: Any
) -> PlanRequest:
    """Return the request that the options amount to; refuse to replace scores."""
    from layerprune.planning import GOAL_OPTIONS, PlanRequest, Rules, ScoreRequest, goal_of

    if scores is not None:
        raise UsageError("--scores plans without a model, and a front asks it how far to go: leave --scores out")
    if model is None:
        raise UsageError("name the MODEL to plan for, or give --scores to plan from an earlier scores.json")
    goal, rules = goal_of(**picked(options, GOAL_OPTIONS)), Rules(**picked(options, RULES))
    if (output / Scores.filename).exists() and not force:
        raise UsageError(
            f"{output / Scores.filename} exists; plan from it with --scores, give another folder with -o, or --force"
        )
    rest = {name: value for name, value in options.items() if name not in (*GOAL_OPTIONS, *RULES)}
    return PlanRequest(ScoreRequest(model=model, **opt.given(rest)), goal, search, rules)


def plan_from_scores(
    *,
    model: str | None,
    search: str | None,
    scores: Path,
    output: Path,
    force: bool,
    progress: Progress,
    **options: Any,
) -> tuple[Scores, Plan]:
    """Plan from a scores.json; a copy of it, judged again where another objective is given, is laid beside the plan."""
    from layerprune.judgement import asked_objective, rejudged
    from layerprune.planning import Rules, laid, replan

    unused = [name for name in opt.given(options) if name not in FOR_SCORES]
    if model is not None or unused:
        what = "a MODEL" if model is not None else f"--{unused[0].replace('_', '-')}"
        raise UsageError(f"--scores plans without a model: {what} cannot be given with it")
    if options["drop"] is None:
        raise UsageError("nothing says how far to go; with --scores, give --drop")
    read = again = read_scores(scores)
    if picked(options, OBJECTIVE):
        name, weights, floors = (options[each] for each in OBJECTIVE)
        if name is None:  # what is not said stays as it was recorded
            recorded = read.metric.objective
            name = None if weights else recorded.name
            weights, floors = weights or recorded.weights, recorded.floors if floors is None else floors
        again = rejudged(read, asked_objective(name, weights, floors))
    rules = Rules(**picked(options, RULES))
    planned = replan(again, options["drop"], options["protect"], search=search, rules=rules)
    copy = output / Scores.filename
    with locked(output):
        same = copy.exists() and copy.samefile(scores)
        if same and again != read:
            raise UsageError(f"another objective makes other scores than {scores}; give another folder with -o")
        if not same and copy.exists() and not force:
            raise UsageError(f"{copy} exists; give another folder with -o, or --force to replace it")
        if same:
            planned.save(output / Plan.filename)
        else:
            with laid(again, output, progress, before=Plan) as new:
                planned.save(new / Plan.filename)
    return again, planned


def picked(options: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    """Return those of ``names`` that were given."""
    return {name: value for name, value in opt.given(options).items() if name in names}
