"""``layerprune compare``."""

from __future__ import annotations

from pathlib import Path

import click

from layerprune.cli import options as opt
from layerprune.cli.console import Console
from layerprune.cli.verb import Verb, pass_console


@click.command(
    cls=Verb,
    after_interrupt="nothing is ever written",
    examples=["layerprune compare ablation/scores.json cosine/scores.json"],
)
@click.argument("first", type=opt.FILE)
@click.argument("second", type=opt.FILE)
@pass_console
def compare(console: Console, first: Path, second: Path) -> None:
    """Show how far two scores.json, FIRST and SECOND, agree about which layers to remove."""
    from layerprune.cli import compared
    from layerprune.comparison import compare_scores
    from layerprune.documents import read_scores

    ours, theirs = read_scores(first), read_scores(second)
    found = compare_scores(ours, theirs)
    console.print(compared.sources(found, ours, theirs))
    console.print(compared.layers(found, ("metric 1", "metric 2")))
    console.print(compared.agreement(found))
