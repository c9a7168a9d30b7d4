"""``layerprune study``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from layerprune.cli import options as opt
from layerprune.cli.console import Console
from layerprune.cli.plan import CONTINUE, refuse_to_replace
from layerprune.cli.verb import Verb, pass_console
from layerprune.lock import locked


class Counts(opt.Names):
    """Numbers of layers, separated by commas."""

    name = "N,N"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        names = super().convert(value, param, ctx)
        if not all(str(name).isdecimal() and int(name) for name in names):
            self.fail(f"{value!r} is not a list of numbers of at least 1; write 3,6,8", param, ctx)
        return tuple(int(name) for name in names)


@click.command(
    cls=Verb,
    after_interrupt=CONTINUE,
    examples=[
        "layerprune study MODEL --tasks arc_easy,hellaswag,piqa -o study/",
        "layerprune study MODEL --tasks arc_easy,piqa --limit 200 --text book.txt --greedy 25% -o study/",
    ],
)
@click.argument("model")
@click.option("--tasks", type=opt.Names(), required=True, help="lm-eval tasks and groups that supply the items.")
@click.option(
    "--metric", "metrics", multiple=True, metavar="SPEC",
    help="A metric to study; may be repeated, with ablation among them. Default: eight; see `layerprune metrics`.",
)  # fmt: skip
@click.option(
    "--limit", type=opt.POSITIVE, metavar="N", help="Items of each task that metrics and searches see. Default: 1000."
)
@click.option(
    "--audit-limit", type=opt.POSITIVE, metavar="N", help="Other items that accuracy is measured on. Default: 1000."
)
@click.option("--text", type=opt.FILE, metavar="FILE", help="A .txt or .jsonl text for metrics to read, too.")
@click.option("--counts", type=Counts(), help="Layers removed where accuracy is measured. Default: ten up to 75 %.")
@click.option("--greedy", metavar="N|N%", help="Also follow greedy ablation so far; as many rounds.")
@opt.items
@opt.machine
@opt.revision
@click.option("--protect", metavar="LAYERS", help="Layers never to remove: 0-3,-1 (negative: from the end).")
@opt.output("Folder that gets study.html, study.json, tables (CSV) and plots (SVG).")
@click.option("--force", is_flag=True, help="Replace a study that is already there.")
@pass_console
def study(console: Console, model: str, output: Path, force: bool, **options: Any) -> None:
    """Ask the paper's questions (arXiv:2605.14075) of MODEL: which metric knows which of its layers matter."""
    from layerprune.cli.studied import studied

    with locked(output, model):
        refuse_to_replace(output / "study.json", force)
        verdict, paths = studied(model, output, console.progress, options)
    console.print(verdict)
    console.print(f"written: {', '.join(map(str, paths))}")
