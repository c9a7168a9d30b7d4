"""``layerprune verify``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from layerprune.cli import options as opt
from layerprune.cli.console import Console
from layerprune.cli.verb import Verb, pass_console
from layerprune.config import VerifyConfig

WRONG = 1  # exit code when the folder is not what it says it is; 2 is kept for commands that could not be carried out


@click.command(
    cls=Verb,
    after_interrupt="nothing is ever written",
    examples=[
        "layerprune verify smaller/",
        "layerprune verify smaller/ --base /models/base --digests",
        "layerprune verify smaller/ --rerun 20 --include-path tasks/",
    ],
)
@click.argument("folder", type=opt.FOLDER)
@opt.options(VerifyConfig)
@click.option("--digests", is_flag=True, help="Print the sha256 of each document, to compare with the publisher's.")
@pass_console
def verify(console: Console, folder: Path, digests: bool, **options: Any) -> None:
    """Check that FOLDER is what export and audit left: every hash and figure; exit code 1 when something is wrong."""
    from layerprune import api
    from layerprune.cli.verified import verified

    told = opt.given(options)
    found = api.verify(folder, progress=console.progress, **told)
    for line in verified(folder, found, "rerun" in told, digests):
        console.print(line)
    if not found.ok:
        click.get_current_context().exit(WRONG)
