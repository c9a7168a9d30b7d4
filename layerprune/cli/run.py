"""``layerprune run``, ``prune`` and ``study``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from layerprune.artifacts import Recipe, StudyRecipe
from layerprune.cli import command as opt
from layerprune.cli import tables
from layerprune.cli.checkpoint import audited
from layerprune.cli.command import Verb, pass_console
from layerprune.cli.console import Console
from layerprune.cli.plan import CONTINUE, refuse_to_replace
from layerprune.cli.tables import healed
from layerprune.config import PruneConfig, StudyConfig
from layerprune.files import locked
from layerprune.recipes import Finished, run_recipe, run_study
from layerprune.util import Progress

# ``layerprune run``.


@click.command(
    cls=Verb,
    after_interrupt="run the same command again: finished steps are kept",
    examples=[
        "layerprune run quickstart -o quickstart/",
        "layerprune run recipes/quickstart.yaml --set model=/models/mine --set plan.drop=25% -o mine/",
    ],
)
@click.argument("recipe")
@opt.output("Run folder: a new one, or one that this recipe has begun.")
@click.option("--set", "changes", multiple=True, metavar="KEY=VALUE", help="Change one key; may be repeated.")
@pass_console
def run(console: Console, recipe: str, output: Path, changes: tuple[str, ...]) -> None:
    """Do what RECIPE says: score, plan, export, heal and audit, or a study; run again, it goes on.

    RECIPE is a YAML file, or the name of one that is shipped: quickstart, cosine-baseline, paper-ablation, study.
    """
    from layerprune.recipes import find_recipe, read_recipe

    parts, names = ran(read_recipe(find_recipe(recipe), changes), output, console.progress)
    for part in parts:
        console.print(part)
    console.print(f"written: {', '.join(str(output / name) for name in names)}")


# What a recipe's run says at its end.


def ran(recipe: Recipe | StudyRecipe, output: Path, progress: Progress) -> tuple[list[Any], list[str]]:
    """Run a recipe of either kind; return what to print, and the names of what was written."""
    if isinstance(recipe, StudyRecipe):
        from layerprune.analysis import verdict_of

        return [verdict_of(run_study(recipe, output, progress=progress))], ["study.html", "study.json"]
    done = run_recipe(recipe, output, progress=progress)
    return finished(done), ["scores.json", "plan.json", "checkpoint", *(["healed"] if done.heal else [])]


def finished(done: Finished) -> list[Any]:
    """Return what to print of a run that is done."""
    work = healed(done.heal) if done.heal else []
    return [*tables.planned(done.scores, done.plan), *work, *audited(done.audit)]


# ``layerprune prune``.


@click.command(
    cls=Verb,
    after_interrupt="run the same command again: finished steps are kept",
    examples=[
        "layerprune prune MODEL --tasks arc_easy,hellaswag --drop 20% -o smaller/",
        "layerprune prune MODEL --tasks arc_easy,piqa --drop 6 --heal linear --corpus builtin -o smaller/",
    ],
)
@click.argument("model")
@opt.options(PruneConfig, without=("front",))
@opt.output("Folder to make for the smaller model; the documents on the way lie beside it, in DIR.run.")
@pass_console
def prune(console: Console, model: str, output: Path, **options: Any) -> None:
    """Make a smaller MODEL (a folder or a Hub id) in one go: plan, export, heal where --heal says how, and audit.

    One of --drop, --target-params, --target-bytes, --target-speedup and --max-drop says how far to go.
    """
    from layerprune import api

    done = api.prune(model, output, progress=console.progress, **opt.given(options))
    for part in finished(done):
        console.print(part)
    console.print(f"written: {output}; on the way: {done.folder}")


# ``layerprune study``.


@click.command(
    cls=Verb,
    after_interrupt=CONTINUE,
    examples=[
        "layerprune study MODEL --tasks arc_easy,hellaswag,piqa -o study/",
        "layerprune study MODEL --tasks arc_easy,piqa --limit 200 --text book.txt --greedy 25% -o study/",
    ],
)
@click.argument("model")
@opt.options(StudyConfig)
@opt.output("Folder that gets study.html, study.json, tables (CSV) and plots (SVG).")
@click.option("--force", is_flag=True, help="Replace a study that is already there.")
@pass_console
def study(console: Console, model: str, output: Path, force: bool, **options: Any) -> None:
    """Ask the paper's questions (arXiv:2605.14075) of MODEL: which metric knows which of its layers matter."""
    from layerprune import api
    from layerprune.analysis import verdict_of

    with locked(output, model):
        refuse_to_replace(output / "study.json", force)
        found = api.study(model, output, progress=console.progress, **opt.given(options))
    console.print(verdict_of(found))
    console.print(f"written: {output / 'study.html'}, {output / 'study.json'}")
