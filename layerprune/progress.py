"""How long work tells whoever waits for it where it is; the command line shows it, a library user may ignore it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Advance(Protocol):
    """Called with the amount of work that was just finished, in the unit of the task's total."""

    def __call__(self, amount: float = 1) -> None: ...


class Progress(Protocol):
    """Shows named pieces of work, each with a total, and remarks between them."""

    def task(self, description: str, total: float | None, unit: str = "") -> AbstractContextManager[Advance]: ...

    def note(self, message: str) -> None: ...


class Silent:
    """A progress that shows nothing: the default for library use."""

    @contextmanager
    def task(self, description: str, total: float | None, unit: str = "") -> Iterator[Advance]:
        def advance(amount: float = 1) -> None:
            return None

        yield advance

    def note(self, message: str) -> None:
        return None


SILENT = Silent()


class Bars:
    """Bars of tqdm: on a terminal and in a notebook. Bars of inner tasks go away when they end."""

    def __init__(self) -> None:
        self._open = 0

    @contextmanager
    def task(self, description: str, total: float | None, unit: str = "") -> Iterator[Advance]:
        from tqdm.auto import tqdm

        bar = tqdm(total=total, desc=description, unit=f" {unit}" if unit else "", leave=self._open == 0)
        self._open += 1

        def advance(amount: float = 1) -> None:
            bar.update(amount)

        try:
            yield advance
        finally:
            self._open -= 1
            bar.close()

    def note(self, message: str) -> None:
        from tqdm.auto import tqdm

        tqdm.write(message, file=sys.stderr)
