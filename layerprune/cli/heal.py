"""``layerprune heal``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from layerprune.cli import options as opt
from layerprune.cli.console import Console
from layerprune.cli.verb import Verb, pass_console
from layerprune.config import HealConfig


@click.command(
    cls=Verb,
    after_interrupt="no folder was written; the same command goes on where the method can, else begins again",
    examples=[
        "layerprune heal smaller/ -o healed/ --method linear --corpus text.jsonl",
        "layerprune heal smaller/ -o healed/ --method linear:ridge=0.01 --corpus builtin",
        "layerprune heal healed/ -o distilled/ --method distill:steps=200 --corpus text.jsonl",
    ],
)
@click.argument("checkpoint", type=opt.FOLDER)
@opt.output("Folder to make; it must not exist yet.")
@opt.options(HealConfig)
@pass_console
def heal(console: Console, checkpoint: Path, output: Path, **options: Any) -> None:
    """Win back what removal took from the exported model in CHECKPOINT; the result has the same tensors and shapes.

    Methods that train run in several processes, too: accelerate launch -m layerprune heal ...
    """
    from layerprune import api
    from layerprune.cli.healed import healed

    log = api.heal(checkpoint, output, progress=console.progress, **opt.given(options))
    if log is None:
        return  # one of several processes, and not the one that speaks
    for part in healed(log):
        console.print(part)
    console.print(f"written: {output}")
    console.print(f"next: layerprune audit {output} --tasks ...")
