"""A subcommand of ``layerprune``: examples in its help, -v/-q, faults in one line."""

from __future__ import annotations

import traceback
from collections.abc import Iterable
from typing import Any

import click

from layerprune.cli.console import Console
from layerprune.cli.faults import INTERRUPTED, Fault, in_one_line
from layerprune.cli.quiet import quiet_libraries
from layerprune.errors import LayerpruneError, one_line

VERBOSITY = "layerprune.verbosity"

pass_console = click.make_pass_decorator(Console)


def _loudness(step: int) -> Any:
    def remember(ctx: click.Context, param: click.Parameter, count: int) -> None:
        ctx.meta[VERBOSITY] = ctx.meta.get(VERBOSITY, 0) + step * count

    return remember


class Verb(click.Command):
    """A click command with ``examples`` (whole command lines) and a word on how to go on after Ctrl-C."""

    def __init__(self, *args: Any, examples: Iterable[str], after_interrupt: str = "nothing was written", **kw: Any):
        super().__init__(*args, **kw)
        self.examples = tuple(examples)
        self.after_interrupt = after_interrupt
        self.params += [
            click.Option(
                ["-v", "--verbose"], count=True, expose_value=False, callback=_loudness(1),
                help="Show what libraries log; twice: also tracebacks.",
            ),
            click.Option(
                ["-q", "--quiet"], count=True, expose_value=False, callback=_loudness(-1),
                help="Show no progress, only results and errors.",
            ),
        ]  # fmt: skip

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        with in_one_line():
            return super().parse_args(ctx, args)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Examples"):
            for example in self.examples:
                formatter.write(f"{'':>{formatter.current_indent}}{example}\n")

    def invoke(self, ctx: click.Context) -> Any:
        verbosity = ctx.meta.get(VERBOSITY, 0)
        ctx.obj = Console(verbosity)
        try:
            with quiet_libraries(verbosity < 1):
                return super().invoke(ctx)
        except BrokenPipeError:
            raise  # `layerprune metrics | head`: click ends quietly
        except (LayerpruneError, OSError) as error:  # an OSError is the machine's fault or the path's: no traceback
            if verbosity > 1:
                traceback.print_exc()
            raise Fault(str(error) if isinstance(error, LayerpruneError) else one_line(error)) from error
        except KeyboardInterrupt:
            raise Fault(f"interrupted; {self.after_interrupt}", INTERRUPTED) from None
