"""A study's figures looked up by what they are about, and what it found, in sentences with numbers."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import sqrt

from layerprune import formatting
from layerprune.analysis.agreement import ACCURACY_DROP
from layerprune.artifacts import Study
from layerprune.artifacts.base import Interval
from layerprune.artifacts.study import (
    ALL_TASKS,
    MEAN,
    TEXT,
    Agreed,
    Calibrated,
    Contrast,
    Estimate,
    PathPoint,
    RemovalPath,
    SplitHalf,
    Spread,
)

# A study's figures looked up by what they are about, and said as people say them.


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

    def reliability(self, signal: str) -> SplitHalf | None:
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

    def path(self, metric: str, search: str | None = None) -> RemovalPath:
        return next(p for p in self.study.paths if p.metric == metric and search in (None, p.search))

    def point(self, path: RemovalPath, count: int) -> PathPoint | None:
        """Return a path's accuracy at a count; None where it has ended before."""
        return next((point for point in path.points if point.count == count), None)

    def contrast(self, path: RemovalPath, count: int) -> Contrast | None:
        """Return ablation's lead over a path; None for ablation itself and where either has ended."""
        wanted = (path.metric, path.search, count)
        return next((one for one in self.study.contrasts if (one.metric, one.search, one.count) == wanted), None)

    def calibrated(self, metric: str, calibration: str, count: int) -> Calibrated | None:
        wanted = (metric, calibration, count)
        return next((o for o in self.study.calibration if (o.metric, o.calibration, o.count) == wanted), None)


def name_of(path: RemovalPath) -> str:
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
    return text if value >= 0 or float(text) == 0 else formatting.MINUS + text


def in_points(difference: float, interval: Interval) -> str:
    """Return ``−1.2 (−2.6 … +0.3)``, in points of accuracy."""
    return f"{formatting.points(difference)} ({formatting.points_interval(interval)})"


def told_apart(interval: Interval) -> int:
    """Return 1 or -1 for a difference whose interval lies on one side of zero, 0 for one that it does not."""
    return 1 if interval[0] > 0 else -1 if interval[1] < 0 else 0


# What a study found, in sentences with numbers.


RIVALS = ("cosine", "perplexity", "angular")  # the metrics most in use; the summary names the first that was studied
SIGNIFICANT = 0.05


def verdict(it: Findings) -> str:
    """Return the study in one paragraph."""
    rival = next((name for name in RIVALS if name in it.metrics), None)
    ranking = (
        f"Ranked by ablation on {it.selection_items:,} items, the layers agree with the accuracy really lost on "
        f"{it.audit_items:,} other items at Spearman {estimate(it.agreed('ablation').spearman)}"
    )
    against = "" if rival is None else f"; ranked by {rival}, at {estimate(it.agreed(rival).spearman)}"
    parts = [f"{ranking}{against}."]
    reliability = it.reliability("accuracy")
    if reliability is not None and reliability.whole is not None:
        parts.append(
            f"Measured on other items again, accuracy lost would agree with itself at {_two(reliability.whole)}."
        )
    if rival is not None:
        parts += _duel(it, rival)
    return " ".join(parts)


def _duel(it: Findings, rival: str) -> list[str]:
    """Say what ablation and its rival keep with a quarter of the layers gone; nothing where a path ended before."""
    count = it.nearest(0.25)
    kept = [it.point(it.path(metric), count) for metric in ("ablation", rival)]
    contrast = it.contrast(it.path(rival), count)
    if contrast is None or kept[0] is None or kept[1] is None:
        return []
    ours, theirs = (formatting.accuracy(point.accuracy) for point in kept if point is not None)
    said = f"With {count} of {it.depth} layers removed in one shot, ablation's choice keeps {ours} points of accuracy"
    if contrast.same:
        return [f"{said}; {rival} chooses the same layers."]
    lead = f"{said} and {rival}'s {theirs}: {in_points(contrast.difference, contrast.interval)} points"
    return [f"{lead}, {('not told apart on these items', 'better', 'worse')[told_apart(contrast.interval)]}."]


def on_reliability(it: Findings) -> list[str]:
    """Say how far the reference itself can be trusted."""
    found = []
    for signal, name in (("accuracy", "accuracy lost"), ("probability", "probability of the right answer lost")):
        one = it.reliability(signal)
        if one is None:
            continue
        if one.whole is None or one.halves is None:
            found.append(f"By {name}, no half of the items ranks the layers: all lose the same.")
            continue
        needed = f"{one.items_needed:,} items would give 0.9" if one.items_needed else "no number of items gives 0.9"
        found.append(
            f"By {name}, two random halves of the audit items rank the layers alike at Spearman {_two(one.halves)}. "
            f"All {one.items:,} items then have a reliability of {_two(one.whole)} (Spearman-Brown); {needed}."
        )
    if it.ceiling is not None:
        found.append(
            "A ranking without any error could be expected to correlate with the accuracy lost as measured here at "
            f"about {_two(it.ceiling)}, not at 1. Read every correlation below against that."
        )
    return found


