"""``python examples/demo``: the whole job on a small real model; needs layerprune and gguf installed."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from layerprune.cli import command as opt
from layerprune.cli.command import Verb, pass_console
from layerprune.cli.console import Console

if not __package__:  # run as a folder, which stands first in the path then: there gguf.py would hide the package gguf
    sys.path[0] = str(Path(__file__).resolve().parents[1])

HOME = Path("layerprune-demo")


@click.command(
    cls=Verb,
    after_interrupt="what was fetched is kept in the cache; run the same command again",
    examples=["python examples/demo", "python examples/demo -o elsewhere/"],
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.option("-o", "--output", type=opt.FOLDER, metavar="DIR", help="A new folder. Default: layerprune-demo, -2, -3 …")
@pass_console
def demo(console: Console, output: Path | None = None) -> None:
    """Do the whole job on a small real model: fetch, score, plan, export, audit, and let both models speak."""
    from demo.display import shown
    from demo.sequence import run_demo

    for result in run_demo(output or unused(HOME), progress=console.progress):
        for part in shown(result):
            console.print(part)


def unused(folder: Path) -> Path:
    """Return ``folder``, or the first of ``folder-2``, ``folder-3`` … that does not exist."""
    number, found = 2, folder
    while found.exists():
        number, found = number + 1, folder.with_name(f"{folder.name}-{number}")
    return found


if __name__ == "__main__":
    demo(prog_name="python examples/demo")
