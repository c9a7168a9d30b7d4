"""A study's figures looked up by what they are about, and said as people say them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import sqrt

from layerprune.documents import Study
from layerprune.documents.study import (
    ALL_TASKS,
    MEAN,
    Agreed,
    Calibrated,
    Contrast,
    Estimate,
    Interval,
    Path,
    Point,
    Repeated,
)
from layerprune.report import words

SHOWN = (0.1, 0.25, 0.5, 0.75)  # shares of the stack whose counts the page's tables show; the files have all


@dataclass(frozen=True)
class Findings:
    """One study, asked questions."""

    study: Study

    @property
    def depth(self) -> int:
        return self.study.model.layers

    @property
    def audit_items(self) -> int:
        return sum(data.items for data in self.study.audit)

    @property
    def selection_items(self) -> int:
        return sum(data.items for data in self.study.selection)

    @cached_property
    def metrics(self) -> list[str]:
        """Every metric's spec, baselines last."""
        return [metric.spec for metric in self.study.metrics]

    @cached_property
    def losses(self) -> list[float]:
        """Share of the accuracy above chance that each unit's removal costs, mean over tasks."""
        columns = zip(*(lost.accuracy for lost in self.study.lost), strict=True)
        return [sum(values) / len(values) for values in columns]

    def agreed(self, metric: str, ends: bool = True, calibration: str = ALL_TASKS) -> Agreed:
        return next(
            one
            for one in self.study.agreement
            if (one.metric, one.calibration, one.task, one.ends) == (metric, calibration, MEAN, ends)
        )

    def reliability(self, signal: str) -> Repeated | None:
        """Return the repeatability of the mean's ranking; None where no task has that signal."""
        return next((one for one in self.study.reliability if (one.task, one.signal) == (MEAN, signal)), None)

    @property
    def ceiling(self) -> float | None:
        """Correlation that a perfect ranking could be expected to show with the measured one."""
        it = self.reliability("accuracy")
        return sqrt(it.whole) if it is not None and it.whole is not None and it.whole > 0 else None

    @cached_property
    def counts(self) -> list[int]:
        """Every number of removed layers at which accuracy was measured."""
        return sorted({point.count for path in self.study.paths for point in path.points})

    @property
    def shown_counts(self) -> list[int]:
        """The counts nearest to a tenth, a quarter, half and three quarters of the stack."""
        return sorted({self.nearest(share) for share in SHOWN})

    def nearest(self, share: float) -> int:
        return min(self.counts, key=lambda count: (abs(count - share * self.depth), count))

    def path(self, metric: str, search: str | None = None) -> Path:
        return next(p for p in self.study.paths if p.metric == metric and search in (None, p.search))

    def point(self, path: Path, count: int) -> Point | None:
        """Return a path's accuracy at a count; None where it has ended before."""
        return next((point for point in path.points if point.count == count), None)

    def contrast(self, path: Path, count: int) -> Contrast | None:
        """Return ablation's lead over a path; None for ablation itself and where either has ended."""
        wanted = (path.metric, path.search, count)
        return next((one for one in self.study.contrasts if (one.metric, one.search, one.count) == wanted), None)

    def calibrated(self, metric: str, calibration: str, count: int) -> Calibrated | None:
        wanted = (metric, calibration, count)
        return next((o for o in self.study.calibration if (o.metric, o.calibration, o.count) == wanted), None)


def name_of(path: Path) -> str:
    """Return a path's name: its metric, and its search where that is not the usual one."""
    return path.metric if path.search in ("one-shot", "blocks") else f"{path.metric}, {path.search}"


def estimate(given: Estimate) -> str:
    """Return ``0.31 (0.05 … 0.52)``, or what stands in the way."""
    if given.value is None or given.interval is None:
        return "one is constant"
    low, high = (decimal(end) for end in given.interval)
    return f"{decimal(given.value)} ({low} … {high})"


def decimal(value: float, digits: int = 2) -> str:
    """Return a number with a real minus sign."""
    text = f"{abs(value):.{digits}f}"
    return text if value >= 0 or float(text) == 0 else words.MINUS + text


def in_points(difference: float, interval: Interval) -> str:
    """Return ``−1.2 (−2.6 … +0.3)``, in points of accuracy."""
    return f"{words.points(difference)} ({words.points_interval(interval)})"


def told_apart(interval: Interval) -> int:
    """Return 1 or -1 for a difference whose interval lies on one side of zero, 0 for one that it does not."""
    return 1 if interval[0] > 0 else -1 if interval[1] < 0 else 0
