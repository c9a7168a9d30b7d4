"""The two ways to a plan: from a model, and from a scores.json that is there already."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from layerprune.cli import options as opt
from layerprune.documents import Plan, Scores
from layerprune.errors import UsageError
from layerprune.progress import Progress

FOR_SCORES = ("protect", "search", "keep_period")  # what can still be said when the scores are there


def plan_anew(
    *,
    model: str | None,
    drop: str,
    search: str | None,
    keep_period: bool | None,
    scores: None,
    output: Path,
    force: bool,
    progress: Progress,
    **options: Any,
) -> tuple[Scores, Plan]:
    """Score a model and plan."""
    from layerprune.planning import PlanRequest, ScoreRequest, plan_model

    if model is None:
        raise UsageError("name the MODEL to plan for, or give --scores to plan from an earlier scores.json")
    if (output / Scores.filename).exists() and not force:
        raise UsageError(
            f"{output / Scores.filename} exists; plan from it with --scores, give another folder with -o, or --force"
        )
    score = ScoreRequest(model=model, **opt.given(options))
    request = PlanRequest(score=score, drop=drop, search=search, keep_period=bool(keep_period))
    return plan_model(request, run_folder=output, progress=progress)


def plan_from_scores(
    *,
    model: str | None,
    drop: str,
    search: str | None,
    keep_period: bool | None,
    scores: Path,
    output: Path,
    force: bool,
    progress: Progress,
    **options: Any,
) -> tuple[Scores, Plan]:
    """Plan from a scores.json; a copy of it is laid beside the plan."""
    from layerprune.planning import replan

    unused = [name for name, value in opt.given(options).items() if name not in FOR_SCORES and value is not None]
    if model is not None or unused:
        what = "a MODEL" if model is not None else f"--{unused[0].replace('_', '-')}"
        raise UsageError(f"--scores plans without a model: {what} cannot be given with it")
    read = Scores.load(scores)
    planned = replan(read, drop, options["protect"], search=search, keep_period=bool(keep_period))
    copy = output / Scores.filename
    if not (copy.exists() and copy.samefile(scores)):
        if copy.exists() and not force:
            raise UsageError(f"{copy} exists; give another folder with -o, or --force to replace it")
        read.save(copy)
    planned.save(output / Plan.filename)
    return read, planned
