"""How a fault reaches whoever typed the command: one line on stderr, exit code 2; 130 after Ctrl-C."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any

import click

FAULT, INTERRUPTED = 2, 130


class Fault(click.ClickException):
    """Ends the command with its message after ``layerprune:``."""

    exit_code = FAULT

    def __init__(self, message: str, exit_code: int = FAULT) -> None:
        super().__init__(message)
        self.exit_code = exit_code

    def show(self, file: IO[Any] | None = None) -> None:
        click.echo(f"layerprune: {self.message}", file=file, err=file is None)


@contextmanager
def in_one_line() -> Iterator[None]:
    """Turn click's three-line usage errors into one line that names the help page."""
    try:
        yield
    except click.exceptions.NoArgsIsHelpError:
        raise
    except click.UsageError as error:
        page = f" (see {error.ctx.command_path} --help)" if error.ctx else ""
        raise Fault(" ".join(error.format_message().split()) + page) from error
