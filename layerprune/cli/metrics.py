"""``layerprune metrics``."""

from __future__ import annotations

import click

from layerprune.cli.console import Console
from layerprune.cli.verb import Verb, pass_console


@click.command(cls=Verb, examples=["layerprune metrics", "layerprune metrics cosine"])
@click.argument("name", required=False)
@pass_console
def metrics(console: Console, name: str | None) -> None:
    """List the metrics that can score layers; with NAME, show that one's options."""
    from layerprune.cli import tables
    from layerprune.metrics import METRICS

    if name is None:
        console.print(tables.metrics(METRICS))
    else:
        entry = METRICS.get(name)
        console.print(tables.metric(entry))
        console.print(tables.options(entry))
