"""Every figure of a study as CSV, and the tables that study.html shows."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from layerprune import formatting
from layerprune.analysis.findings import Findings, decimal, estimate, in_points, name_of
from layerprune.artifacts import Study
from layerprune.artifacts.study import Calibrated, Estimate, RemovalPath

# Every figure of a study as CSV; study.html shows the main ones (``condensed``).


Cell = str | int | float | bool | None


@dataclass(frozen=True)
class Table:
    """Rows under a header."""

    name: str  # of the file
    header: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]

    def as_csv(self) -> str:
        """Return RFC 4180 text; what has no value is an empty field."""
        out = io.StringIO()
        writer = csv.writer(out)
        writer.writerow(self.header)
        writer.writerows(["" if cell is None else cell for cell in row] for row in self.rows)
        return out.getvalue()


def tables(study: Study) -> Iterator[Table]:
    """Yield all of a study's tables."""
    yield _layers(study)
    yield _agreement(study)
    yield _confusion(study)
    yield _overlap(study)
    yield _spread(study)
    yield _reliability(study)
    yield _paths(study)
    yield _contrasts(study)
    yield _calibration(study)


def label(units: Sequence[int]) -> str:
    """Return what is removed: ``3``, or ``3 and 4`` where layers go together."""
    return " and ".join(map(str, units))


def _layers(study: Study) -> Table:
    """What removing each layer alone costs, as a share of what is there to lose, and what each metric says."""
    header = ["layer"]
    columns: list[Sequence[Cell]] = [[label(unit) for unit in study.units]]
    for lost in study.lost:
        header.append(f"accuracy lost on {lost.task}")
        columns.append(lost.accuracy)
        if lost.probability is not None:
            header.append(f"gold probability lost on {lost.task}")
            columns.append(lost.probability)
    for ranking in study.rankings:
        header.append(f"{ranking.metric} by {ranking.calibration}")
        columns.append(ranking.scores)
    return Table("layers", tuple(header), tuple(zip(*columns, strict=True)))


def _agreement(study: Study) -> Table:
    """Agreement of each ranking with the accuracy lost on unseen items."""
    header = ("metric", "calibration", "task", "end layers", "layers", *_limits("spearman"), *_limits("kendall"),
              *_limits("pearson"), "spearman by chance", "misplaced", "misplaced by chance")  # fmt: skip
    rows = tuple(
        (one.metric, one.calibration, one.task, one.ends, one.units, *_parts(one.spearman), *_parts(one.kendall),
         *_parts(one.pearson), one.spearman_by_chance, one.misplaced, one.misplaced_by_chance)
        for one in study.agreement
    )  # fmt: skip
    return Table("agreement", header, rows)


def _confusion(study: Study) -> Table:
    """Rank confusion: where layers stand by accuracy lost and by a metric, share of tasks (zeros left out)."""
    rows = tuple(
        (one.metric, place, by_metric, share)
        for one in study.confusion
        for place, row in enumerate(one.matrix, 1)
        for by_metric, share in enumerate(row, 1)
        if share
    )
    return Table("confusion", ("metric", "rank by accuracy lost", "rank by metric", "share"), rows)


def _overlap(study: Study) -> Table:
    """How many of the k layers that cost least each metric finds."""
    rows = tuple((one.metric, one.count, one.shared, one.by_chance, *one.chance_interval) for one in study.shared)
    header = ("metric", "k", "shared", "by chance", "chance low", "chance high")
    return Table("overlap", header, rows)


def _spread(study: Study) -> Table:
    """Variance over tasks of z-scored relevance, on average and by layer."""
    header = ("metric", "mean variance", "from the draw of items", "Wilcoxon p", *(label(u) for u in study.units))
    rows = tuple((one.metric, one.mean, one.noise, one.wilcoxon_p, *one.variances) for one in study.spread)
    return Table("spread", header, rows)


