"""``layerprune audit``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from layerprune.cli import options as opt
from layerprune.cli.console import Console
from layerprune.cli.verb import Verb, pass_console
from layerprune.errors import UsageError


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
@click.option(
    "--scores", type=opt.FILE, metavar="FILE", multiple=True, help="scores.json of another metric, to be shown beside."
)
@click.option("--text", type=opt.FILE, metavar="FILE", help="A .txt or .jsonl text for perplexity and KL, too.")
@click.option("--generation/--no-generation", default=None, help="Look at what both models write, too. Default: yes.")
@click.option("--speed/--no-speed", default=None, help="Time both models, too. Default: no.")
@click.option(
    "--layerwise/--no-layerwise",
    default=None,
    help="Ask the base without each removed layer alone, too, on up to 200 items a task. Default: yes.",
)
@pass_console
def audit(
    console: Console, folder: Path, compare: tuple[tuple[str, Path], ...], scores: tuple[Path, ...], **options: Any
) -> None:
    """Compare the exported model in FOLDER with its base on items that no earlier step has seen."""
    from layerprune.auditor import audit as examine
    from layerprune.cli.audited import audited
    from layerprune.documents import read_plan, read_scores

    labels = [label for label, _ in compare]
    for label in labels:
        if labels.count(label) > 1:
            raise UsageError(f"--compare names {label!r} twice; give each plan a label of its own")
    others, rankings = {label: read_plan(path) for label, path in compare}, [read_scores(path) for path in scores]
    found = examine(folder, **opt.given(options), compare=others, scores=rankings, progress=console.progress)
    for part in audited(found):
        console.print(part)
    console.print(f"written: {folder / 'layerprune' / 'audit.json'}, {folder / 'README.md'}, {folder / 'report.html'}")
