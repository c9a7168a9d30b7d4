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
    from layerprune.cli.ran import ran
    from layerprune.recipes import find_recipe, read_recipe

    parts, names = ran(read_recipe(find_recipe(recipe), changes), output, console.progress)
    for part in parts:
        console.print(part)
    console.print(f"written: {', '.join(str(output / name) for name in names)}")
