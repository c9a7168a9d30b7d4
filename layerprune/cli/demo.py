"""``layerprune demo``."""

from __future__ import annotations

from pathlib import Path

import click

from layerprune.cli import options as opt
from layerprune.cli.console import Console
from layerprune.cli.verb import Verb, pass_console

HOME = Path("layerprune-demo")


@click.command(
    cls=Verb,
    after_interrupt="what was fetched is kept in the cache; run the same command again",
    examples=["layerprune demo", "layerprune demo -o elsewhere/"],
)
@click.option("-o", "--output", type=opt.FOLDER, metavar="DIR", help="A new folder. Default: layerprune-demo, -2, -3 …")
@pass_console
def demo(console: Console, output: Path | None) -> None:
    """Do the whole job on a small real model: fetch, score, plan, export, audit, and let both models speak."""
    from layerprune.cli.demonstrated import shown
    from layerprune.demo.sequence import run_demo

    for result in run_demo(output or unused(HOME), progress=console.progress):
        for part in shown(result):
            console.print(part)


def unused(folder: Path) -> Path:
    """Return ``folder``, or the first of ``folder-2``, ``folder-3`` … that does not exist."""
    number, found = 2, folder
    while found.exists():
        number, found = number + 1, folder.with_name(f"{folder.name}-{number}")
    return found
