"""``layerprune export``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from layerprune.cli import options as opt
from layerprune.cli.console import Console
from layerprune.cli.verb import Verb, pass_console
from layerprune.config import ExportConfig
from layerprune.sizes import in_words


@click.command(
    cls=Verb,
    after_interrupt="nothing was left behind; run the same command again",
    examples=[
        "layerprune export run/plan.json -o smaller/",
        "layerprune export HuggingFaceTB/SmolLM2-135M --remove 21-24 -o smaller/",
        "layerprune export run/plan.json --base /models/base -o smaller/ --max-shard-size 5GB",
    ],
)
@click.argument("plan", metavar="PLAN|MODEL")
@opt.options(ExportConfig)
@opt.output("Folder to make; it must not exist yet.")
@pass_console
def export(console: Console, plan: str, output: Path, **options: Any) -> None:
    """Write the smaller model that PLAN (a plan.json, or the folder with it) describes, ready to be loaded.

    With --remove it is MODEL (a folder or a Hub id) without these layers: nothing is measured, and no plan is needed.
    """
    from layerprune import api

    receipt = api.export(plan, output, progress=console.progress, **opt.given(options))
    console.print(
        f"{receipt.base.layers} layers, {in_words(receipt.bytes_before)} -> "
        f"{receipt.result.layers} layers, {in_words(receipt.bytes_after)}"
    )
    if receipt.proof is not None:
        console.print(f"checked: logits differ from the bypassed base by at most {receipt.proof.max_difference:.2g}")
    console.print(f"written: {output}")
    console.print(f"next: layerprune audit {output} --tasks ...")
