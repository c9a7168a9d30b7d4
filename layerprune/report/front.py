"""A front for people: a table that spreadsheets read, and a plot of accuracy against layers removed."""

from __future__ import annotations

import csv
import io
from pathlib import Path

from layerprune.documents import Front
from layerprune.documents.base import write_atomically
from layerprune.sizes import in_words

COLUMNS = ("removed", "layers", "accuracy", "difference", "low", "high", "parameters", "bytes", "plan", "point")
INK, SHADE = "#1f4e79", "#9db8d2"


def write_csv(front: Front, path: Path) -> None:
    """Write one row per point, the intact model's first; accuracies as shares."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerow([0, "", front.accuracy, 0.0, 0.0, 0.0, front.model.parameters, front.bytes, "", ""])
    for point in front.points:
        layers = " ".join(map(str, point.removal))
        figures = (point.accuracy, point.accuracy_difference, *point.interval, point.parameters, point.bytes)
        writer.writerow([len(point.removal), layers, *figures, point.plan, ", ".join(front.names_of(point))])
    write_atomically(path, text.getvalue().encode())


def write_plot(front: Front, path: Path) -> None:
    """Draw the mean accuracy after each step, with the interval of its difference from the intact model, as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    figure = Figure(figsize=(8, 4.6), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    removed = [len(point.removal) for point in front.points]
    accuracy = [point.accuracy for point in front.points]
    reach = [[abs(point.interval[side] - point.accuracy_difference) for point in front.points] for side in (0, 1)]
    label = "95 % interval of the difference"
    axes.errorbar(removed, accuracy, reach, fmt="none", ecolor=SHADE, elinewidth=2, capsize=3, label=label)
    axes.plot([0, *removed], [front.accuracy, *accuracy], color=INK, marker="o", markersize=4, label=front.metric.words)
    axes.axhline(front.accuracy, color="0.35", linewidth=1, linestyle="--", label="intact model")
    axes.set_xlabel(f"layers removed, of {front.model.layers}")
    axes.set_ylabel(f"accuracy, mean of {len(front.points[0].tasks)} task{'s' * (len(front.points[0].tasks) > 1)}")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:.0f} %"))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="y", color="0.9")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(frameon=False, loc="outside lower center", ncols=3)
    axes.set_title(f"{Path(front.model.id).name}: {front.search.name}, on {front.source}", fontsize=10, loc="left")
    size = axes.secondary_xaxis("top")
    size.set_xticks(removed[:: max(1, len(removed) // 6)])
    size.set_xticklabels([in_words(point.bytes) for point in front.points][:: max(1, len(removed) // 6)], fontsize=8)
    size.spines["top"].set_visible(False)
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", metadata={"Software": None})  # the same bytes for the same front
    write_atomically(path, drawn.getvalue())
