"""The study as a folder: study.html, its pictures (SVG), its figures (CSV) and study.json."""

from __future__ import annotations

import base64
import csv
import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from layerprune import formatting
from layerprune.analysis.findings import Findings, decimal, estimate, name_of, sections, verdict_of
from layerprune.artifacts import Part, Study
from layerprune.artifacts.base import write_atomically
from layerprune.artifacts.study import MEAN, Estimate
from layerprune.errors import DocumentError
from layerprune.files import check_places, published_together, refuse_link
from layerprune.report.card import base_name, render_template

if TYPE_CHECKING:
    from matplotlib.figure import Figure


# Every figure of a study as CSV; study.html shows the main ones.


# Tables whose rows are records of the study, all fields in order: which records, and the header. A field that holds
# several values (an interval, an estimate with its limits) fills as many columns.
RECORDS = {
    # how far each ranking agrees with the accuracy lost on unseen items
    "agreement": (
        "agreement",
        "metric,calibration,task,end layers,layers,spearman,spearman low,spearman high,kendall,kendall low,"
        "kendall high,pearson,pearson low,pearson high,spearman by chance,misplaced,misplaced by chance",
    ),
    # how many of the k layers that cost least each metric finds
    "overlap": ("shared", "metric,k,shared,by chance,chance low,chance high"),
    # split-half reliability of the ranking by what is lost
    "reliability": ("reliability", "task,signal,items,between halves,reliability,items for 0.9"),
    # one-shot ablation against every other choice, on the same items
    "contrasts": ("contrasts", "metric,search,removed,ablation is above by,low,high,same layers"),
    # what each metric chooses after reading other data
    "calibration": ("calibration", "metric,calibration,removed,accuracy,from all tasks,low,high,same layers"),
}


def tables(study: Study) -> Iterator[tuple[str, list[list[Any]]]]:
    """Yield all of a study's tables: the name of the file, and rows of which the first is the header."""
    units, tasks = [label(unit) for unit in study.units], [data.task for data in study.audit]
    yield "layers", _layers(study, units)
    for name, (field, header) in RECORDS.items():
        yield name, [header.split(","), *(_columns(record) for record in getattr(study, field))]
    # variance over tasks of z-scored relevance, on average and by layer
    header = ["metric", "mean variance", "from the draw of items", "Wilcoxon p", *units]
    yield "spread", [header, *([s.metric, s.mean, s.noise, s.wilcoxon_p, *s.variances] for s in study.spread)]
    # rank confusion: where layers stand by accuracy lost and by a metric, share of tasks (zeros left out)
    rows = [
        [one.metric, place, by_metric, share]
        for one in study.confusion
        for place, row in enumerate(one.matrix, 1)
        for by_metric, share in enumerate(row, 1)
        if share
    ]
    yield "confusion", [["metric", "rank by accuracy lost", "rank by metric", "share"], *rows]
    # accuracy on unseen items along each choice, paired differences from intact
    rows = [
        [path.metric, path.search, point.count, " / ".join(" ".join(map(str, r)) for r in point.removals),
         point.accuracy, point.difference, *point.interval, *(point.tasks[task] for task in tasks)]
        for path in study.paths
        for point in path.points
    ]  # fmt: skip
    yield "paths", [["metric", "search", "removed", "layers", "accuracy", "difference", "low", "high", *tasks], *rows]


def label(units: Sequence[int]) -> str:
    """Return what is removed: ``3``, or ``3 and 4`` where layers go together."""
    return " and ".join(map(str, units))


def _layers(study: Study, units: list[str]) -> list[list[Any]]:
    """What removing each layer alone costs, as a share of what is there to lose, and what each metric says."""
    columns: dict[str, Sequence[Any]] = {"layer": units}
    for lost in study.lost:
        columns[f"accuracy lost on {lost.task}"] = lost.accuracy
        if lost.probability is not None:
            columns[f"gold probability lost on {lost.task}"] = lost.probability
    columns |= {f"{ranking.metric} by {ranking.calibration}": ranking.scores for ranking in study.rankings}
    return [[*columns], *zip(*columns.values(), strict=True)]


