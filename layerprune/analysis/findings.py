"""What a study found, question by question: in sentences with numbers, and in the tables that its page shows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import sqrt
from typing import Any

from layerprune import formatting
from layerprune.analysis.agreement import ACCURACY_DROP
from layerprune.artifacts import Study
from layerprune.artifacts import study as documents
from layerprune.artifacts.base import Interval
from layerprune.artifacts.study import ALL_TASKS, MEAN, TEXT, Calibrated, Confusion, Contrast, PathPoint, RemovalPath

# A study's figures looked up by what they are about, and said as people say them.


SHOWN = (0.1, 0.25, 0.5, 0.75)  # shares of the stack whose counts the page's tables show; the files have all


@dataclass(frozen=True)
class Findings:
    """One study, asked questions."""

    study: Study

    @property
    def depth(self) -> int:
        return self.study.model.layers

    @cached_property
    def metrics(self) -> list[str]:
        """Every metric's spec, baselines last."""
        return [metric.spec for metric in self.study.metrics]

    @cached_property
    def losses(self) -> list[float]:
        """Share of the accuracy above chance that each unit's removal costs, mean over tasks."""
        columns = zip(*(lost.accuracy for lost in self.study.lost), strict=True)
        return [sum(values) / len(values) for values in columns]

    @cached_property
    def confusion(self) -> dict[str, Confusion]:
        """Where units stand by accuracy lost and by each metric."""
        return {one.metric: one for one in self.study.confusion}

    def agreement(self, metric: str, ends: bool = True) -> documents.Agreed:
        """Return how far a metric's ranking agrees with the accuracy lost, mean over tasks."""
        return _first(self.study.agreement, metric=metric, calibration=ALL_TASKS, task=MEAN, ends=ends)

    def reliability(self, signal: str) -> documents.SplitHalf | None:
        """Return the repeatability of the mean's ranking; None where no task has that signal."""
        return _first(self.study.reliability, task=MEAN, signal=signal)

    @property
    def ceiling(self) -> float | None:
        """Correlation that a perfect ranking could be expected to show with the measured one."""
        it = self.reliability("accuracy")
        return sqrt(it.whole) if it is not None and it.whole is not None and it.whole > 0 else None

    @cached_property
    def counts(self) -> list[int]:
        """Every number of removed layers at which accuracy was measured."""
        return sorted({point.count for path in self.study.paths for point in path.points})

    def nearest(self, share: float) -> int:
        return min(self.counts, key=lambda count: (abs(count - share * self.depth), count))

    def point(self, path: RemovalPath, count: int) -> PathPoint | None:
        """Return a path's accuracy at a count; None where it has ended before."""
        return _first(path.points, count=count)

    def contrast(self, path: RemovalPath, count: int) -> Contrast | None:
        """Return ablation's lead over a path; None for ablation itself and where either has ended."""
        return _first(self.study.contrasts, metric=path.metric, search=path.search, count=count)


def _first(rows: Iterable[Any], **wanted: object) -> Any:
    """Return the first row with these values in its fields; None without one."""
    return next((row for row in rows if all(getattr(row, name) == value for name, value in wanted.items())), None)


def name_of(path: RemovalPath) -> str:
    """Return a path's name: its metric, and its search where that is not the usual one."""
    return path.metric if path.search in ("one-shot", "blocks") else f"{path.metric}, {path.search}"


def estimate(given: documents.Estimate) -> str:
    """Return ``0.31 (0.05 … 0.52)``, or what stands in the way."""
    if given.value is None or given.interval is None:
        return "one is constant"
    low, high = (decimal(end) for end in given.interval)
    return f"{decimal(given.value)} ({low} … {high})"


def decimal(value: float, digits: int = 2) -> str:
    """Return a number with a real minus sign."""
    text = f"{abs(value):.{digits}f}"
    return text if value >= 0 or float(text) == 0 else formatting.MINUS + text


def in_points(one: PathPoint | Contrast | Calibrated) -> str:
    """Return a difference as ``−1.2 (−2.6 … +0.3)``, in points of accuracy."""
    return f"{formatting.points(one.difference)} ({formatting.points_interval(one.interval)})"


def significant_sign(interval: Interval) -> int:
    """Return 1 or -1 for a difference whose interval lies on one side of zero, 0 for one that it does not."""
    return 1 if interval[0] > 0 else -1 if interval[1] < 0 else 0


# What a study found, in sentences with numbers.