def _reliability(study: Study) -> Table:
    """Split-half reliability of the ranking by what is lost."""
    header = ("task", "signal", "items", "between halves", "reliability", "items for 0.9")
    rows = tuple(
        (one.task, one.signal, one.items, one.halves, one.whole, one.items_needed) for one in study.reliability
    )
    return Table("reliability", header, rows)


def _paths(study: Study) -> Table:
    """Accuracy on unseen items along each choice, paired differences from intact."""
    tasks = tuple(data.task for data in study.audit)
    header = ("metric", "search", "removed", "layers", "accuracy", "difference", "low", "high", *tasks)
    rows = tuple(
        (path.metric, path.search, point.count, " / ".join(" ".join(map(str, r)) for r in point.removals),
         point.accuracy, point.difference, *point.interval, *(point.tasks[task] for task in tasks))
        for path in study.paths
        for point in path.points
    )  # fmt: skip
    return Table("paths", header, rows)


def _contrasts(study: Study) -> Table:
    """One-shot ablation against every other choice, on the same items."""
    header = ("metric", "search", "removed", "ablation is above by", "low", "high", "same layers")
    rows = tuple(
        (one.metric, one.search, one.count, one.difference, *one.interval, one.same) for one in study.contrasts
    )
    return Table("contrasts", header, rows)


def _calibration(study: Study) -> Table:
    """What each metric chooses after reading other data."""
    header = ("metric", "calibration", "removed", "accuracy", "from all tasks", "low", "high", "same layers")
    rows = tuple(
        (one.metric, one.calibration, one.count, one.accuracy, one.difference, *one.interval, one.same)
        for one in study.calibration
    )
    return Table("calibration", header, rows)


def _limits(name: str) -> tuple[str, str, str]:
    return name, f"{name} low", f"{name} high"


def _parts(estimate: Estimate) -> tuple[Cell, Cell, Cell]:
    low, high = estimate.interval or (None, None)
    return estimate.value, low, high


# The tables that the page shows: a study's figures with their intervals in one cell, at a few counts.


@dataclass(frozen=True)
class Shown:
    """A table as it is read: every cell is text."""

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


def reliability(it: Findings) -> Shown:
    """Show how well each task's ranking by what is lost repeats."""
    rows = [
        [
            one.task,
            "accuracy" if one.signal == "accuracy" else "gold probability",
            f"{one.items:,}",
            _maybe(one.halves),
            _maybe(one.whole),
            f"{one.items_needed:,}" if one.items_needed else "none named",
        ]
        for one in it.study.reliability
    ]
    caption = "Split-half reliability of the ranking of the layers by what each costs, 200 random splits"
    return Shown(caption, ["task", "lost", "items", "halves agree", "reliability", "items for 0.9"], rows)


def agreement(it: Findings) -> Shown:
    """Show each metric's correlations with the accuracy lost."""
    rows = []
    for metric in it.metrics:
        whole, inner = it.agreed(metric), it.agreed(metric, ends=False)
        rows.append(
            [
                metric,
                *map(estimate, (whole.spearman, whole.kendall, whole.pearson, inner.spearman)),
                formatting.percent(whole.misplaced),
            ]
        )
    caption = (
        "Correlation with the accuracy lost on unseen items, 95 % intervals; misplaced: share of rank "
        f"positions, by chance {formatting.percent(it.agreed(it.metrics[0]).misplaced_by_chance)}"
    )
    header = ["metric", "Spearman", "Kendall", "Pearson", "Spearman without the end layers", "misplaced"]
    return Shown(caption, header, rows)