def _columns(record: Part) -> list[Any]:
    row: list[Any] = []
    for _, value in record:
        if isinstance(value, Estimate):
            row += [value.value, *(value.interval or (None, None))]
        else:
            row += value if isinstance(value, tuple) else [value]
    return row


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

    alt: str
    svg: str

    @property
    def data_uri(self) -> str:
        return f"data:image/svg+xml;base64,{base64.b64encode(self.svg.encode()).decode()}"


def plots(it: Findings) -> dict[str, Plot]:
    """Draw all of a study's pictures, by name."""
    import matplotlib
    from matplotlib.figure import Figure

    pictures = {
        "layers": (draw_layers, 3.2),
        "agreement": (draw_agreement, ROW * len(it.metrics) + 1.0),
        "confusion": (draw_confusion, 2.7),
        "spread": (draw_spread, ROW * len(it.study.spread) + 1.0),
        "paths": (draw_paths, 4.8),
    }
    if not it.study.spread:
        del pictures["spread"]
    drawn = {}
    for name, (draw, height) in pictures.items():
        with matplotlib.rc_context(STYLE):
            figure, out = Figure(figsize=(WIDTH, height)), io.StringIO()  # no pyplot: no window, no global state
            alt = draw(it, figure)
            figure.savefig(out, format="svg", metadata={"Date": None, "Title": name, "Description": alt})
        drawn[name] = Plot(alt, out.getvalue())
    return drawn


