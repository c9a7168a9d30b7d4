"""What a recipe's run says at its end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from layerprune.analysis import verdict_of
from layerprune.cli import tables
from layerprune.cli.audited import audited
from layerprune.cli.healed import healed
from layerprune.documents import Recipe, StudyRecipe
from layerprune.progress import Progress
from layerprune.recipes import Finished, run_recipe, run_study


def ran(recipe: Recipe | StudyRecipe, output: Path, progress: Progress) -> tuple[list[Any], list[str]]:
    """Run a recipe of either kind; return what to print, and the names of what was written."""
    if isinstance(recipe, StudyRecipe):
        return [verdict_of(run_study(recipe, output, progress=progress))], ["study.html", "study.json"]
    done = run_recipe(recipe, output, progress=progress)
    return finished(done), ["scores.json", "plan.json", "checkpoint", *(["healed"] if done.heal else [])]


def finished(done: Finished) -> list[Any]:
    """Return what to print of a run that is done."""
    work = healed(done.heal) if done.heal else []
    return [*tables.planned(done.scores, done.plan), *work, *audited(done.audit)]