RIVALS = ("cosine", "perplexity", "angular")  # the metrics most in use; the summary names the first that was studied
SIGNIFICANT = 0.05


def verdict_of(study: Study) -> str:
    """Return a study in one paragraph."""
    it = Findings(study)
    rival = next((name for name in RIVALS if name in it.metrics), None)
    selected, audited = (sum(data.items for data in side) for side in (study.selection, study.audit))
    ranking = (
        f"Ranked by ablation on {selected:,} items, the layers agree with the accuracy really lost on {audited:,} "
        f"other items at Spearman {estimate(it.agreement('ablation').spearman)}"
    )
    against = "" if rival is None else f"; ranked by {rival}, at {estimate(it.agreement(rival).spearman)}"
    parts = [f"{ranking}{against}."]
    reliability = it.reliability("accuracy")
    if reliability is not None and reliability.whole is not None:
        parts.append(
            f"Measured on other items again, accuracy lost would agree with itself at {decimal(reliability.whole)}."
        )
    if rival is not None:
        parts += _duel(it, rival)
    return " ".join(parts)


def _duel(it: Findings, rival: str) -> list[str]:
    """Say what ablation and its rival keep with a quarter of the layers gone; nothing where a path ended before."""
    count = it.nearest(0.25)
    paths = [_first(it.study.paths, metric=metric) for metric in ("ablation", rival)]
    ours, theirs = (it.point(path, count) for path in paths)
    contrast = it.contrast(paths[1], count)
    if contrast is None or ours is None or theirs is None:
        return []
    kept = formatting.accuracy(ours.accuracy)
    said = f"With {count} of {it.depth} layers removed in one shot, ablation's choice keeps {kept} points of accuracy"
    if contrast.same:
        return [f"{said}; {rival} chooses the same layers."]
    lead = f"{said} and {rival}'s {formatting.accuracy(theirs.accuracy)}: {in_points(contrast)} points"
    return [f"{lead}, {('not told apart on these items', 'better', 'worse')[significant_sign(contrast.interval)]}."]


# The questions of the page, each with its answer in sentences and in tables.


@dataclass(frozen=True)
class PageTable:
    """A table as it is read: every cell is text."""

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Section:
    """One question and its answer."""

    anchor: str
    question: str
    paragraphs: Sequence[str]
    tables: Sequence[PageTable]
    plots: Sequence[str] = ()  # by name; one may not have been drawn


def sections(it: Findings) -> list[Section]:
    """Return the page's questions in order."""
    questions = (on_reliability, on_agreement, on_spread, on_paths, on_calibration, on_counterexample)
    return [answered(it) for answered in questions]


def on_reliability(it: Findings) -> Section:
    """Say how far the reference itself can be trusted, and how well each task's ranking by what is lost repeats."""
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
            f"By {name}, two random halves of the audit items rank the layers alike at Spearman {decimal(one.halves)}. "
            f"All {one.items:,} items then have a reliability of {decimal(one.whole)} (Spearman-Brown); {needed}."
        )
    if it.ceiling is not None:
        found.append(
            "A ranking without any error could be expected to correlate with the accuracy lost as measured here at "
            f"about {decimal(it.ceiling)}, not at 1. Read every correlation below against that."
        )
    rows = [
        (
            one.task,
            "accuracy" if one.signal == "accuracy" else "gold probability",
            f"{one.items:,}",
            *("all alike" if value is None else decimal(value) for value in (one.halves, one.whole)),
            f"{one.items_needed:,}" if one.items_needed else "none named",
        )
        for one in it.study.reliability
    ]
    caption = "Split-half reliability of the ranking of the layers by what each costs, 200 random splits"
    table = PageTable(caption, ("task", "lost", "items", "halves agree", "reliability", "items for 0.9"), rows)
    return Section("reference", "How sure is the accuracy that is lost?", found, [table], ["layers"])


