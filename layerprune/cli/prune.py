"""``layerprune prune``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from layerprune.cli import options as opt
from layerprune.cli.console import Console
from layerprune.cli.verb import Verb, pass_console
from layerprune.config import PruneConfig


@click.command(
    cls=Verb,
    after_interrupt="run the same command again: finished steps are kept",
    examples=[
        "layerprune prune MODEL --tasks arc_easy,hellaswag --drop 20% -o smaller/",
        "layerprune prune MODEL --tasks arc_easy,piqa --drop 6 --heal linear --corpus builtin -o smaller/",
    ],
)
@click.argument("model")
@opt.options(PruneConfig, without=("front",))
@opt.output("Folder to make for the smaller model; the documents on the way lie beside it, in DIR.run.")
@pass_console
def prune(console: Console, model: str, output: Path, **options: Any) -> None:
    """Make a smaller MODEL (a folder or a Hub id) in one go: plan, export, heal where --heal says how, and audit.

    One of --drop, --target-params, --target-bytes, --target-speedup and --max-drop says how far to go.
    """
    from layerprune import api
    from layerprune.cli.ran import finished

    done = api.prune(model, output, progress=console.progress, **opt.given(options))
    for part in finished(done):
        console.print(part)
    console.print(f"written: {output}; on the way: {done.folder}")
