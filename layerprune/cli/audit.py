"""``layerprune audit``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from layerprune.cli import options as opt
from layerprune.cli.console import Console
from layerprune.cli.verb import Verb, pass_console


@click.command(
    cls=Verb,
    after_interrupt="the folder is as it was; run the same command again",
    examples=[
        "layerprune audit smaller/ --tasks arc_easy,hellaswag",
        "layerprune audit smaller/ --tasks arc_easy --compare cosine=cosine/plan.json",
    ],
)
@click.argument("folder", type=opt.FOLDER)
@click.option("--tasks", type=opt.Names(), help="lm-eval tasks and groups. Default: those the plan was made with.")
@opt.limit("all")
@opt.items
@opt.machine
@click.option("--base", metavar="MODEL", help="Where the base model is now. Default: where export found it.")
@click.option(
    "--compare", type=opt.Labelled(), multiple=True, help="Another plan for the same base, run on the same items too."
)
@pass_console
def audit(console: Console, folder: Path, compare: tuple[tuple[str, Path], ...], **options: Any) -> None:
    """Compare the exported model in FOLDER with its base on items that no earlier step has seen."""
    from layerprune.audit import audit as examine
    from layerprune.cli import tables
    from layerprune.documents import Plan

    others = {label: Plan.load(path) for label, path in compare}
    found = examine(folder, **opt.given(options), compare=others, progress=console.progress)
    console.print(tables.audited(found))
    console.print(found.verdict)
    console.print(f"written: {folder / 'layerprune' / 'audit.json'}, {folder / 'README.md'}")
