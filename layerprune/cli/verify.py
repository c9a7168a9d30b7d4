"""``layerprune verify``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from layerprune.cli import options as opt
from layerprune.cli.console import Console
from layerprune.cli.verb import Verb, pass_console

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
@click.option("--base", metavar="MODEL", help="Compare this base model's weights with the receipt, too.")
@click.option("--rerun", type=opt.POSITIVE, metavar="N", help="Ask both models N random items of the audit again.")
@click.option("--digests", is_flag=True, help="Print the sha256 of each document, to compare with the publisher's.")
@opt.sources
@click.option("--device", metavar="NAME", help="Where --rerun computes: cpu, cuda, cuda:1 or auto. Default: auto.")
@opt.trust_remote_code
@pass_console
def verify(
    console: Console, folder: Path, base: str | None, rerun: int | None, digests: bool, **options: Any
) -> None:
    """Check that FOLDER is what export and audit left: every hash and figure; exit code 1 when something is wrong."""
    from layerprune.auditor.verify import verify as look
    from layerprune.cli import verified

    verified.check(folder, rerun, opt.given(options))
    found = look(folder, base=base, progress=console.progress)
    repeated = None
    if rerun is not None and found.ok:
        repeated = verified.ask_again(folder, rerun, base, console.progress, **opt.given(options))
    for line in verified.verified(folder, found, repeated, rerun, digests):
        console.print(line)
    if not found.ok or (repeated and repeated.problems):
        click.get_current_context().exit(WRONG)
