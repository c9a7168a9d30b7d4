"""``layerprune run``, ``prune`` and ``study``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from layerprune import api
from layerprune.artifacts import StudyRecipe
from layerprune.cli import command as opt
from layerprune.cli.checkpoint import audited, healed
from layerprune.cli.command import Verb, pass_console
from layerprune.cli.console import Console
from layerprune.cli.plan import CONTINUE, planned, refuse_to_replace
from layerprune.config import PruneConfig, StudyConfig
from layerprune.files import locked

if TYPE_CHECKING:
    from rich.table import Table

    from layerprune.recipes import Finished

AGAIN = "run the same command again: finished steps are kept"


# ``layerprune run``.


@click.command(
    cls=Verb,
    after_interrupt=AGAIN,
    examples=[
        "layerprune run quickstart -o quickstart/",
        "layerprune run recipes/quickstart.yaml --set model=/models/mine --set plan.drop=25% -o mine/",
    ],
)
@click.argument("recipe")
@opt.output("Run folder: a new one, or one that this recipe has begun.")
@click.option("--set", "changes", multiple=True, metavar="KEY=VALUE", help="Change one key; may be repeated.")
@pass_console
def run(console: Console, recipe: str, output: Path, changes: tuple[str, ...] = ()) -> Iterator[Table | str]:
    """Do what RECIPE says: score, plan, export, heal and audit, or a study; run again, it goes on.

    RECIPE is a YAML file, or the name of one that is shipped: quickstart, cosine-baseline, paper-ablation, study.
    """
    from layerprune.analysis import verdict_of
    from layerprune.recipes import find_recipe, read_recipe, run_recipe, run_study

    read = read_recipe(find_recipe(recipe), changes)
    if isinstance(read, StudyRecipe):
        yield verdict_of(run_study(read, output, progress=console.progress))
        written = ["study.html", "study.json"]
    else:
        done = run_recipe(read, output, progress=console.progress)
        yield from finished(done)
        written = ["scores.json", "plan.json", "checkpoint", *(["healed"] if done.heal else [])]
    yield f"written: {', '.join(str(output / name) for name in written)}"


def finished(done: Finished) -> Iterator[Table | str]:
    """Yield what to print of a run that is done."""
    yield from planned(done.scores, done.plan)
    if done.heal:
        yield from healed(done.heal)
    yield from audited(done.audit)


# ``layerprune prune``.


@click.command(
    cls=Verb,
    after_interrupt=AGAIN,
    examples=[
        "layerprune prune MODEL --tasks arc_easy,hellaswag --drop 20% -o smaller/",
        "layerprune prune MODEL --tasks arc_easy,piqa --drop 6 --heal linear --corpus builtin -o smaller/",
    ],
)
@click.argument("model")
@opt.options(PruneConfig, without=("front",))
@opt.output("Folder to make for the smaller model; the documents on the way lie beside it, in DIR.run.")
@pass_console
def prune(console: Console, model: str, output: Path, **options: Any) -> Iterator[Table | str]:
    """Make a smaller MODEL (a folder or a Hub id) in one go: plan, export, heal where --heal says how, and audit.

    One of --drop, --target-params, --target-bytes, --target-speedup and --max-drop says how far to go.
    """
    done = api.prune(model, output, progress=console.progress, **options)
    yield from finished(done)
    yield f"written: {output}; on the way: {done.folder}"


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
def study(console: Console, model: str, output: Path, force: bool, **options: Any) -> Iterator[Table | str]:
    """Ask the paper's questions (arXiv:2605.14075) of MODEL: which metric knows which of its layers matter."""
    from layerprune.analysis import verdict_of

    with locked(output, model):
        refuse_to_replace(output / "study.json", force)
        found = api.study(model, output, progress=console.progress, **options)
    yield verdict_of(found)
    yield f"written: {output / 'study.html'}, {output / 'study.json'}"
