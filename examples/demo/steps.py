"""One estimate over many steps: what is done inside a step moves the whole forward by the step's weight."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import Self

from layerprune.util import Advance, Progress


class Steps:
    """Named steps with weights (their expected shares of the time); a context, within which each is taken once."""

    def __init__(self, progress: Progress, weights: Mapping[str, float]) -> None:
        self.progress, self.weights = progress, dict(weights)
        self._stack = ExitStack()
        self._advance: Advance = _nowhere

    def __enter__(self) -> Self:
        total = sum(self.weights.values())
        self._advance = self._stack.enter_context(self.progress.task("the whole demonstration", total, "parts"))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        return self._stack.__exit__(kind, error, trace)

    @contextmanager
    def take(self, name: str, *, tasks: int) -> Iterator[Progress]:
        """Yield a progress for one step, of which about ``tasks`` pieces of work are expected.

        Each piece moves the whole by its share of the step, never by more than is left of it; what is left at the end
        (fewer pieces than expected, a cached result) is added then.
        """
        inner = _Step(self.progress, self._advance, self.weights[name], self.weights[name] / tasks)
        yield inner
        inner.move(inner.left)


class _Step:
    """A progress that passes on what it is told, and moves the whole."""

    def __init__(self, progress: Progress, whole: Advance, left: float, share: float) -> None:
        self.progress, self.whole, self.left, self.share = progress, whole, left, share

    def move(self, amount: float) -> None:
        step = min(amount, self.left)
        self.left -= step
        self.whole(step)

    def note(self, message: str) -> None:
        self.progress.note(message)

    @contextmanager
    def task(self, description: str, total: float | None, unit: str = "") -> Iterator[Advance]:
        with self.progress.task(description, total, unit) as advance:

            def both(amount: float = 1) -> None:
                advance(amount)
                if total:
                    self.move(self.share * amount / total)

            yield both


def _nowhere(amount: float = 1) -> None:
    raise RuntimeError("the steps are taken inside `with steps:`")
