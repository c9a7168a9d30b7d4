"""Plots as inline SVG: no library, no script, colours from the page, and every figure readable as text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from layerprune.report import words

WIDTH, LEFT, RIGHT, TOP, BOTTOM = 680, 64, 16, 14, 40  # user units; the page scales the whole


@dataclass(frozen=True)
class Bar:
    """One bar of a bar chart."""

    label: str
    value: float
    marked: bool = False  # e.g. removed
    interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class Point:
    """One point of a curve."""

    x: float
    y: float
    label: str


def bars(title: str, given: Sequence[Bar], y_name: str, height: int = 240) -> str:
    """Return a bar chart; marked bars are filled in the accent colour."""
    ends = [end for bar in given for end in (bar.interval or (bar.value, bar.value))]
    scale = _Scale(min(0.0, *ends), max(0.0, *ends), height)
    step = (WIDTH - LEFT - RIGHT) / max(1, len(given))
    parts = [scale.axis(y_name)]
    every = max(1, len(given) // 16)
    for place, bar in enumerate(given):
        x, top, bottom = LEFT + (place + 0.5) * step, scale(max(bar.value, 0)), scale(min(bar.value, 0))
        css = "bar marked" if bar.marked else "bar"
        parts.append(
            f'<rect class="{css}" x="{x - 0.36 * step:.1f}" y="{top:.1f}" width="{0.72 * step:.1f}" '
            f'height="{max(bottom - top, 0.8):.1f}"><title>{escape(bar.label)}: {bar.value:.3f}</title></rect>'
        )
        if bar.interval:
            low, high = (scale(end) for end in bar.interval)
            parts.append(f'<line class="whisker" x1="{x:.1f}" x2="{x:.1f}" y1="{low:.1f}" y2="{high:.1f}"/>')
        if place % every == 0:
            parts.append(
                f'<text class="tick" x="{x:.1f}" y="{height - 20}" text-anchor="middle">{escape(bar.label)}</text>'
            )
    return _svg(title, parts, height)


def curve(title: str, points: Sequence[Point], x_name: str, y_name: str, height: int = 240) -> str:
    """Return a line through points."""
    ys = [point.y for point in points]
    room = (max(ys) - min(ys)) * 0.1 or 0.01
    scale = _Scale(min(ys) - room, max(ys) + room, height)
    most = max(point.x for point in points) or 1
    across = [(LEFT + point.x / most * (WIDTH - LEFT - RIGHT - 12), scale(point.y)) for point in points]
    parts = [
        scale.axis(y_name),
        '<polyline class="line" points="' + " ".join(f"{x:.1f},{y:.1f}" for x, y in across) + '"/>',
    ]
    for (x, y), point in zip(across, points, strict=True):
        parts.append(
            f'<circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="4"><title>{escape(point.label)}</title></circle>'
        )
        parts.append(f'<text class="tick" x="{x:.1f}" y="{height - 20}" text-anchor="middle">{point.x:g}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text class="tick" x="{middle}" y="{height - 4}" text-anchor="middle">{escape(x_name)}</text>')
    return _svg(title, parts, height)


def forest(title: str, rows: Sequence[tuple[str, float, tuple[float, float]]]) -> str:
    """Return differences with their intervals, one row each, around a line at zero (values in accuracy)."""
    ends = [end for _, _, interval in rows for end in interval] + [0.0]
    low, high = min(ends), max(ends)
    room = (high - low) * 0.08 or 0.01
    low, high = low - room, high + room
    left = 190

    def across(value: float) -> float:
        return left + (value - low) / (high - low) * (WIDTH - left - RIGHT)

    height = 34 * len(rows) + 40
    parts = [f'<line class="zero" x1="{across(0):.1f}" x2="{across(0):.1f}" y1="6" y2="{height - 30}"/>']
    for place, (label, value, interval) in enumerate(rows):
        y = 24 + 34 * place
        said = f"{label}: {words.points(value)} points ({words.points_interval(interval)})"
        parts.append(f'<text class="name" x="{left - 12}" y="{y + 5}" text-anchor="end">{escape(label)}</text>')
        parts.append(
            f'<line class="whisker" x1="{across(interval[0]):.1f}" x2="{across(interval[1]):.1f}" y1="{y}" y2="{y}"/>'
        )
        parts.append(
            f'<circle class="dot" cx="{across(value):.1f}" cy="{y}" r="5"><title>{escape(said)}</title></circle>'
        )
    for value in (low + room, 0.0, high - room):
        if value == 0.0 or abs(across(value) - across(0)) > 70:
            said = words.points(value)
            parts.append(
                f'<text class="tick" x="{across(value):.1f}" y="{height - 10}" text-anchor="middle">{said}</text>'
            )
    return _svg(title, parts, height)


class _Scale:
    """Values to heights on the page, with rounded grid lines."""

    def __init__(self, low: float, high: float, height: int) -> None:
        self.low, self.high = (low, high) if high > low else (low, low + 1)
        self.top, self.bottom = TOP, height - BOTTOM

    def __call__(self, value: float) -> float:
        return self.bottom - (value - self.low) / (self.high - self.low) * (self.bottom - self.top)

    def axis(self, name: str) -> str:
        lines = []
        for part in range(5):
            value = self.low + part / 4 * (self.high - self.low)
            y = self(value)
            lines.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
            lines.append(f'<text class="tick" x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{value:.3g}</text>')
        middle = (self.top + self.bottom) / 2
        turned = f'transform="rotate(-90 14 {middle})"'
        return "".join(
            [*lines, f'<text class="tick" x="14" y="{middle}" text-anchor="middle" {turned}>{escape(name)}</text>']
        )


def _svg(title: str, parts: Sequence[str], height: int) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(title, quote=True)}">'
        f"<title>{escape(title)}</title>{''.join(parts)}</svg>"
    )
