"""Plots as inline SVG: no library, no script, colours from the page, and every figure readable as text.

A page scales a plot to its width. On a phone the page's style makes letters larger in the plot's own units, so there is
room for both: labels stand above what they name, and ticks are few.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from layerprune import formatting

WIDTH, LEFT, RIGHT, TOP, BOTTOM = 680, 88, 16, 14, 54  # user units; the page scales the whole
TICKS = 8  # at most, along an axis of layers
LABEL = 26  # high, with room
ROW = 52  # of a forest plot: a label, and below it the interval


@dataclass(frozen=True)
class Bar:
    """One bar of a bar chart."""

    label: str
    value: float
    marked: bool = False  # e.g. removed
    interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class PlotPoint:
    """One point of a curve, or beside it."""

    x: float
    y: float
    label: str
    interval: tuple[float, float] | None = None


def bars(title: str, given: Sequence[Bar], y_name: str) -> str:
    """Return a bar chart; marked bars are filled in the accent colour and say so when pointed at."""
    height = 250
    scale, parts = _axes([end for bar in given for end in (bar.interval or (bar.value,))], "layer", y_name, height)
    step = (WIDTH - LEFT - RIGHT) / max(1, len(given))
    every = math.ceil(len(given) / TICKS)
    for place, bar in enumerate(given):
        x, top, bottom = LEFT + (place + 0.5) * step, scale(max(bar.value, 0)), scale(min(bar.value, 0))
        css, said = ("bar marked", ", removed") if bar.marked else ("bar", "")
        parts.append(
            f'<rect class="{css}" x="{x - 0.36 * step:.1f}" y="{top:.1f}" width="{0.72 * step:.1f}" '
            f'height="{max(bottom - top, 0.8):.1f}"><title>{escape(bar.label)}: {bar.value:.3g}{said}</title></rect>'
        )
        if bar.interval:
            parts.append(_line("whisker", (x, x), [scale(end) for end in bar.interval]))
        if place % every == 0:
            parts.append(_tick(x, height - 30, bar.label))
    return _svg(title, parts, height)


def curve(title: str, points: Sequence[PlotPoint], x_name: str, y_name: str, beside: Sequence[PlotPoint] = ()) -> str:
    """Return a line through points with their intervals; those ``beside`` it are hollow and carry their label."""
    height = 280
    every = (*points, *beside)
    scale, parts = _axes([end for point in every for end in (point.interval or (point.y,))], x_name, y_name, height)
    most = max(point.x for point in every) or 1

    def across(x: float) -> float:
        return LEFT + 14 + x / most * (WIDTH - LEFT - RIGHT - 28)

    line = " ".join(f"{across(point.x):.1f},{scale(point.y):.1f}" for point in points)
    parts.append(f'<polyline class="line" points="{line}"/>')
    for css, given in (("dot", points), ("dot beside", beside)):
        for point in given:
            x = across(point.x)
            if point.interval:
                parts.append(_line("whisker", (x, x), [scale(end) for end in point.interval]))
            parts.append(_dot(css, x, scale(point.y), point.label))
    heights = _apart([scale(point.y) for point in beside])
    for point, y in zip(beside, heights, strict=True):
        x = across(point.x)
        away, anchor = (-12, "end") if x > WIDTH / 2 else (12, "start")  # on the side where there is more room
        parts.append(_tick(x + away, y + 5, point.label.partition(":")[0], anchor))
    whole = math.ceil(most)
    parts += [_tick(across(x), height - 30, str(x)) for x in range(0, whole + 1, math.ceil(whole / TICKS))]
    return _svg(title, parts, height)


def forest(title: str, rows: Sequence[tuple[str, float, tuple[float, float]]]) -> str:
    """Return differences with their intervals, one row each, around a line at zero (values in accuracy)."""
    ends = [end for _, _, interval in rows for end in interval] + [0.0]
    low, high = min(ends), max(ends)
    room = (high - low) * 0.08 or 0.01
    low, high = low - room, high + room
    edge = 40

    def across(value: float) -> float:
        return edge + (value - low) / (high - low) * (WIDTH - 2 * edge)

    height = ROW * len(rows) + 44
    parts = [_line("zero", (across(0), across(0)), (4, height - 36))]
    for place, (label, value, interval) in enumerate(rows):
        y = 40 + ROW * place
        said = f"{label}: {formatting.points(value)} points ({formatting.points_interval(interval)})"
        parts.append(f'<text class="name" x="0" y="{y - 19}">{escape(label)}</text>')
        parts.append(_line("whisker", [across(end) for end in interval], (y, y)))
        parts.append(_dot("dot", across(value), y, said))
    step = _round_step((high - low) / 5)
    for count in range(math.ceil(low / step), math.floor(high / step) + 1):
        parts.append(_tick(across(count * step), height - 10, formatting.points(count * step)))
    return _svg(title, parts, height)


def _axes(values: Sequence[float], x_name: str, y_name: str, height: int) -> tuple[Callable[[float], float], list[str]]:
    """Return what turns values into heights on the page, and the grid lines, at round figures that include zero."""
    low, high = min(0.0, *values), max(0.0, *values)
    step = _round_step(((high - low) or 1.0) / 4)
    low, high = math.floor(round(low / step, 9)) * step, math.ceil(round(high / step, 9)) * step
    if high == low:
        high += step
    bottom = height - BOTTOM

    def scale(value: float) -> float:
        return bottom - (value - low) / (high - low) * (bottom - TOP)

    parts = []
    for part in range(round((high - low) / step) + 1):
        value = low + part * step
        y, is_zero = scale(value), abs(value) <= step / 100
        said = "0" if is_zero else f"{value:.4g}".replace("-", formatting.MINUS)
        parts.append(_line("grid nought" if is_zero else "grid", (LEFT, WIDTH - RIGHT), (y, y)))
        parts.append(_tick(LEFT - 8, y + 5, said, "end"))
    middle = (TOP + bottom) / 2
    turned = f'transform="rotate(-90 18 {middle})"'
    parts.append(f'<text class="tick" x="18" y="{middle}" text-anchor="middle" {turned}>{escape(y_name)}</text>')
    parts.append(_tick((LEFT + WIDTH - RIGHT) / 2, height - 8, x_name))
    return scale, parts


def _round_step(about: float) -> float:
    """Return 1, 2 or 5 times a power of ten, the smallest that is not below ``about``."""
    power = 10.0 ** math.floor(math.log10(about))
    return next(power * times for times in (1, 2, 5, 10) if power * times >= about * (1 - 1e-9))


def _apart(heights: Sequence[float]) -> list[float]:
    """Return the heights, moved down where two labels would lie on each other."""
    moved, lowest = [0.0] * len(heights), -math.inf
    for place in sorted(range(len(heights)), key=lambda index: heights[index]):
        moved[place] = lowest = max(heights[place], lowest + LABEL)
    return moved


def _line(css: str, x: Sequence[float], y: Sequence[float]) -> str:
    (x1, x2), (y1, y2) = map(_place, x), map(_place, y)
    return f'<line class="{css}" x1="{x1}" x2="{x2}" y1="{y1}" y2="{y2}"/>'


def _dot(css: str, x: float, y: float, said: str) -> str:
    title = f"<title>{escape(said)}</title>"
    return f'<circle class="{css}" cx="{_place(x)}" cy="{_place(y)}" r="6">{title}</circle>'


def _tick(x: float, y: float, label: str, anchor: str = "middle") -> str:
    return f'<text class="tick" x="{_place(x)}" y="{_place(y)}" text-anchor="{anchor}">{escape(label)}</text>'


def _place(value: float) -> str:
    """Return a place on the page to a tenth of a unit."""
    return str(value) if isinstance(value, int) else f"{value:.1f}"


def _svg(title: str, parts: Sequence[str], height: int) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(title, quote=True)}">'
        f"<title>{escape(title)}</title>{''.join(parts)}</svg>"
    )