def on_agreement(it: Findings) -> list[str]:
    """Say which metrics rank as accuracy does."""
    first = it.agreed(it.metrics[0])
    limit = first.spearman_by_chance
    clear = [metric for metric in it.metrics if (it.agreed(metric).spearman.interval or (-1, -1))[0] > limit]
    above = (
        f"{formatting.listed(clear)} lie above that with their whole interval" if clear else "no metric lies above that"
    )
    rows = {one.metric: one for one in it.study.confusion}
    named = [metric for metric in ("ablation", *RIVALS, "random") if metric in rows]
    misplaced = formatting.listed([f"{formatting.percent(rows[metric].misplaced)} by {metric}" for metric in named])
    return [
        "Each metric scored the layers on the selection items. Accuracy lost was measured on the audit items, one "
        f"layer removed at a time, and averaged over the tasks. 95 % of unrelated rankings of {first.units} layers "
        f"correlate within ±{_two(limit)}; {above}.",
        f"Rank positions that hold another layer than by accuracy lost, mean over the tasks: {misplaced}. A random "
        f"ranking misplaces {formatting.percent(rows[named[0]].by_chance)}, so a high share says little by itself (the "
        "paper reports 93.8 % for cosine, where chance is 96.7 %).",
    ]


def on_spread(it: Findings) -> list[str]:
    """Say whether a layer's worth depends on the task."""
    if not it.study.spread:
        return ["With a single task there is nothing to compare; give several with --tasks."]
    drop = next(one for one in it.study.spread if one.metric == ACCURACY_DROP)
    noise = drop.noise or 0.0
    return [
        "The accuracy lost, z-scored over the layers of each task, has a variance over the tasks of "
        f"{decimal(drop.mean, 3)} a layer on average. The draw of items alone would give about {decimal(noise, 3)}; "
        "only what is above that can be the tasks'. Ablation on the selection items has that noise too, and more of it "
        "the fewer the items; metrics that only read text have hardly any.",
        _lower(it, drop),
    ]


def _lower(it: Findings, drop: Spread) -> str:
    test = "by Wilcoxon's signed-rank test over the layers"
    found = [
        f"{one.metric} ({decimal(one.mean, 3)}, p = {formatting.p_value(one.wilcoxon_p)})"
        for one in it.study.spread
        if one.wilcoxon_p is not None and one.wilcoxon_p < SIGNIFICANT and one.mean < drop.mean
    ]
    return f"Less variable than the accuracy lost {test}: {formatting.listed(found) if found else 'none'}."


def on_paths(it: Findings) -> list[str]:
    """Say what is left when layers go, by each choice."""
    count = it.nearest(0.25)
    sides: dict[int, list[str]] = {1: [], -1: [], 0: []}
    for path in it.study.paths:
        contrast = it.contrast(path, count)
        if contrast is not None:
            sides[0 if contrast.same else told_apart(contrast.interval)].append(name_of(path))
    clauses = [
        f"{verb} {formatting.listed(sides[side])}"
        for side, verb in ((1, "keeps more than"), (-1, "keeps less than"), (0, "is not told apart from"))
        if sides[side]
    ]
    ended = [f"The path of {name_of(path)} ends early: {path.remark}" for path in it.study.paths if path.remark]
    return [
        "Every choice was made on the selection items, and all answer the same audit items with the layers bypassed. "
        "One-shot paths are nested: layers go in the order of their scores; angular takes the best block of each size.",
        f"With {count} of {it.depth} layers removed, one-shot ablation {formatting.listed(clauses)}.",
        *ended,
    ]


def on_calibration(it: Findings) -> list[str]:
    """Say whether it matters what a metric reads."""
    clear = [one for one in it.study.calibration if not one.same and told_apart(one.interval)]
    said = [
        f"{one.metric} on {'plain text' if one.calibration == TEXT else 'each task alone'}, {one.count} removed: "
        f"{in_points(one.difference, one.interval)}"
        for one in clear
    ]
    text = it.study.text
    return [
        "The same metric, one-shot, after reading or answering each task's own selection items (every task is then "
        "answered without its own layers), those of all tasks together, or plain text.",
        f"Told apart from all tasks together, in points: {'; '.join(said) if said else 'none, on these items'}.",
        "No plain text was given (--text FILE), so that calibration was not looked at."
        if text is None
        else f"The text: {text.windows} windows, {text.tokens:,} tokens of {text.source}. Ablation answers questions "
        "and has no text form; the nearest is perplexity.",
    ]


def on_counterexample(it: Findings) -> list[str]:
    """Say what the counterexample shows."""
    shown = it.study.counterexample
    return [
        "For any ε there is a decoder whose middle layer has cosine score ε, the lowest of all, and decides everything "
        "(the paper's theorem). Here it is, measured, as a real three-layer Llama: "
        f"layerprune.analysis.counterexample.counterexample({shown.epsilon:g}). Intact it answers "
        f"{formatting.percent(shown.accuracy, 0)} of its items right; without the layer that cosine would remove "
        f"first, {formatting.percent(shown.accuracy_without[1], 0)}."
    ]


def _two(value: float) -> str:
    return decimal(value)
