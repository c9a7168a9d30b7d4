"""``layerprune push``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from layerprune.cli import options as opt
from layerprune.cli.console import Console
from layerprune.cli.verb import Verb, pass_console
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
@click.option("--private", is_flag=True, help="Make a repo that does not exist yet private.")
@click.option("--revision", metavar="BRANCH", help="Branch to push to, made where it is missing. Default: main.")
@click.option("--create-pr", is_flag=True, help="Open a pull request instead of committing.")
@click.option("--base-model", metavar="ID", help="Hub id of a base that was a local folder; its files must be equal.")
@click.option("--unnamed-base", is_flag=True, help="Publish the bare name of a base that was a local folder.")
@click.option("--dry-run", is_flag=True, help="Verify, and list what would go; nothing is sent.")
@click.option("--allow-unaudited", is_flag=True, help="Push a folder whose losses nobody has measured.")
@pass_console
def push(console: Console, folder: Path, repo: str, **options: Any) -> None:
    """Verify FOLDER and send weights, card, audit and report to REPO (owner/name) on the Hub.

    The token is the one that huggingface_hub finds (hf auth login, or HF_TOKEN).
    """
    from layerprune.cli.verified import check
    from layerprune.hub import REPLACED
    from layerprune.hub import push as send

    check(folder, None, {})
    sent = send(folder, repo, progress=console.progress, **opt.given(options))
    if sent.url is None:
        for name, size in sent.files.items():
            console.print(f"{in_words(size):>9}  {name}")
        console.print(f"deleted from the repo, where it has others: {', '.join(REPLACED)}")
    where = f"pushed to {sent.repo}: {sent.url}" if sent.url else f"would go to {sent.repo}"
    console.print(f"{len(sent.files)} files, {in_words(sent.bytes)} {where}")
