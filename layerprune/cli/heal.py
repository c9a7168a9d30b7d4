"""``layerprune heal``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from layerprune.cli import options as opt
from layerprune.cli.console import Console
from layerprune.cli.verb import Verb, pass_console

healing = opt.together(
    click.option("--method", metavar="SPEC", required=True, help="How to heal, see `layerprune healers`."),
    click.option(
        "--corpus",
        metavar="TEXT",
        help="A text, jsonl or parquet file or folder, a Hub dataset (owner/name:split), or builtin: a small text of "
        "this package.",
    ),
    click.option("--base", metavar="MODEL", help="Where the base model is now. Default: where export found it."),
    click.option(
        "--tasks",
        type=opt.Names(),
        help="Tasks whose items must not stand in the corpus. Default: those the plan was made with.",
    ),
    opt.sources,
    click.option(
        "--window",
        type=click.IntRange(min=2),
        metavar="N",
        help="Tokens of a window. Default: 512, or what the model reads.",
    ),
    click.option("--dtype", metavar="NAME", help="float32, bfloat16, float16 or auto. Default: auto."),
    click.option("--device", metavar="NAME", help="cpu, cuda, cuda:1 or auto. Default: auto."),
    click.option("--seed", type=click.IntRange(0), metavar="N", help="Seed of everything that is drawn. Default: 0."),
    opt.trust_remote_code,
)


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
@healing
@pass_console
def heal(console: Console, checkpoint: Path, output: Path, **options: Any) -> None:
    """Win back what removal took from the exported model in CHECKPOINT; the result has the same tensors and shapes.

    Methods that train run in several processes, too: accelerate launch -m layerprune heal ...
    """
    from layerprune.cli.healed import healed
    from layerprune.healing.step import HealRequest
    from layerprune.healing.step import heal as carry_out

    log = carry_out(HealRequest(checkpoint, **opt.given(options)), output, progress=console.progress)
    if log is None:
        return  # one of several processes, and not the one that speaks
    for part in healed(log):
        console.print(part)
    console.print(f"written: {output}")
    console.print(f"next: layerprune audit {output} --tasks ...")
