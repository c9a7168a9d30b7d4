"""``layerprune audit``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from layerprune.cli import options as opt
from layerprune.cli.console import Console
from layerprune.cli.verb import Verb, pass_console
from layerprune.config import AuditConfig


@click.command(
    cls=Verb,
    after_interrupt="the folder is as it was; run the same command again",
    examples=[
        "layerprune audit smaller/ --tasks arc_easy,hellaswag",
        "layerprune audit smaller/ --tasks arc_easy --compare cosine=cosine/plan.json",
    ],
)
@click.argument("folder", type=opt.FOLDER)
@opt.options(AuditConfig)
@pass_console
def audit(console: Console, folder: Path, **options: Any) -> None:
    """Compare the exported model in FOLDER with its base on items that no earlier step has seen."""
    from layerprune import api
    from layerprune.cli.audited import audited

    found = api.audit(folder, progress=console.progress, **opt.given(options))
    for part in audited(found):
        console.print(part)
    console.print(f"written: {folder / 'layerprune' / 'audit.json'}, {folder / 'README.md'}, {folder / 'report.html'}")
