"""The study as a folder: study.html, its pictures (SVG), its figures (CSV) and study.json."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from layerprune import formatting
from layerprune.analysis import findings
from layerprune.analysis.findings import Findings, decimal, estimate, name_of
from layerprune.analysis.tables import (
    Shown,
    agreement,
    calibration,
    counterexample,
    label,
    lead,
    overlap,
    paths,
    reliability,
    spread,
    tables,
)
from layerprune.artifacts import Study
from layerprune.artifacts.base import write_atomically
from layerprune.artifacts.study import MEAN
from layerprune.errors import DocumentError
from layerprune.files import check_places, published_together, refuse_link
from layerprune.report.card import base_name, environment

if TYPE_CHECKING:
    from matplotlib.figure import Figure


# A study's pictures (matplotlib, SVG): told apart by marker and line as well as by colour, each with its words.


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
    named = [f"{label(it.study.units[place])} ({formatting.percent(it.losses[place], 0)})" for place in order]
    return (
        "Share of the accuracy above chance lost with each layer alone, mean over tasks. "
        f"Least: layers {formatting.listed(named[:3])}; most: {formatting.listed(named[:-4:-1])}."
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
        axes.set_title(f"{one.metric}\n{formatting.percent(one.misplaced, 0)} misplaced", fontsize=9)
        axes.set_xlabel("rank by metric", fontsize=9)
        axes.grid(False)
    panels[0].set_ylabel("rank by accuracy lost", fontsize=9)


def confusion_alt(it: Findings) -> str:
    """Say each metric's share of misplaced positions."""
    rows = {one.metric: one for one in it.study.confusion}
    said = [f"{metric} {formatting.percent(rows[metric].misplaced)}" for metric in CONFUSED if metric in rows]
    chance = formatting.percent(it.study.confusion[0].by_chance)
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
        f"{name_of(path)} {formatting.accuracy(point.accuracy)}"
        for path in it.study.paths
        for point in path.points
        if point.count == count
    ]
    return f"Accuracy against layers removed; with {count} of {it.depth} removed: {', '.join(said)}."


# The study as a folder: study.html, which holds everything it shows, its figures (CSV), plots (SVG) and study.json.


PAGE = "study.html"
PLOTS, TABLES = "plots", "tables"


@dataclass(frozen=True)
class Section:
    """One question and its answer."""

    anchor: str
    question: str
    paragraphs: Sequence[str]
    plots: Sequence[Plot] = ()
    tables: Sequence[Shown] = ()


def write_study(study: Study, folder: Path) -> list[Path]:
    """Write tables, plots, the page and study.json into ``folder``; return the page and study.json.

    study.json comes last: where it stands, everything stands.
    """
    for name in (PLOTS, TABLES):
        refuse_link(folder / name)
    it = Findings(study)
    drawn = list(plots(it))
    with published_together(folder) as new:
        for table in tables(study):
            _write(new / TABLES / f"{table.name}.csv", table.as_csv())
        for plot in drawn:
            _write(new / PLOTS / f"{plot.name}.svg", plot.svg)
        _write(new / PAGE, render(it, drawn))
        study.save(new / Study.filename)
    for stale in {*(folder / PLOTS).glob("*.svg")} - {folder / PLOTS / f"{plot.name}.svg" for plot in drawn}:
        stale.unlink()  # of a study that this one replaces
    return [folder / PAGE, folder / Study.filename]


def read_study(folder: Path) -> Study:
    """Read a folder's study.json; raises ``DocumentError`` where the page beside it was written from another one."""
    study, page = Study.load(folder / Study.filename), folder / PAGE
    if page.exists() and study.sha256() not in page.read_text(encoding="utf-8", errors="replace"):
        raise DocumentError(
            f"{folder / Study.filename} is not the one that {page} was written from; put it back, or remove it to do "
            "the study again: what was measured is kept"
        )
    return study


def check_room(folder: Path) -> None:
    """Raise ``UsageError`` where something else lies in the place of what ``write_study`` will write."""
    check_places(folder, files=(PAGE, Study.filename), folders=(TABLES, PLOTS))


def verdict_of(study: Study) -> str:
    """Return a study in one paragraph."""
    return findings.verdict(Findings(study))


def render(it: Findings, drawn: Sequence[Plot]) -> str:
    """Return study.html; the page holds everything it shows: no script, no external request."""
    given = {
        "study": it.study,
        "title": f"What the layers of {base_name(it.study.model.id)} are worth",
        "verdict": findings.verdict(it),
        "sections": sections(it, {plot.name: plot for plot in drawn}),
        "sha256": it.study.sha256(),
    }
    html = environment(("accuracy", "p_value", "number"), autoescape=True)
    html.filters["data_uri"] = _data_uri
    return html.get_template("study.html.jinja").render(given)


def sections(it: Findings, drawn: dict[str, Plot]) -> list[Section]:
    """Return the page's questions in order."""
    return [
        Section(
            "reference",
            "How sure is the accuracy that is lost?",
            findings.on_reliability(it),
            [drawn["layers"]],
            [reliability(it)],
        ),
        Section(
            "agreement",
            "Which metric ranks the layers as accuracy does?",
            findings.on_agreement(it),
            [drawn["agreement"], drawn["confusion"]],
            [agreement(it), overlap(it)],
        ),
        Section(
            "spread",
            "Does a layer's worth depend on the task?",
            findings.on_spread(it),
            [drawn["spread"]] if "spread" in drawn else [],
            [spread(it)] if it.study.spread else [],
        ),
        Section(
            "paths", "What is left when layers go?", findings.on_paths(it), [drawn["paths"]], [paths(it), lead(it)]
        ),
        Section("calibration", "What should a metric read?", findings.on_calibration(it), [], [calibration(it)]),
        Section(
            "counterexample",
            "Can a layer that turns nothing decide everything?",
            findings.on_counterexample(it),
            [],
            [counterexample(it)],
        ),
    ]


def _data_uri(svg: str) -> str:
    return f"data:image/svg+xml;base64,{base64.b64encode(svg.encode()).decode()}"


def _write(path: Path, text: str) -> None:
    write_atomically(path, text.encode())
