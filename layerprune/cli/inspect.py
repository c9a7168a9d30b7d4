"""``layerprune inspect``."""

from __future__ import annotations

from typing import Any

import click

from layerprune.cli import options as opt
from layerprune.cli.console import Console
from layerprune.cli.verb import Verb, pass_console


@click.command(
    cls=Verb,
    examples=[
        "layerprune inspect HuggingFaceTB/SmolLM2-135M-Instruct",
        "layerprune inspect /models/my-llama --quiet",
        "layerprune inspect --zoo --types llama,gemma3_text",
    ],
)
@click.argument("model", required=False)
@click.option("--zoo", is_flag=True, help="Instead of MODEL, try tiny models of every type there is; takes minutes.")
@click.option("--types", type=opt.Names(), help="With --zoo: only these model types.")
@opt.revision
@opt.trust_remote_code
@pass_console
def inspect(console: Console, model: str | None, zoo: bool, types: tuple[str, ...] | None, **options: Any) -> None:
    """Show the decoder stack of MODEL (a folder or a Hub id) and what can be removed from it; loads no weights.

    With --zoo, export is tried on a tiny random model of each causal-LM type of the installed transformers, and the
    verdicts are printed as the Markdown of docs/ZOO.md; exit code 1 when a type comes out wrong.
    """
    from layerprune.cli import inspected

    inspected.check(model, zoo, types, opt.given(options))
    if model is None:
        verdicts = inspected.verdicts(types, console.progress)
        console.print(inspected.page(verdicts))
        click.get_current_context().exit(any(verdict.kind == "wrong" for verdict in verdicts))
    for part in inspected.inspected(model, **opt.given(options)):
        console.print(part)
