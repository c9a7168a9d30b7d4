"""A front for people: a table that spreadsheets read, and a plot of accuracy against layers removed."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from layerprune.documents import Front, FrontPoint
from layerprune.documents.base import write_atomically
from layerprune.sizes import in_words

COLUMNS = ("removed", "layers", "accuracy", "difference", "low", "high", "parameters", "bytes", "plan", "point")
COLUMNS += ("nats", "agreed")  # of the intact model's own answers
INK, SHADE, WRITTEN = "#1f4e79", "#9db8d2", "#a34a00"


def by_accuracy(front: Front) -> bool:
    """Whether some task has an accuracy: not where only own answers are read."""
    return any(task.nats is None for task in front.points[0].tasks.values())


def nats(point: FrontPoint) -> float | None:
    """Return what the intact model's own answers lose, nats per token, mean over their tasks; None: none are read."""
    return _mean([task.nats for task in point.tasks.values() if task.nats is not None])


def agreed(point: FrontPoint) -> float | None:
    """Return the share of their tokens that is still agreed with, mean over their tasks; None: none are read."""
    return _mean([task.agreed for task in point.tasks.values() if task.agreed is not None])


def _mean(values: Sequence[float]) -> float | None:
    return round(sum(values) / len(values), 6) if values else None


def write_csv(front: Front, path: Path) -> None:
    """Write one row per point, the intact model's first; accuracies as shares.

    Where only own answers are read, accuracy is the share of prompts answered token for token as before.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerow([0, "", front.accuracy, 0.0, 0.0, 0.0, front.model.parameters, front.bytes, *[""] * 4])
    for point in front.points:
        layers = " ".join(map(str, point.removal))
        figures = (point.accuracy, point.accuracy_difference, *point.interval, point.parameters, point.bytes)
        own = (nats(point), agreed(point))
        writer.writerow([len(point.removal), layers, *figures, point.plan, front.names_of(point), *own])
    write_atomically(path, text.getvalue().encode())


def write_plot(front: Front, path: Path) -> None:
    """Draw what is left after each step as PNG: mean accuracy with the interval of its difference, agreed tokens."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    figure = Figure(figsize=(8, 4.6), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    removed = [len(point.removal) for point in front.points]
    tokens = [agreed(point) for point in front.points]
    heights = [point.accuracy for point in front.points] if by_accuracy(front) else tokens
    if by_accuracy(front):
        reach = [[abs(point.interval[side] - point.accuracy_difference) for point in front.points] for side in (0, 1)]
        label = "95 % interval of the difference"
        axes.errorbar(removed, heights, reach, fmt="none", ecolor=SHADE, elinewidth=2, capsize=3, label=label)
        line = [front.accuracy, *heights]
        axes.plot([0, *removed], line, color=INK, marker="o", markersize=4, label=front.metric.words)
        axes.axhline(front.accuracy, color="0.35", linewidth=1, linestyle="--", label="intact model")
    if None not in tokens:
        label = "agreed tokens of own answers"
        axes.plot(removed, tokens, color=WRITTEN, marker="s", markersize=4, label=label)
    for point, height in zip(front.points, heights, strict=True):
        place = (len(point.removal), height)
        axes.annotate(front.names_of(point), place, (0, 8), textcoords="offset points", ha="center", fontsize=8)
    axes.set_xlabel(f"layers removed, of {front.model.layers}")
    counted = sum(task.nats is None for task in front.points[0].tasks.values())
    accuracy = f"accuracy, mean of {counted} task{'s' * (counted > 1)}"
    axes.set_ylabel(accuracy if counted else "agreed tokens of own answers")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:.0f} %"))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="y", color="0.9")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(frameon=False, loc="outside lower center", ncols=2)
    axes.set_title(f"{Path(front.model.id).name}: {front.search.name}, on {front.source}", fontsize=10, loc="left")
    size = axes.secondary_xaxis("top")
    size.set_xticks(removed[:: max(1, len(removed) // 6)])
    size.set_xticklabels([in_words(point.bytes) for point in front.points][:: max(1, len(removed) // 6)], fontsize=8)
    size.spines["top"].set_visible(False)
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", metadata={"Software": None})  # the same bytes for the same front
    write_atomically(path, drawn.getvalue())
