"""``layerprune inspect``."""

from __future__ import annotations

from typing import Any

import click

from layerprune.cli import options as opt
from layerprune.cli.console import Console
from layerprune.cli.verb import Verb, pass_console
from layerprune.config import InspectConfig


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