def draw_layers(it: Findings, figure: Figure) -> str:
    """Draw what removing each unit alone costs: a line a task, bars for the mean. Say which cost most and least."""
    axes = figure.subplots()
    units = [label(unit) for unit in it.study.units]
    places = np.arange(len(units))
    axes.bar(places, 100 * np.array(it.losses), color="#bfbfbf", label=MEAN)
    if len(it.study.lost) > 1:
        for number, lost in enumerate(it.study.lost):
            style = {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number % len(MARKERS)]}
            axes.plot(places, 100 * np.array(lost.accuracy), linewidth=0, markersize=4, label=lost.task, **style)
    every = max(1, len(places) // 32)
    axes.set_xticks(places[::every], units[::every], fontsize=8)
    axes.set(xlabel="layer removed alone", ylabel="accuracy lost, % of what\nis above chance")
    axes.axhline(0, color="black", linewidth=0.8)
    axes.legend(ncols=4, fontsize=9, loc="upper center")
    axes.set_ylim(top=axes.get_ylim()[1] * 1.2)
    order = sorted(places, key=lambda place: it.losses[place])
    named = [f"{units[place]} ({formatting.percent(it.losses[place], 0)})" for place in order]
    return (
        "Share of the accuracy above chance lost with each layer alone, mean over tasks. "
        f"Least: layers {formatting.listed(named[:3])}; most: {formatting.listed(named[:-4:-1])}."
    )


def draw_agreement(it: Findings, figure: Figure) -> str:
    """Draw each metric's Spearman with its interval, the band of chance, and what a perfect ranking would show."""
    axes = figure.subplots()
    found = [it.agreement(metric) for metric in it.metrics]
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
    axes.set(xlim=(-1.05, 1.05), ylim=(len(found) - 0.5, -0.75))
    axes.set_xlabel("Spearman correlation with the accuracy lost on unseen items (95 % interval)")
    said = [f"{one.metric} {estimate(one.spearman)}" for one in found]
    return f"Spearman correlation of each metric with accuracy lost: {'; '.join(said)}."


def draw_confusion(it: Findings, figure: Figure) -> str:
    """Draw where layers stand by accuracy lost and by a metric, one panel a metric. Say the shares misplaced."""
    chosen = [it.confusion[metric] for metric in CONFUSED if metric in it.confusion]
    panels = figure.subplots(1, len(chosen), sharey=True, squeeze=False)[0]
    size = len(chosen[0].matrix)
    for axes, one in zip(panels, chosen, strict=True):
        axes.imshow(np.array(one.matrix), cmap="Greys", origin="lower", extent=(0.5, size + 0.5) * 2, vmin=0)
        axes.plot((0.5, size + 0.5), (0.5, size + 0.5), color=COLOURS[1], linewidth=0.8)
        axes.set_title(f"{one.metric}\n{formatting.percent(one.misplaced, 0)} misplaced", fontsize=9)
        axes.set_xlabel("rank by metric", fontsize=9)
        axes.grid(False)
    panels[0].set_ylabel("rank by accuracy lost", fontsize=9)
    said = [f"{one.metric} {formatting.percent(one.misplaced)}" for one in chosen]
    return (
        "Rank by accuracy lost against rank by metric, darker where more tasks agree; the diagonal is right. "
        f"Misplaced: {', '.join(said)}; by chance {formatting.percent(chosen[0].by_chance)}."
    )


def draw_spread(it: Findings, figure: Figure) -> str:
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
    said = [f"{one.metric} {decimal(one.mean)}" for one in it.study.spread]
    return f"Variance over tasks of z-scored relevance, mean over layers: {', '.join(said)}."


def draw_paths(it: Findings, figure: Figure) -> str:
    """Draw accuracy against layers removed, a line a choice; one-shot ablation with its interval."""
    axes = figure.subplots()
    base = 100 * float(np.mean([it.study.intact[data.task].accuracy for data in it.study.audit]))
    chance = 100 * float(np.mean([data.chance for data in it.study.audit]))
    axes.axhline(chance, color=SOFT, linewidth=0.8, linestyle=":")
    axes.text(it.counts[-1], chance, "chance", ha="right", va="bottom", fontsize=8, color=SOFT)
    for number, path in enumerate(it.study.paths):
        counts = [0, *(point.count for point in path.points)]
        first = number == 0
        axes.plot(
            counts,
            [base, *(100 * point.accuracy for point in path.points)],
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
    axes.set(xlabel=f"layers removed of {it.depth}", ylabel="accuracy on unseen items, mean of tasks")
    figure.legend(fontsize=8, loc="outside right upper")
    count = it.nearest(0.25)
    left = [(name_of(path), it.point(path, count)) for path in it.study.paths]
    said = [f"{name} {formatting.accuracy(point.accuracy)}" for name, point in left if point is not None]
    return f"Accuracy against layers removed; with {count} of {it.depth} removed: {', '.join(said)}."


# The study as a folder: study.html, which holds everything it shows, its figures (CSV), plots (SVG) and study.json.


PAGE = "study.html"
PLOTS, TABLES = "plots", "tables"


def write_study(study: Study, folder: Path) -> None:
    """Write tables, plots, the page and study.json into ``folder``.

    study.json comes last: where it stands, everything stands.
    """
    for name in (PLOTS, TABLES):
        refuse_link(folder / name)
    it = Findings(study)
    drawn = plots(it)
    files = {f"{TABLES}/{name}.csv": _as_csv(rows) for name, rows in tables(study)}
    files |= {f"{PLOTS}/{name}.svg": plot.svg for name, plot in drawn.items()}
    files[PAGE] = render(it, drawn)
    with published_together(folder) as new:
        for name, text in files.items():
            write_atomically(new / name, text.encode())
        study.save(new / Study.filename)
    for path in (folder / PLOTS).glob("*.svg"):
        if path.stem not in drawn:
            path.unlink()  # of a study that this one replaces


def _as_csv(rows: Iterable[Sequence[Any]]) -> str:
    """Return RFC 4180 text; what has no value is an empty field."""
    out = io.StringIO()
    csv.writer(out).writerows(rows)
    return out.getvalue()


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


def render(it: Findings, drawn: dict[str, Plot]) -> str:
    """Return study.html; the page holds everything it shows: no script, no external request."""
    return render_template(
        "study.html.jinja",
        study=it.study,
        title=f"What the layers of {base_name(it.study.model.id)} are worth",
        verdict=verdict_of(it.study),
        sections=sections(it),
        plots=drawn,
        sha256=it.study.sha256(),
    )
