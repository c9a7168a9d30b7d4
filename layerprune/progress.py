"""How long work tells whoever waits for it where it is; the command line shows it, a library user may ignore it."""

from __future__ import annotations

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
