"""``layerprune push``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from layerprune.cli import options as opt
from layerprune.cli.console import Console
from layerprune.cli.verb import Verb, pass_console
from layerprune.config import PushConfig
from layerprune.sizes import in_words


@click.command(
    cls=Verb,
    after_interrupt="run the same command again: files that have arrived are not sent twice",
    examples=[
        "layerprune push smaller/ me/smaller-model --dry-run",
        "layerprune push smaller/ me/smaller-model --private",
        "layerprune push smaller/ me/smaller-model --create-pr --base-model org/base",
    ],
)
@click.argument("folder", type=opt.FOLDER)
@click.argument("repo")
@opt.options(PushConfig)
@pass_console
def push(console: Console, folder: Path, repo: str, **options: Any) -> None:
    """Verify FOLDER and send weights, card, audit and report to REPO (owner/name) on the Hub.

    The token is the one that huggingface_hub finds (hf auth login, or HF_TOKEN).
    """
    from layerprune import api
    from layerprune.hub import REPLACED

    sent = api.push(folder, repo, progress=console.progress, **opt.given(options))
    if sent.url is None:
        for name, size in sent.files.items():
            console.print(f"{in_words(size):>9}  {name}")
        console.print(f"deleted from the repo, where it has others: {', '.join(REPLACED)}")
    where = f"pushed to {sent.repo}: {sent.url}" if sent.url else f"would go to {sent.repo}"
    console.print(f"{len(sent.files)} files, {in_words(sent.bytes)} {where}")
