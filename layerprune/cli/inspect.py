"""``layerprune inspect``, ``metrics`` and ``healers``."""

from __future__ import annotations

from typing import Any

import click

from layerprune.cli import command as opt
from layerprune.cli.command import Verb, pass_console
from layerprune.cli.console import Console
from layerprune.config import InspectConfig

# ``layerprune inspect``.


@click.command(
    cls=Verb,
    examples=["layerprune inspect HuggingFaceTB/SmolLM2-135M-Instruct", "layerprune inspect /models/my-llama --quiet"],
)
@click.argument("model")
@opt.options(InspectConfig)
@pass_console
def inspect(console: Console, model: str, **options: Any) -> None:
    """Show the decoder stack of MODEL (a folder or a Hub id) and what can be removed from it; loads no weights."""
    from layerprune import api
    from layerprune.cli import tables

    found = api.inspect(model, **opt.given(options))
    console.print(tables.inspected(found))
    console.print(tables.layers(found))
    for text in found.remarks:
        console.print(f"remark: {text}")


# ``layerprune metrics``.


@click.command(cls=Verb, examples=["layerprune metrics", "layerprune metrics cosine"])
@click.argument("name", required=False)
@pass_console
def metrics(console: Console, name: str | None) -> None:
    """List the metrics that can score layers; with NAME, show that one's options."""
    from layerprune.cli import tables
    from layerprune.scoring.metrics import METRICS

    if name is None:
        console.print(tables.metrics(METRICS))
    else:
        entry = METRICS.get(name)
        console.print(tables.metric(entry))
        console.print(tables.options(entry))


# ``layerprune healers``.


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
