"""Exact tests on right and wrong answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Correct = str | Sequence[bool] | NDArray[np.bool_]  # '1' right, '0' wrong, one entry an item


def as_bits(correct: Correct) -> NDArray[np.bool_]:
    """Return outcomes as booleans; raises ``ValueError`` for a string with anything but 0 and 1."""
    if isinstance(correct, str):
        codes = np.frombuffer(correct.encode(), dtype=np.uint8) - ord("0")
        if codes.size and codes.max() > 1:
            raise ValueError("outcomes are written with the characters 0 and 1 only")
        return codes.astype(bool)
    return np.asarray(correct, dtype=bool)


def paired_bits(base: Correct, other: Correct) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Return both outcomes as booleans; raises ``ValueError`` unless they are of one length and not empty."""
    first, second = as_bits(base), as_bits(other)
    if first.shape != second.shape or first.size == 0:
        raise ValueError(f"paired outcomes need the same items: got {first.size} and {second.size}")
    return first, second


def above_chance(correct: Correct, chances: Sequence[float]) -> float:
    """Return the one-sided exact p-value of "the model only guesses".

    Under guessing the number of right answers is Poisson-binomial over the items' own chances (an item with three
    choices counts 1/3). Items of equal chance are one binomial; the few binomials are convolved directly, so the tail
    keeps its relative precision. With a chance of zero everywhere one right answer gives p = 0.
    """
    from scipy.stats import binom

    bits, odds = as_bits(correct), np.asarray(chances, dtype=float)
    if bits.shape != odds.shape or bits.size == 0:
        raise ValueError(f"{bits.size} outcomes and {odds.size} chances: one chance per item is needed")
    if odds.min() < 0 or odds.max() > 1:
        raise ValueError("a chance is a probability between 0 and 1")
    mass = np.ones(1)
    for chance, items in zip(*np.unique(odds, return_counts=True), strict=True):
        mass = np.convolve(mass, binom.pmf(np.arange(items + 1), items, chance))
    return float(min(1.0, mass[int(bits.sum()) :].sum()))


@dataclass(frozen=True)
class McNemar:
    """Flips between two models on the same items, and the exact two-sided p-value of "flips go both ways alike"."""

    right_to_wrong: int
    wrong_to_right: int
    p_value: float


def mcnemar(base: Correct, other: Correct) -> McNemar:
    """Return the exact McNemar test (binomial on the flipped items; McNemar 1947); without flips p = 1."""
    from scipy.stats import binom

    first, second = paired_bits(base, other)
    lost, won = int((first & ~second).sum()), int((~first & second).sum())
    p_value = min(1.0, 2 * float(binom.cdf(min(lost, won), lost + won, 0.5)))
    return McNemar(lost, won, p_value)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return Holm's step-down adjusted p-values in the given order (Holm 1979): they control the family-wise error."""
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    adjusted, running = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        running = max(running, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = running
    return adjusted
