"""Where commands print: results and tables on stdout, progress and remarks on stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TextIO

from layerprune.formatting import printable
from layerprune.util import SILENT, Advance, Progress

if TYPE_CHECKING:
    from rich.progress import Progress as Bars
    from rich.table import Table

    from layerprune.artifacts import Units


PLAIN_WIDTH = 200  # columns of a table that goes to a file or a pipe: nothing is cut off
PLAIN_EVERY = 10.0  # seconds between two lines of progress in a log file


class Console:
    """One command's output; ``verbosity`` is -1 for -q, 1 for -v, 2 for -vv."""

    def __init__(self, verbosity: int = 0) -> None:
        self.progress: Progress = SILENT  # bars on a terminal, a line now and then in a log, nothing with -q
        if verbosity >= 0:
            self.progress = BarProgress() if sys.stderr.isatty() else PlainProgress(sys.stderr)

    def print(self, *what: Any) -> None:
        """Print results: text as it is, tables without cutting figures off, on however narrow a terminal."""
        from rich.console import Console as Screen

        screen = Screen(width=None if sys.stdout.isatty() else PLAIN_WIDTH, highlight=False, markup=False)
        shown = [printable(part, lines=True) if isinstance(part, str) else part for part in what]
        screen.width = max([screen.width, *map(_needed_width, shown)])
        screen.print(*shown, soft_wrap=True)


def _needed_width(what: Any) -> int:
    """Return the columns a table needs whose cells may not wrap; 0 for everything that can adapt."""
    from rich.console import Console as Screen
    from rich.measure import Measurement
    from rich.table import Table

    if not isinstance(what, Table) or not all(column.no_wrap for column in what.columns):
        return 0
    wide = Screen(width=10_000)
    return Measurement.get(wide, wide.options, what).maximum


def table(
    title: str,
    *columns: str,
    numbers: Iterable[str] = (),
    wrapped: Iterable[str] = (),
    rows: Iterable[Iterable[str]] = (),
) -> Table:
    """Return a table; columns in ``numbers`` are flush right, those in ``wrapped`` may take several lines."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    flush, long = set(numbers), set(wrapped)
    made = Table(title=printable(title), title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        made.add_column(column, justify="right" if column in flush else "left", no_wrap=column not in long)
    for row in rows:
        made.add_row(*map(printable, row))
    return made


def names(units: Units) -> str:
    """Return units as people write them: ``3, 4``."""
    return ", ".join(str(unit) for unit in units)


class PlainProgress:
    """Progress for log files and pipes: one line every ten seconds, and one when a long or outermost task ends."""

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic, every: float = PLAIN_EVERY) -> None:
        self.stream, self.clock, self.every = stream, clock, every
        self._open = 0
        self._spoken = clock()

    @contextmanager
    def task(self, description: str, total: float | None, unit: str = "") -> Iterator[Advance]:
        start, done = self.clock(), 0.0

        def advance(amount: float = 1) -> None:
            nonlocal done
            done += amount
            if self.clock() - self._spoken >= self.every:
                self.note(f"{description}: {state(done, total, self.clock() - start, unit)}")

        self._open += 1
        try:
            yield advance
        finally:
            self._open -= 1
        took = self.clock() - start
        if self._open == 0 or took >= self.every:
            what = amount_done(done, total, unit) if done or total else "done"
            self.note(f"{description}: {what} in {duration(took)}")

    def note(self, message: str) -> None:
        self._spoken = self.clock()
        print(printable(message, lines=True), file=self.stream, flush=True)


class BarProgress:
    """Progress bars on a terminal; bars of inner tasks go away when they end."""

    def __init__(self) -> None:
        self._bars: Bars | None = None

    @contextmanager
    def task(self, description: str, total: float | None, unit: str = "") -> Iterator[Advance]:
        outermost = self._bars is None
        bars = self._bars or _bars()
        if outermost:
            self._bars = bars
            bars.start()
        shown = bars.add_task(description, total=total, unit=unit)
        try:
            yield lambda amount=1: bars.advance(shown, amount)
        finally:
            if outermost:
                bars.stop()
                self._bars = None
            else:
                bars.remove_task(shown)

    def note(self, message: str) -> None:
        if self._bars is not None:
            self._bars.console.print(printable(message, lines=True), markup=False, highlight=False)
        else:
            print(printable(message, lines=True), file=sys.stderr, flush=True)


def _bars() -> Bars:
    from rich import progress
    from rich.console import Console as Screen
    from rich.text import Text

    class State(progress.ProgressColumn):
        """Done, rate and time left in the words that logs have too."""

        def render(self, task: progress.Task) -> Text:
            return Text(state(task.completed, task.total, task.elapsed or 0.0, task.fields["unit"]))

    described = progress.TextColumn("{task.description}", markup=False)
    return progress.Progress(described, progress.BarColumn(bar_width=24), State(), console=Screen(stderr=True))


def state(done: float, total: float | None, seconds: float, unit: str) -> str:
    """Return ``12/30 layers, 40 %, 1.3 layers/s, 14 s left``; the time left assumes the mean rate so far."""
    parts = [amount_done(done, total, unit)]
    if total:
        parts.append(f"{100 * done / total:.0f} %")
    if done > 0 and seconds > 0:
        rate = done / seconds
        parts.append(f"{number(rate)} {unit}/s".replace(" /", "/") if rate >= 0.1 else f"{duration(1 / rate)} each")
        if total and done < total:
            parts.append(f"{duration((total - done) / rate)} left")
    return ", ".join(parts)


def amount_done(done: float, total: float | None, unit: str) -> str:
    """Return ``12/30 layers``."""
    return f"{number(done)}{'' if total is None else '/' + number(total)} {unit}".rstrip()


def number(value: float) -> str:
    """Return a short figure: ``0.25``, ``12``, ``31,400``, ``4.2 M``."""
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if value >= size:
            return f"{value / size:.1f} {letter}"
    if value >= 10 or value == int(value):
        return f"{value:,.0f}"
    return f"{value:.2g}"


def duration(seconds: float) -> str:
    """Return ``0.4 s``, ``14 s``, ``3 min 20 s``, ``2 h 5 min``."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
