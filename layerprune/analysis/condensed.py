"""The tables that the page shows: a study's figures with their intervals in one cell, at a few counts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from layerprune.analysis.findings import Findings, decimal, estimate, in_points, name_of
from layerprune.documents.study import Calibrated, Path
from layerprune.report import words


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
                words.percent(whole.misplaced),
            ]
        )
    caption = (
        "Correlation with the accuracy lost on unseen items, 95 % intervals; misplaced: share of rank "
        f"positions, by chance {words.percent(it.agreed(it.metrics[0]).misplaced_by_chance)}"
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
            "" if one.wilcoxon_p is None else words.p_value(one.wilcoxon_p),
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
        [str(layer), f"{score:.3g}", words.percent(left, 0)]
        for layer, (score, left) in enumerate(zip(shown.cosine, shown.accuracy_without, strict=True))
    ]
    caption = (
        f"The counterexample for ε = {shown.epsilon:g}; intact it answers {words.percent(shown.accuracy, 0)} right"
    )
    return Shown(caption, ["layer", "cosine score", "right without it"], rows)


def _point(it: Findings, path: Path, count: int) -> str:
    point = it.point(path, count)
    return "" if point is None else f"{words.accuracy(point.accuracy)}; {in_points(point.difference, point.interval)}"


def _calibrated(one: Calibrated | None) -> str:
    if one is None:
        return ""
    value = words.accuracy(one.accuracy)
    if one.calibration == "all tasks":
        return value
    return f"{value}; {_difference(one.difference, one.interval, one.same)}"


def _difference(difference: float, interval: tuple[float, float], same: bool) -> str:
    return "the same layers" if same else in_points(difference, interval)


def _maybe(value: float | None) -> str:
    return "all alike" if value is None else decimal(value)
