"""A study's pictures (matplotlib, SVG): told apart by marker and line as well as by colour, each with its words."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from layerprune.analysis.findings import Findings, decimal, estimate, name_of
from layerprune.analysis.tables import label
from layerprune.documents.study import MEAN
from layerprune.report import words

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe & Ito's colours, which people with the common colour blindnesses tell apart, without the pale yellow.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#56B4E9", "#E69F00")
MARKERS = "osD^vPX*<>ph"
LINES = ("-", "--", "-.", ":")
SOFT = "#595959"
STYLE = {
    "svg.fonttype": "none",  # text stays text: it scales, and can be searched and read aloud
    "svg.hashsalt": "layerprune",  # the same study gives the same bytes
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
}
WIDTH = 8.0  # inches; the page scales the whole
ROW = 0.34  # inches a metric
CONFUSED = ("ablation", "cosine", "perplexity", "random")  # the matrices drawn; the files have all


@dataclass(frozen=True)
class Plot:
    """One picture, and what it says in words for those who do not see it."""

    name: str  # of the file
    alt: str
    svg: str


def plots(it: Findings) -> Iterator[Plot]:
    """Draw all of a study's pictures."""
    yield _drawn("layers", layers_alt(it), 3.2, lambda figure: draw_layers(it, figure))
    rows = ROW * len(it.metrics) + 1.0
    yield _drawn("agreement", agreement_alt(it), rows, lambda figure: draw_agreement(it, figure))
    yield _drawn("confusion", confusion_alt(it), 2.7, lambda figure: draw_confusion(it, figure))
    if it.study.spread:
        yield _drawn("spread", spread_alt(it), ROW * len(it.study.spread) + 1.0, lambda figure: draw_spread(it, figure))
    yield _drawn("paths", paths_alt(it), 4.8, lambda figure: draw_paths(it, figure))


def _drawn(name: str, alt: str, height: float, draw: Callable[[Figure], None]) -> Plot:
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, height))  # no pyplot: no window, no global state
        draw(figure)
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None, "Title": name, "Description": alt})
    return Plot(name, alt, out.getvalue())


