"""``layerprune run``."""

from __future__ import annotations

from pathlib import Path

import click

from layerprune.cli import options as opt
from layerprune.cli.console import Console
from layerprune.cli.verb import Verb, pass_console


@click.command(
    cls=Verb,
    after_interrupt="run the same command again: finished steps are kept",
    examples=[
        "layerprune run recipes/quickstart.yaml -o quickstart/",
        "layerprune run recipes/quickstart.yaml --set model=/models/mine --set plan.drop=25% -o mine/",
    ],
)
@click.argument("recipe", type=opt.FILE)
@opt.output("Run folder: a new one, or one that this recipe has begun.")
@click.option("--set", "changes", multiple=True, metavar="KEY=VALUE", help="Change one key; may be repeated.")
@pass_console
def run(console: Console, recipe: Path, output: Path, changes: tuple[str, ...]) -> None:
    """Score, plan, export, heal and audit as RECIPE (a YAML file) says; again after an interruption, it goes on."""
    from layerprune.cli import tables
    from layerprune.cli.audited import audited
    from layerprune.cli.healed import healed
    from layerprune.recipes import read_recipe, run_recipe

    finished = run_recipe(read_recipe(recipe, changes), output, progress=console.progress)
    work = healed(finished.heal) if finished.heal else []
    for part in [*tables.planned(finished.scores, finished.plan), *work, *audited(finished.audit)]:
        console.print(part)
    names = ["scores.json", "plan.json", "checkpoint", *(["healed"] if finished.heal else [])]
    console.print(f"written: {', '.join(str(output / name) for name in names)}")