def on_agreement(it: Findings) -> Section:
    """Say which metrics rank as accuracy does, and how many of the layers that cost least each of them finds."""
    first = it.agreement(it.metrics[0])
    limit = first.spearman_by_chance
    clear = [metric for metric in it.metrics if (it.agreement(metric).spearman.interval or (-1, -1))[0] > limit]
    above = (
        f"{formatting.listed(clear)} lie above that with their whole interval" if clear else "no metric lies above that"
    )
    named = [it.confusion[metric] for metric in ("ablation", *RIVALS, "random") if metric in it.confusion]
    misplaced = formatting.listed([f"{formatting.percent(one.misplaced)} by {one.metric}" for one in named])
    said = [
        "Each metric scored the layers on the selection items. Accuracy lost was measured on the audit items, one "
        f"layer removed at a time, and averaged over the tasks. 95 % of unrelated rankings of {first.units} layers "
        f"correlate within ±{decimal(limit)}; {above}.",
        f"Rank positions that hold another layer than by accuracy lost, mean over the tasks: {misplaced}. A random "
        f"ranking misplaces {formatting.percent(named[0].by_chance)}, so a high share says little by itself (the "
        "paper reports 93.8 % for cosine, where chance is 96.7 %).",
    ]
    rows = []
    for metric in it.metrics:
        whole, inner = it.agreement(metric), it.agreement(metric, ends=False)
        estimates = (whole.spearman, whole.kendall, whole.pearson, inner.spearman)
        rows.append([metric, *map(estimate, estimates), formatting.percent(whole.misplaced)])
    caption = (
        "Correlation with the accuracy lost on unseen items, 95 % intervals; misplaced: share of rank "
        f"positions, by chance {formatting.percent(first.misplaced_by_chance)}"
    )
    header = ("metric", "Spearman", "Kendall", "Pearson", "Spearman without the end layers", "misplaced")
    return Section(
        "agreement",
        "Which metric ranks the layers as accuracy does?",
        said,
        [PageTable(caption, header, rows), _overlap(it)],
        ["agreement", "confusion"],
    )


def _overlap(it: Findings) -> PageTable:
    """Show how many of the layers that cost least each metric finds."""
    counts = sorted({one.count for one in it.study.shared})
    found = {(one.metric, one.count): one for one in it.study.shared}
    rows = [[metric, *(f"{found[metric, count].shared:.3g}" for count in counts)] for metric in it.metrics]
    chance = [found[it.metrics[0], count] for count in counts]
    by_chance = [f"{one.by_chance:.2g} ({one.chance_interval[0]:g} to {one.chance_interval[1]:g})" for one in chance]
    rows.append(["by chance", *by_chance])
    caption = "How many of the k layers that cost least are among the metric's k lowest (in expectation where they tie)"
    return PageTable(caption, ["metric", *(f"k = {count}" for count in counts)], rows)


def on_spread(it: Findings) -> Section:
    """Say whether a layer's worth depends on the task."""
    question = "Does a layer's worth depend on the task?"
    if not it.study.spread:
        alone = "With a single task there is nothing to compare; give several with --tasks."
        return Section("spread", question, [alone], [])
    drop = _first(it.study.spread, metric=ACCURACY_DROP)
    lower = [
        f"{one.metric} ({decimal(one.mean, 3)}, p = {formatting.p_value(one.wilcoxon_p)})"
        for one in it.study.spread
        if one.wilcoxon_p is not None and one.wilcoxon_p < SIGNIFICANT and one.mean < drop.mean
    ]
    said = [
        "The accuracy lost, z-scored over the layers of each task, has a variance over the tasks of "
        f"{decimal(drop.mean, 3)} a layer on average. The draw of items alone would give about "
        f"{decimal(drop.noise or 0.0, 3)}; only what is above that can be the tasks'. Ablation on the selection items "
        "has that noise too, and more of it the fewer the items; metrics that only read text have hardly any.",
        "Less variable than the accuracy lost by Wilcoxon's signed-rank test over the layers: "
        f"{formatting.listed(lower) if lower else 'none'}.",
    ]
    rows = [
        (
            one.metric,
            decimal(one.mean, 3),
            "" if one.noise is None else decimal(one.noise, 3),
            "" if one.wilcoxon_p is None else formatting.p_value(one.wilcoxon_p),
        )
        for one in it.study.spread
    ]
    caption = "Variance over tasks of relevance z-scored over the layers; p: Wilcoxon's test against the accuracy drop"
    table = PageTable(caption, ("metric", "mean over layers", "from the draw of items", "p"), rows)
    return Section("spread", question, said, [table], ["spread"])