def overlap(it: Findings) -> Shown:
    """Show how many of the layers that cost least each metric finds."""
    counts = sorted({one.count for one in it.study.shared})
    found = {(one.metric, one.count): one for one in it.study.shared}
    chance = [found[it.metrics[0], count] for count in counts]
    rows = [[metric, *(f"{found[metric, count].shared:.3g}" for count in counts)] for metric in it.metrics]
    by_chance = [f"{one.by_chance:.2g} ({one.chance_interval[0]:g} to {one.chance_interval[1]:g})" for one in chance]
    rows.append(["by chance", *by_chance])
    caption = "How many of the k layers that cost least are among the metric's k lowest (in expectation where they tie)"
    return Shown(caption, ["metric", *(f"k = {count}" for count in counts)], rows)


def spread(it: Findings) -> Shown:
    """Show how much relevance varies from task to task."""
    rows = [
        [
            one.metric,
            decimal(one.mean, 3),
            "" if one.noise is None else decimal(one.noise, 3),
            "" if one.wilcoxon_p is None else formatting.p_value(one.wilcoxon_p),
        ]
        for one in it.study.spread
    ]
    caption = "Variance over tasks of relevance z-scored over the layers; p: Wilcoxon's test against the accuracy drop"
    return Shown(caption, ["metric", "mean over layers", "from the draw of items", "p"], rows)


def paths(it: Findings) -> Shown:
    """Show accuracy and its difference from intact at a few counts."""
    counts = it.shown_counts
    rows = [[name_of(path), *(_point(it, path, count) for count in counts)] for path in it.study.paths]
    caption = "Accuracy on unseen items, mean of tasks in points, and its paired difference from the intact model"
    return Shown(caption, ["chosen by", *(f"{count} removed" for count in counts)], rows)


def lead(it: Findings) -> Shown:
    """Show how far one-shot ablation lies above every other choice."""
    counts = it.shown_counts
    rows = []
    for path in it.study.paths:
        found = [it.contrast(path, count) for count in counts]
        cells = ["" if c is None else _difference(c.difference, c.interval, c.same) for c in found]
        if any(cells):
            rows.append([name_of(path), *cells])
    caption = "One-shot ablation above the choice by so many points (95 % paired interval)"
    return Shown(caption, ["than", *(f"{count} removed" for count in counts)], rows)


def calibration(it: Findings) -> Shown:
    """Show each metric after reading its own task, all tasks, and text."""
    rows = []
    for metric, count in dict.fromkeys((one.metric, one.count) for one in it.study.calibration):
        own, everyone, text = (it.calibrated(metric, kind, count) for kind in ("own task", "all tasks", "text"))
        rows.append([metric, str(count), *map(_calibrated, (own, everyone, text))])
    caption = "Accuracy on unseen items in points, and its paired difference from all tasks"
    header = ["metric", "removed", "each task's own items", "all tasks' items", "plain text"]
    return Shown(caption, header, rows)


def counterexample(it: Findings) -> Shown:
    """Show the three layers of the counterexample."""
    shown = it.study.counterexample
    rows = [
        [str(layer), f"{score:.3g}", formatting.percent(left, 0)]
        for layer, (score, left) in enumerate(zip(shown.cosine, shown.accuracy_without, strict=True))
    ]
    caption = (
        f"The counterexample for ε = {shown.epsilon:g}; intact it answers {formatting.percent(shown.accuracy, 0)} right"
    )
    return Shown(caption, ["layer", "cosine score", "right without it"], rows)


def _point(it: Findings, path: RemovalPath, count: int) -> str:
    point = it.point(path, count)
    return (
        "" if point is None else f"{formatting.accuracy(point.accuracy)}; {in_points(point.difference, point.interval)}"
    )


def _calibrated(one: Calibrated | None) -> str:
    if one is None:
        return ""
    value = formatting.accuracy(one.accuracy)
    if one.calibration == "all tasks":
        return value
    return f"{value}; {_difference(one.difference, one.interval, one.same)}"


def _difference(difference: float, interval: tuple[float, float], same: bool) -> str:
    return "the same layers" if same else in_points(difference, interval)


def _maybe(value: float | None) -> str:
    return "all alike" if value is None else decimal(value)
