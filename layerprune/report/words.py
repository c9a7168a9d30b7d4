"""Figures as people read them; every report spells them alike."""

from __future__ import annotations

from collections.abc import Iterable

MINUS = "\N{MINUS SIGN}"


def signed(value: float, digits: int = 1) -> str:
    """Return a number with its sign: ``+1.2``, ``−0.3``, and ``0.0`` without one."""
    text = f"{abs(value):.{digits}f}"
    if float(text) == 0:
        return text
    return f"{MINUS if value < 0 else '+'}{text}"


def points(difference: float) -> str:
    """Return a difference of accuracies in points: 0.012 is ``+1.2``."""
    return signed(100 * difference)


def points_interval(interval: tuple[float, float]) -> str:
    """Return an interval of differences in points: ``−2.6 … −1.0``."""
    return f"{points(interval[0])} … {points(interval[1])}"


def percent(share: float, digits: int = 1) -> str:
    """Return a share in per cent: 0.512 is ``51.2 %``."""
    return f"{100 * share:.{digits}f} %"


def percent_change(share: float) -> str:
    """Return a relative change in per cent with its sign: -0.2 is ``−20.0 %``."""
    return f"{signed(100 * share)} %"


def accuracy(value: float) -> str:
    """Return an accuracy in points: 0.512 is ``51.2``."""
    return f"{100 * value:.1f}"


def p_value(p: float) -> str:
    """Return a p-value that never reads as zero."""
    if p >= 0.9995:
        return "1"
    return f"{p:.3f}" if p >= 0.001 else f"{p:.0e}"


def size(count: float) -> str:
    """Return bytes in decimal units: 269_000_000 is ``269 MB``."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= 0.9995 * scale:  # what three digits round up to the unit is said in it
            return f"{count / scale:.3g} {unit}"
    return f"{count:.0f} bytes"


def number(count: float) -> str:
    """Return a large count shortly: 134_515_008 is ``134.5 M``."""
    for unit, scale in (("T", 1e12), ("B", 1e9), ("M", 1e6)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count:,}"


def units(removal: Iterable[int]) -> str:
    """Return removed layers in words: ``layers 3, 5 and 11``."""
    gone = [str(layer) for layer in removal]
    return f"{'layer' if len(gone) == 1 else 'layers'} {listed(gone)}" if gone else "nothing"


def listed(words: Iterable[str]) -> str:
    """Join words as a sentence does: ``a, b and c``."""
    *most, last = [*words] or [""]
    return f"{', '.join(most)} and {last}" if most else last


def percent_interval(interval: tuple[float, float]) -> str:
    """Return an interval of shares in per cent: ``55.1 … 69.0 %``."""
    return f"{100 * interval[0]:.1f} … {percent(interval[1])}"
