"""``layerprune healers``."""

from __future__ import annotations

import click

from layerprune.cli.console import Console
from layerprune.cli.verb import Verb, pass_console


@click.command(cls=Verb, examples=["layerprune healers", "layerprune healers linear"])
@click.argument("name", required=False)
@pass_console
def healers(console: Console, name: str | None) -> None:
    """List the ways to heal a pruned model; with NAME, show that one's options."""
    from layerprune.cli import tables
    from layerprune.healing import HEALERS

    if name is None:
        console.print(tables.healers(HEALERS))
    else:
        entry = HEALERS.get(name)
        console.print(tables.healer(entry))
        console.print(tables.options(entry))
