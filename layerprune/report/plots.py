"""Plots as inline SVG: no library, no script, colours from the page, and every figure readable as text.

A page scales a plot to its width. On a phone the page's style makes letters larger in the plot's own units, so there is
room for both: labels stand above what they name, and ticks are few.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from layerprune import formatting

WIDTH, LEFT, RIGHT, TOP, BOTTOM = 680, 88, 16, 14, 54  # user units; the page scales the whole
TICKS = 8  # at most, along an axis of layers
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


def bars(title: str, given: Sequence[Bar], y_name: str, x_name: str = "layer", height: int = 250) -> str:
    """Return a bar chart; marked bars are filled in the accent colour and hatched, so that colour is not all."""
    ends = [end for bar in given for end in (bar.interval or (bar.value, bar.value))]
    scale = _Scale(min(0.0, *ends), max(0.0, *ends), height)
    step = (WIDTH - LEFT - RIGHT) / max(1, len(given))
    parts = [scale.axis(y_name), _x_name(x_name, height)]
    every = math.ceil(len(given) / TICKS)
    for place, bar in enumerate(given):
        x, top, bottom = LEFT + (place + 0.5) * step, scale(max(bar.value, 0)), scale(min(bar.value, 0))
        css, said = ("bar marked", ", removed") if bar.marked else ("bar", "")
        parts.append(
            f'<rect class="{css}" x="{x - 0.36 * step:.1f}" y="{top:.1f}" width="{0.72 * step:.1f}" '
            f'height="{max(bottom - top, 0.8):.1f}"><title>{escape(bar.label)}: {bar.value:.3g}{said}</title></rect>'
        )
        if bar.interval:
            low, high = (scale(end) for end in bar.interval)
            parts.append(_whisker(x, low, high))
        if place % every == 0:
            parts.append(_tick(x, height - 30, bar.label))
    return _svg(title, parts, height)


def curve(
    title: str,
    points: Sequence[PlotPoint],
    x_name: str,
    y_name: str,
    beside: Sequence[PlotPoint] = (),
    height: int = 280,
) -> str:
    """Return a line through points with their intervals; those ``beside`` it are hollow and carry their label."""
    every = (*points, *beside)
    ends = [end for point in every for end in (point.interval or (point.y, point.y))]
    scale = _Scale(min(*ends, 0.0), max(*ends, 0.0), height)
    most = max(point.x for point in every) or 1

    def across(x: float) -> float:
        return LEFT + 14 + x / most * (WIDTH - LEFT - RIGHT - 28)

    line = " ".join(f"{across(point.x):.1f},{scale(point.y):.1f}" for point in points)
    parts = [scale.axis(y_name), _x_name(x_name, height), f'<polyline class="line" points="{line}"/>']
    parts += [_dot(across(point.x), scale, point, "dot") for point in points]
    parts += [_dot(across(point.x), scale, point, "dot beside") for point in beside]
    heights = _apart([scale(point.y) for point in beside])
    for point, y in zip(beside, heights, strict=True):
        parts.append(_beside_label(across(point.x), y, point.label.partition(":")[0]))
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
    parts = [f'<line class="zero" x1="{across(0):.1f}" x2="{across(0):.1f}" y1="4" y2="{height - 36}"/>']
    for place, (label, value, interval) in enumerate(rows):
        y = 40 + ROW * place
        said = f"{label}: {formatting.points(value)} points ({formatting.points_interval(interval)})"
        parts.append(f'<text class="name" x="0" y="{y - 19}">{escape(label)}</text>')
        parts.append(
            f'<line class="whisker" x1="{across(interval[0]):.1f}" x2="{across(interval[1]):.1f}" y1="{y}" y2="{y}"/>'
        )
        parts.append(
            f'<circle class="dot" cx="{across(value):.1f}" cy="{y}" r="6"><title>{escape(said)}</title></circle>'
        )
    step = _round_step((high - low) / 5)
    for count in range(math.ceil(low / step), math.floor(high / step) + 1):
        parts.append(_tick(across(count * step), height - 10, formatting.points(count * step)))
    return _svg(title, parts, height)


class _Scale:
    """Values to heights on the page, with grid lines at round figures that include zero."""

    def __init__(self, low: float, high: float, height: int) -> None:
        spread = (high - low) or 1.0
        self.step = _round_step(spread / 4)
        self.low = math.floor(round(low / self.step, 9)) * self.step
        self.high = math.ceil(round(high / self.step, 9)) * self.step
        if self.high == self.low:
            self.high += self.step
        self.top, self.bottom = TOP, height - BOTTOM

    def __call__(self, value: float) -> float:
        return self.bottom - (value - self.low) / (self.high - self.low) * (self.bottom - self.top)

    def axis(self, name: str) -> str:
        lines = []
        for part in range(round((self.high - self.low) / self.step) + 1):
            value = self.low + part * self.step
            y, css = self(value), "grid" if abs(value) > self.step / 100 else "grid nought"
            lines.append(f'<line class="{css}" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
            said = f"{value:.4g}".replace("-", formatting.MINUS) if css == "grid" else "0"
            lines.append(f'<text class="tick" x="{LEFT - 8}" y="{y + 5:.1f}" text-anchor="end">{said}</text>')
        middle = (self.top + self.bottom) / 2
        turned = f'transform="rotate(-90 18 {middle})"'
        return "".join(
            [*lines, f'<text class="tick" x="18" y="{middle}" text-anchor="middle" {turned}>{escape(name)}</text>']
        )


def _round_step(about: float) -> float:
    """Return 1, 2 or 5 times a power of ten, the smallest that is not below ``about``."""
    power = 10.0 ** math.floor(math.log10(about))
    return next(power * times for times in (1, 2, 5, 10) if power * times >= about * (1 - 1e-9))


def _dot(x: float, scale: _Scale, point: PlotPoint, css: str) -> str:
    whisker = _whisker(x, scale(point.interval[0]), scale(point.interval[1])) if point.interval else ""
    said = f"<title>{escape(point.label)}</title>"
    return f'{whisker}<circle class="{css}" cx="{x:.1f}" cy="{scale(point.y):.1f}" r="6">{said}</circle>'


def _apart(heights: Sequence[float], room: float = 26) -> list[float]:
    """Return the heights, moved down where two labels would lie on each other."""
    moved, lowest = [0.0] * len(heights), -math.inf
    for place in sorted(range(len(heights)), key=lambda index: heights[index]):
        moved[place] = lowest = max(heights[place], lowest + room)
    return moved


def _beside_label(x: float, y: float, label: str) -> str:
    """A label stands on the side where there is more room."""
    away, anchor = (-12, "end") if x > WIDTH / 2 else (12, "start")
    return f'<text class="tick" x="{x + away:.1f}" y="{y + 5:.1f}" text-anchor="{anchor}">{escape(label)}</text>'


def _whisker(x: float, low: float, high: float) -> str:
    return f'<line class="whisker" x1="{x:.1f}" x2="{x:.1f}" y1="{low:.1f}" y2="{high:.1f}"/>'


def _tick(x: float, y: float, label: str) -> str:
    return f'<text class="tick" x="{x:.1f}" y="{y}" text-anchor="middle">{escape(label)}</text>'


def _x_name(name: str, height: int) -> str:
    return _tick((LEFT + WIDTH - RIGHT) / 2, height - 8, name)


def _svg(title: str, parts: Sequence[str], height: int) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(title, quote=True)}">'
        f"<title>{escape(title)}</title>{''.join(parts)}</svg>"
    )
