"""``layerprune export``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from layerprune.cli import options as opt
from layerprune.cli.console import Console
from layerprune.cli.verb import Verb, pass_console
from layerprune.sizes import in_words, parse_size


@click.command(
    cls=Verb,
    after_interrupt="nothing was left behind; run the same command again",
    examples=[
        "layerprune export run/plan.json -o smaller/",
        "layerprune export run/plan.json --base /models/base -o smaller/ --max-shard-size 5GB",
    ],
)
@click.argument("plan", type=click.Path(path_type=Path))
@click.option("--base", metavar="MODEL", help="Where the base model is now. Default: where the plan found it.")
@click.option("--max-shard-size", metavar="SIZE", help="Largest weight file, such as 500MB. Default: 5GB.")
@opt.trust_remote_code
@opt.output("Folder to make; it must not exist yet.")
@pass_console
def export(console: Console, plan: Path, output: Path, max_shard_size: str | None, **options: Any) -> None:
    """Write the smaller model that PLAN (a plan.json, or the folder with it) describes, ready to be loaded."""
    from layerprune.documents import Plan, read_plan
    from layerprune.export import export as write

    read = read_plan(plan / Plan.filename if plan.is_dir() else plan)
    limit = None if max_shard_size is None else parse_size(max_shard_size, "--max-shard-size")
    receipt = write(read, output, max_shard_size=limit, progress=console.progress, **opt.given(options))
    console.print(
        f"{receipt.base.layers} layers, {in_words(receipt.bytes_before)} -> "
        f"{receipt.result.layers} layers, {in_words(receipt.bytes_after)}"
    )
    if receipt.proof is not None:
        console.print(f"checked: logits differ from the bypassed base by at most {receipt.proof.max_difference:.2g}")
    console.print(f"written: {output}")
    console.print(f"next: layerprune audit {output} --tasks ...")
