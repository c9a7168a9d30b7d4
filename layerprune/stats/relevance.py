"""Relevance: the share of a model's accuracy above chance that is lost with a removal (arXiv:2605.14075)."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from layerprune.stats.exact import Correct, paired_bits
from layerprune.stats.intervals import Bounds, Interval, quantile


def relevance(accuracy: float, base: float, chance: float) -> float:
    """Return ``1 - (accuracy - chance) / (base - chance)``: 0 nothing lost, 1 at chance, negative: it helped.

    Above 1 below chance, so that it stays a mean over items; ``clipped`` is for display. Raises ``ValueError`` unless
    the base is above chance; callers refuse such a task by name long before.
    """
    if base <= chance:
        raise ValueError(f"relevance needs a base above chance: accuracy {base:.4f}, chance {chance:.4f}")
    return 1 - (accuracy - chance) / (base - chance)


def clipped(relevance: float) -> float:
    """Return a relevance for display, at most 1: no more than all of the accuracy above chance can be lost."""
    return min(relevance, 1.0)


def displayed(score: float, unit: str, metric: str) -> float:
    """Return a metric's score for tables and plots: a relevance clipped; losses of margin have no limit."""
    return clipped(score) if unit == "relevance" and "signal=margin" not in metric else score


def relevance_interval(base: Correct, other: Correct, chance: float, confidence: float = 0.95) -> Interval:
    """Return the interval of the relevance of what turns ``base`` into ``other``, paired over the items."""
    first, second = paired_bits(base, other)
    cells = ((first & second).sum(), (first & ~second).sum(), (~first & second).sum())
    return relevance_intervals(*cells, first.size, chance, confidence).pairs()[0]


def relevance_intervals(
    both_right: ArrayLike,
    right_to_wrong: ArrayLike,
    wrong_to_right: ArrayLike,
    items: ArrayLike,
    chance: ArrayLike,
    confidence: float = 0.95,
) -> Bounds:
    """Return the same intervals for many removals at once, from counts (arrays that broadcast).

    Fieller's interval (Fieller 1954) for the ratio of two paired means, with one flip added in each direction, as
    Bonett & Price (2012) do for differences: without it no flips would give a width of zero. Limits are cut to what
    relevance can be beside the base accuracy seen, from ``1 - (1 - chance) / (base - chance)`` (all answers right)
    to ``1 + chance / (base - chance)`` (all wrong); where the base is too close to chance to bound the ratio, that
    whole range is returned.
    """
    cells = (both_right, right_to_wrong, wrong_to_right, items, chance)
    both, lost, won, total, guess = np.broadcast_arrays(*(np.asarray(cell, dtype=float) for cell in cells))
    base = (both + lost) / total
    if (base <= guess).any():
        raise ValueError("relevance needs a base above chance")
    count = total + 2  # the two added items
    mean_base, mean_other = (both + lost + 1) / count, (both + won + 1) / count
    squared = quantile(confidence) ** 2 / count
    above_base, above_other = mean_base - guess, mean_other - guess
    a = above_base**2 - squared * mean_base * (1 - mean_base)
    b = above_base * above_other - squared * (both / count - mean_base * mean_other)
    c = above_other**2 - squared * mean_other * (1 - mean_other)
    bounded = a > 0
    root = np.sqrt(np.maximum(b * b - a * c, 0))
    safe = np.where(bounded, a, 1.0)
    least, most = 1 - (1 - guess) / (base - guess), 1 + guess / (base - guess)
    low = np.where(bounded, np.clip(1 - (b + root) / safe, least, most), least)
    high = np.where(bounded, np.clip(1 - (b - root) / safe, least, most), most)
    point = 1 - ((both + won) / total - guess) / (base - guess)
    return Bounds(np.minimum(low, point), np.maximum(high, point))  # the added items can shift the interval off it
