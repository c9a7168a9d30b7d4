"""``layerprune study``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from layerprune.cli import options as opt
from layerprune.cli.console import Console
from layerprune.cli.plan import CONTINUE, refuse_to_replace
from layerprune.cli.verb import Verb, pass_console
from layerprune.config import StudyConfig
from layerprune.lock import locked


@click.command(
    cls=Verb,
    after_interrupt=CONTINUE,
    examples=[
        "layerprune study MODEL --tasks arc_easy,hellaswag,piqa -o study/",
        "layerprune study MODEL --tasks arc_easy,piqa --limit 200 --text book.txt --greedy 25% -o study/",
    ],
)
@click.argument("model")
@opt.options(StudyConfig)
@opt.output("Folder that gets study.html, study.json, tables (CSV) and plots (SVG).")
@click.option("--force", is_flag=True, help="Replace a study that is already there.")
@pass_console
def study(console: Console, model: str, output: Path, force: bool, **options: Any) -> None:
    """Ask the paper's questions (arXiv:2605.14075) of MODEL: which metric knows which of its layers matter."""
    from layerprune import api
    from layerprune.analysis import verdict_of

    with locked(output, model):
        refuse_to_replace(output / "study.json", force)
        found = api.study(model, output, progress=console.progress, **opt.given(options))
    console.print(verdict_of(found))
    console.print(f"written: {output / 'study.html'}, {output / 'study.json'}")