def on_paths(it: Findings) -> Section:
    """Say what is left when layers go, by each choice, and how far one-shot ablation lies above every other."""
    count = it.nearest(0.25)
    sides: dict[int, list[str]] = {1: [], -1: [], 0: []}
    for path in it.study.paths:
        contrast = it.contrast(path, count)
        if contrast is not None:
            sides[0 if contrast.same else significant_sign(contrast.interval)].append(name_of(path))
    clauses = [
        f"{verb} {formatting.listed(sides[side])}"
        for side, verb in ((1, "keeps more than"), (-1, "keeps less than"), (0, "is not told apart from"))
        if sides[side]
    ]
    said = [
        "Every choice was made on the selection items, and all answer the same audit items with the layers bypassed. "
        "One-shot paths are nested: layers go in the order of their scores; angular takes the best block of each size.",
        f"With {count} of {it.depth} layers removed, one-shot ablation {formatting.listed(clauses)}.",
        *(f"The path of {name_of(path)} ends early: {path.remark}" for path in it.study.paths if path.remark),
    ]
    counts = sorted({it.nearest(share) for share in SHOWN})
    columns = [f"{count} removed" for count in counts]
    rows = [[name_of(path), *(_kept(it.point(path, count)) for count in counts)] for path in it.study.paths]
    leads = [[name_of(path), *(_gap(it.contrast(path, count)) for count in counts)] for path in it.study.paths]
    caption = "Accuracy on unseen items, mean of tasks in points, and its paired difference from the intact model"
    above = "One-shot ablation above the choice by so many points (95 % paired interval)"
    tables = [
        PageTable(caption, ["chosen by", *columns], rows),
        PageTable(above, ["than", *columns], [row for row in leads if any(row[1:])]),
    ]
    return Section("paths", "What is left when layers go?", said, tables, ["paths"])


def on_calibration(it: Findings) -> Section:
    """Say whether it matters what a metric reads: its own task, all tasks, or text."""
    clear = [
        f"{one.metric} on {'plain text' if one.calibration == TEXT else 'each task alone'}, {one.count} removed: "
        f"{in_points(one)}"
        for one in it.study.calibration
        if not one.same and significant_sign(one.interval)
    ]
    text = it.study.text
    said = [
        "The same metric, one-shot, after reading or answering each task's own selection items (every task is then "
        "answered without its own layers), those of all tasks together, or plain text.",
        f"Told apart from all tasks together, in points: {'; '.join(clear) if clear else 'none, on these items'}.",
        "No plain text was given (--text FILE), so that calibration was not looked at."
        if text is None
        else f"The text: {text.windows} windows, {text.tokens:,} tokens of {text.source}. Ablation answers questions "
        "and has no text form; the nearest is perplexity.",
    ]
    found = {(one.metric, one.count, one.calibration): one for one in it.study.calibration}
    rows = []
    for metric, count in dict.fromkeys((one.metric, one.count) for one in it.study.calibration):
        own, everyone, plain = (found.get((metric, count, kind)) for kind in ("own task", ALL_TASKS, TEXT))
        rows.append([metric, str(count), _kept(own), formatting.accuracy(everyone.accuracy), _kept(plain)])
    caption = "Accuracy on unseen items in points, and its paired difference from all tasks"
    header = ("metric", "removed", "each task's own items", "all tasks' items", "plain text")
    return Section("calibration", "What should a metric read?", said, [PageTable(caption, header, rows)])


def _kept(one: PathPoint | Calibrated | None) -> str:
    """Return ``51.2; −1.2 (−2.6 … +0.3)``: an accuracy and its difference."""
    return "" if one is None else f"{formatting.accuracy(one.accuracy)}; {_gap(one)}"


def _gap(one: PathPoint | Contrast | Calibrated | None) -> str:
    if one is None:
        return ""
    return "the same layers" if not isinstance(one, PathPoint) and one.same else in_points(one)


def on_counterexample(it: Findings) -> Section:
    """Say what the counterexample shows, and show its three layers."""
    shown = it.study.counterexample
    right = formatting.percent(shown.accuracy, 0)
    said = (
        "For any ε there is a decoder whose middle layer has cosine score ε, the lowest of all, and decides everything "
        "(the paper's theorem). Here it is, measured, as a real three-layer Llama: "
        f"layerprune.analysis.counterexample.counterexample({shown.epsilon:g}). Intact it answers {right} of its items "
        f"right; without the layer that cosine would remove first, {formatting.percent(shown.accuracy_without[1], 0)}."
    )
    rows = [
        (str(layer), f"{score:.3g}", formatting.percent(left, 0))
        for layer, (score, left) in enumerate(zip(shown.cosine, shown.accuracy_without, strict=True))
    ]
    caption = f"The counterexample for ε = {shown.epsilon:g}; intact it answers {right} right"
    table = PageTable(caption, ("layer", "cosine score", "right without it"), rows)
    return Section("counterexample", "Can a layer that turns nothing decide everything?", [said], [table])
