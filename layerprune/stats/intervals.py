"""Exact tests, confidence intervals for paired differences, and relevance (arXiv:2605.14075)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray

# Confidence intervals for paired differences.
#
# Accuracy: Tango's score interval (Tango 1998, Statistics in Medicine 17:891), which depends on the flip counts alone.
# A bootstrap was not chosen for it: with few flips (a removal that changes two answers of 200) resampling covers far
# less than it claims, and with none it returns a width of zero; tests/test_stats_intervals.py measures both.
# Task intervals are joined by MOVER (Zou & Donner 2008, Statistics in Medicine 27:1693), which keeps their asymmetry.
# Everything that is not right-or-wrong (probabilities, nats): stratified BCa bootstrap (Efron 1987).


Interval = tuple[float, float]
Floats = NDArray[np.float64]

_HALVINGS = 50  # bisection from a width of at most 2 to 2e-15
_RESAMPLES = 4000  # the 2.5 % quantile of 4000 draws wanders by about 0.0025 of probability
_DRAWS_AT_ONCE = 4_000_000  # indices drawn in one go: 32 MB


def quantile(confidence: float) -> float:
    """Return the two-sided normal quantile: 1.96 for 0.95."""
    if not 0 < confidence < 1:
        raise ValueError(f"confidence {confidence} is not between 0 and 1")
    return NormalDist().inv_cdf(0.5 + confidence / 2)


def paired_interval(base: Correct, other: Correct, confidence: float = 0.95) -> Interval:
    """Return the interval of accuracy(other) - accuracy(base) on the same items; negative: other is worse."""
    low, high = paired_intervals(*flips(base, other), confidence)
    return float(low), float(high)


def paired_intervals(
    right_to_wrong: ArrayLike, wrong_to_right: ArrayLike, items: ArrayLike, confidence: float = 0.95
) -> tuple[Floats, Floats]:
    """Return the limits of many such intervals at once, from counts of flips (arrays that broadcast)."""
    counts = (np.asarray(x, dtype=float) for x in (right_to_wrong, wrong_to_right, items))
    lost, won, total = np.broadcast_arrays(*counts)
    if (total <= 0).any() or (lost < 0).any() or (won < 0).any() or (lost + won > total).any():
        raise ValueError("flip counts must be whole numbers from 0 to the number of items, which must be positive")
    z = quantile(confidence)
    return _lower_limit(lost, won, total, z), 0 - _lower_limit(won, lost, total, z)


def _lower_limit(lost: Floats, won: Floats, items: Floats, z: float) -> Floats:
    """Return the least difference that the flips seen are compatible with, by bisection."""
    inner = (won - lost) / items
    low = np.full_like(inner, -1.0)
    for _ in range(_HALVINGS):
        middle = (low + inner) / 2
        above, variance = score_parts(won, lost, items, middle)
        outside = above - z * np.sqrt(np.maximum(items * variance, 0)) > 0  # still too far below to be compatible
        low, inner = np.where(outside, middle, low), np.where(outside, inner, middle)
    return low


def score_parts(more: Floats, less: Floats, items: float | Floats, difference: float | Floats) -> tuple[Floats, Floats]:
    """Return numerator and variance, per item, of Tango's score statistic of a ``difference`` of paired shares.

    The share is ``(more - less) / items``; the variance is that of the likeliest flips with exactly this difference.
    """
    b = (2 * items - more + less) * difference - more - less
    c = -less * difference * (1 - difference)
    restricted = (np.sqrt(np.maximum(b * b - 8 * items * c, 0)) - b) / (4 * items)  # P(a flip to less)
    return more - less - items * difference, 2 * restricted + difference * (1 - difference)


def counted_interval(values: ArrayLike, confidence: float = 0.95) -> Interval:
    """Return the interval of the mean of whole numbers, one an item, such as differences of several flips.

    Normal, with one item of +1 and one of -1 added, as Bonett & Price (2012) do for paired proportions: without them no
    flips would give a width of zero. The mean itself is always inside.
    """
    given = np.asarray(values, dtype=float)
    if given.ndim != 1 or given.size == 0:
        raise ValueError(f"the mean of {given.size} values in {given.ndim} dimensions has no interval")
    padded = np.append(given, (1.0, -1.0))
    half = quantile(confidence) * float(padded.std(ddof=1)) / math.sqrt(padded.size)
    point, middle = float(given.mean()), float(padded.mean())
    return min(point, middle - half), max(point, middle + half)


def mean_interval(
    estimates: Sequence[float], intervals: Sequence[Interval], weights: Sequence[float] | None = None
) -> Interval:
    """Return the MOVER interval of a weighted mean of independent estimates (plain mean by default)."""
    if not estimates or len(estimates) != len(intervals):
        raise ValueError(f"{len(estimates)} estimates and {len(intervals)} intervals: one each is needed")
    share = np.full(len(estimates), 1.0) if weights is None else np.asarray(weights, dtype=float)
    share = share / share.sum()
    point, limits = np.asarray(estimates, dtype=float), np.asarray(intervals, dtype=float)
    middle = float(share @ point)
    down, up = (float(np.sqrt(((share * (point - limits[:, side])) ** 2).sum())) for side in (0, 1))
    return middle - down, middle + up


def bootstrap_interval(
    strata: Sequence[ArrayLike],
    weights: Sequence[float] | None = None,
    confidence: float = 0.95,
    *,
    seed: int = 0,
    resamples: int = _RESAMPLES,
) -> Interval:
    """Return the BCa interval of the weighted mean of the strata's means; items are resampled within their stratum.

    Pass per-item differences of two models for a paired interval. Equal weights by default (mean of task means).
    """
    groups = [np.asarray(values, dtype=float) for values in strata]
    if not groups or any(values.ndim != 1 or values.size < 2 for values in groups):
        raise ValueError("each stratum needs at least two items in one dimension")
    share = np.full(len(groups), 1.0) if weights is None else np.asarray(weights, dtype=float)
    share = share / share.sum()
    centred = [part * (values - values.mean()) for part, values in zip(share, groups, strict=True)]
    estimate = float(sum(part * values.mean() for part, values in zip(share, groups, strict=True)))
    rng = np.random.default_rng(seed)
    drawn = np.sort(sum((_resampled_means(values, resamples, rng) for values in centred), np.zeros(resamples)))
    if drawn[0] == drawn[-1]:
        return estimate, estimate
    influence = np.concatenate([values / values.size for values in centred])
    skew = float((influence**3).sum() / (6 * (influence**2).sum() ** 1.5))
    low, high = _bca_limits(drawn, skew, confidence)
    return estimate + low, estimate + high


def _resampled_means(values: Floats, resamples: int, rng: np.random.Generator) -> Floats:
    """Return means of resamples of ``values``, drawn in chunks that fit into memory."""
    chunk = max(1, _DRAWS_AT_ONCE // values.size)
    sizes = [min(chunk, resamples - start) for start in range(0, resamples, chunk)]
    return np.concatenate([values[rng.integers(values.size, size=(size, values.size))].mean(axis=1) for size in sizes])


def _bca_limits(drawn: Floats, skew: float, confidence: float) -> Interval:
    """Return bias-corrected and accelerated limits of sorted draws around zero (Efron 1987, eq. 2.3)."""
    normal = NormalDist()
    below = ((drawn < 0).sum() + 0.5 * (drawn == 0).sum() + 0.5) / (drawn.size + 1)  # kept off 0 and 1
    bias = normal.inv_cdf(float(below))
    limits = []
    for z in (-quantile(confidence), quantile(confidence)):
        shifted = bias + z
        level = normal.cdf(bias + shifted / max(1 - skew * shifted, 1e-9))
        limits.append(float(np.quantile(drawn, level)))
    return limits[0], limits[1]


# Exact tests on right and wrong answers.


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


def flips(base: Correct, other: Correct) -> tuple[int, int, int]:
    """Return how many answers turn from right to wrong and from wrong to right, and the number of items."""
    first, second = paired_bits(base, other)
    return int((first & ~second).sum()), int((~first & second).sum()), first.size


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

    lost, won, _ = flips(base, other)
    return McNemar(lost, won, min(1.0, 2 * float(binom.cdf(min(lost, won), lost + won, 0.5))))


def holm(p_values: Sequence[float]) -> list[float]:
    """Return Holm's step-down adjusted p-values in the given order (Holm 1979): they control the family-wise error."""
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    adjusted, running = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        running = max(running, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = running
    return adjusted


# Relevance: the share of a model's accuracy above chance that is lost with a removal (arXiv:2605.14075).


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
    low, high = relevance_intervals((first & second).sum(), *flips(first, second), chance, confidence)
    return float(low), float(high)


def relevance_intervals(
    both_right: ArrayLike,
    right_to_wrong: ArrayLike,
    wrong_to_right: ArrayLike,
    items: ArrayLike,
    chance: ArrayLike,
    confidence: float = 0.95,
) -> tuple[Floats, Floats]:
    """Return the limits of many such intervals at once, from counts (arrays that broadcast).

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
    return np.minimum(low, point), np.maximum(high, point)  # the added items can shift the interval off it