def draw_layers(it: Findings, figure: Figure) -> None:
    """Draw what removing each unit alone costs: a line a task, bars for the mean."""
    axes = figure.subplots()
    places = np.arange(len(it.study.units))
    axes.bar(places, 100 * np.array(it.losses), color="#bfbfbf", label=MEAN)
    if len(it.study.lost) > 1:
        for number, lost in enumerate(it.study.lost):
            style = {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number % len(MARKERS)]}
            axes.plot(places, 100 * np.array(lost.accuracy), linewidth=0, markersize=4, label=lost.task, **style)
    every = max(1, len(places) // 32)
    axes.set_xticks(places[::every], [label(unit) for unit in it.study.units[::every]], fontsize=8)
    axes.set_xlabel("layer removed alone")
    axes.set_ylabel("accuracy lost, % of what\nis above chance")
    axes.axhline(0, color="black", linewidth=0.8)
    axes.legend(ncols=4, fontsize=9, loc="upper center")
    axes.set_ylim(top=axes.get_ylim()[1] * 1.2)


def layers_alt(it: Findings) -> str:
    """Say which layers cost most and least."""
    order = sorted(range(len(it.losses)), key=lambda place: it.losses[place])
    named = [f"{label(it.study.units[place])} ({words.percent(it.losses[place], 0)})" for place in order]
    return (
        "Share of the accuracy above chance lost with each layer alone, mean over tasks. "
        f"Least: layers {words.listed(named[:3])}; most: {words.listed(named[:-4:-1])}."
    )


def draw_agreement(it: Findings, figure: Figure) -> None:
    """Draw each metric's Spearman with its interval, the band of chance, and what a perfect ranking would show."""
    axes = figure.subplots()
    found = [it.agreed(metric) for metric in it.metrics]
    chance = found[0].spearman_by_chance
    axes.axvspan(-chance, chance, color="#e8e8e8", zorder=0)
    axes.text(0, -0.72, "95 % of unrelated rankings", ha="center", va="bottom", fontsize=8, color=SOFT)
    if it.ceiling is not None:
        axes.axvline(it.ceiling, color="black", linestyle="--", linewidth=1)
        axes.text(it.ceiling, -0.72, "perfect", ha="center", va="bottom", fontsize=8)
    for row, one in enumerate(found):
        value, interval = one.spearman.value, one.spearman.interval
        if value is not None and interval is not None:
            axes.plot(interval, (row, row), color=COLOURS[0], linewidth=1.6)
            axes.plot(value, row, marker="o", color=COLOURS[0])
    axes.set_yticks(range(len(found)), it.metrics)
    axes.set_ylim(len(found) - 0.5, -0.75)
    axes.set_xlim(-1.05, 1.05)
    axes.set_xlabel("Spearman correlation with the accuracy lost on unseen items (95 % interval)")


def agreement_alt(it: Findings) -> str:
    """Say each metric's correlation."""
    said = [f"{metric} {estimate(it.agreed(metric).spearman)}" for metric in it.metrics]
    return f"Spearman correlation of each metric with accuracy lost: {'; '.join(said)}."


def draw_confusion(it: Findings, figure: Figure) -> None:
    """Draw where layers stand by accuracy lost and by a metric, one panel a metric."""
    rows = {one.metric: one for one in it.study.confusion}
    chosen = [rows[metric] for metric in CONFUSED if metric in rows]
    panels = figure.subplots(1, len(chosen), sharey=True, squeeze=False)[0]
    size = len(chosen[0].matrix)
    for axes, one in zip(panels, chosen, strict=True):
        axes.imshow(np.array(one.matrix), cmap="Greys", origin="lower", extent=(0.5, size + 0.5) * 2, vmin=0)
        axes.plot((0.5, size + 0.5), (0.5, size + 0.5), color=COLOURS[1], linewidth=0.8)
        axes.set_title(f"{one.metric}\n{words.percent(one.misplaced, 0)} misplaced", fontsize=9)
        axes.set_xlabel("rank by metric", fontsize=9)
        axes.grid(False)
    panels[0].set_ylabel("rank by accuracy lost", fontsize=9)


def confusion_alt(it: Findings) -> str:
    """Say each metric's share of misplaced positions."""
    rows = {one.metric: one for one in it.study.confusion}
    said = [f"{metric} {words.percent(rows[metric].misplaced)}" for metric in CONFUSED if metric in rows]
    chance = words.percent(it.study.confusion[0].by_chance)
    return (
        "Rank by accuracy lost against rank by metric, darker where more tasks agree; the diagonal is right. "
        f"Misplaced: {', '.join(said)}; by chance {chance}."
    )


def draw_spread(it: Findings, figure: Figure) -> None:
    """Draw the variance of every unit over the tasks, their mean, and what the draw of items alone would give."""
    axes = figure.subplots()
    for row, one in enumerate(it.study.spread):
        axes.plot(one.variances, [row] * len(one.variances), "|", color=SOFT, markersize=8)
        axes.plot(one.mean, row, marker="D", color=COLOURS[0])
        if one.noise is not None:
            axes.plot((one.noise, one.noise), (row - 0.4, row + 0.4), color=COLOURS[1], linewidth=2)
            axes.annotate(" from the draw of items", (one.noise, row - 0.38), fontsize=8, color=COLOURS[1], va="bottom")
    axes.set_yticks(range(len(it.study.spread)), [one.metric for one in it.study.spread])
    axes.set_ylim(len(it.study.spread) - 0.5, -0.75)
    axes.set_xlabel("variance over tasks of z-scored relevance: a stroke a layer, a diamond the mean")


def spread_alt(it: Findings) -> str:
    """Say each metric's mean variance."""
    said = [f"{one.metric} {decimal(one.mean)}" for one in it.study.spread]
    return f"Variance over tasks of z-scored relevance, mean over layers: {', '.join(said)}."


def draw_paths(it: Findings, figure: Figure) -> None:
    """Draw accuracy against layers removed, a line a choice; one-shot ablation with its interval."""
    axes = figure.subplots()
    base = 100 * float(np.mean([it.study.intact[data.task].accuracy for data in it.study.audit]))
    chance = 100 * float(np.mean([data.chance for data in it.study.audit]))
    axes.axhline(chance, color=SOFT, linewidth=0.8, linestyle=":")
    axes.text(it.counts[-1], chance, "chance", ha="right", va="bottom", fontsize=8, color=SOFT)
    for number, path in enumerate(it.study.paths):
        counts = [0, *(point.count for point in path.points)]
        values = [base, *(100 * point.accuracy for point in path.points)]
        first = number == 0
        axes.plot(
            counts,
            values,
            label=name_of(path),
            color=COLOURS[number % len(COLOURS)],
            marker=MARKERS[number % len(MARKERS)],
            linestyle=LINES[number // len(COLOURS) % len(LINES)],
            linewidth=2.2 if first else 1.2,
            markersize=5,
            zorder=3 if first else 2,
        )
        if first:
            low, high = (base + 100 * np.array([point.interval[end] for point in path.points]) for end in (0, 1))
            axes.fill_between(counts[1:], low, high, color=COLOURS[0], alpha=0.15, linewidth=0)
    axes.set_xticks([0, *it.counts])
    axes.set_xlabel(f"layers removed of {it.depth}")
    axes.set_ylabel("accuracy on unseen items, mean of tasks")
    figure.legend(fontsize=8, loc="outside right upper")


def paths_alt(it: Findings) -> str:
    """Say each choice's accuracy with a quarter of the layers removed."""
    count = it.nearest(0.25)
    said = [
        f"{name_of(path)} {words.accuracy(point.accuracy)}"
        for path in it.study.paths
        for point in path.points
        if point.count == count
    ]
    return f"Accuracy against layers removed; with {count} of {it.depth} removed: {', '.join(said)}."
