"""Confidence intervals for paired differences.

Accuracy: Tango's score interval (Tango 1998, Statistics in Medicine 17:891), which depends on the flip counts alone.
A bootstrap was not chosen for it: with few flips (a removal that changes two answers of 200) resampling covers far
less than it claims, and with none it returns a width of zero; tests/test_stats_intervals.py measures both.
Task intervals are joined by MOVER (Zou & Donner 2008, Statistics in Medicine 27:1693), which keeps their asymmetry.
Everything that is not right-or-wrong (probabilities, nats): stratified BCa bootstrap (Efron 1987).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray

from layerprune.stats.exact import Correct, paired_bits

Interval = tuple[float, float]
Floats = NDArray[np.float64]

_HALVINGS = 50  # bisection from a width of at most 2 to 2e-15
_RESAMPLES = 4000  # the 2.5 % quantile of 4000 draws wanders by about 0.0025 of probability
_DRAWS_AT_ONCE = 4_000_000  # indices drawn in one go: 32 MB


@dataclass(frozen=True)
class Bounds:
    """Lower and upper limits as arrays, one entry a comparison."""

    low: Floats
    high: Floats

    def pairs(self) -> list[Interval]:
        return list(zip(self.low.ravel().tolist(), self.high.ravel().tolist(), strict=True))


def quantile(confidence: float) -> float:
    """Return the two-sided normal quantile: 1.96 for 0.95."""
    if not 0 < confidence < 1:
        raise ValueError(f"confidence {confidence} is not between 0 and 1")
    return NormalDist().inv_cdf(0.5 + confidence / 2)


def paired_interval(base: Correct, other: Correct, confidence: float = 0.95) -> Interval:
    """Return the interval of accuracy(other) - accuracy(base) on the same items; negative: other is worse."""
    first, second = paired_bits(base, other)
    limits = paired_intervals((first & ~second).sum(), (~first & second).sum(), first.size, confidence)
    return limits.pairs()[0]


def paired_intervals(
    right_to_wrong: ArrayLike, wrong_to_right: ArrayLike, items: ArrayLike, confidence: float = 0.95
) -> Bounds:
    """Return the same intervals for many comparisons at once, from counts of flips (arrays that broadcast)."""
    counts = (np.asarray(x, dtype=float) for x in (right_to_wrong, wrong_to_right, items))
    lost, won, total = np.broadcast_arrays(*counts)
    if (total <= 0).any() or (lost < 0).any() or (won < 0).any() or (lost + won > total).any():
        raise ValueError("flip counts must be whole numbers from 0 to the number of items, which must be positive")
    z, seen = quantile(confidence), (won - lost) / total
    low, high = np.full_like(seen, -1.0), np.full_like(seen, 1.0)
    low_inner, high_inner = seen.copy(), seen.copy()
    for _ in range(_HALVINGS):
        middle = (low + low_inner) / 2
        outside = _score_excess(middle, lost, won, total, z) > 0  # still too far below to be compatible
        low, low_inner = np.where(outside, middle, low), np.where(outside, low_inner, middle)
        middle = (high + high_inner) / 2
        outside = _score_excess(-middle, won, lost, total, z) > 0
        high, high_inner = np.where(outside, middle, high), np.where(outside, high_inner, middle)
    return Bounds(low, high)


def _score_excess(difference: Floats, lost: Floats, won: Floats, items: Floats, z: float) -> Floats:
    """Return how far the seen difference lies above ``difference`` beyond z of its restricted standard errors."""
    b = (2 * items - won + lost) * difference - won - lost
    c = -lost * difference * (1 - difference)
    restricted = (np.sqrt(np.maximum(b * b - 8 * items * c, 0)) - b) / (4 * items)  # P(right to wrong) under the limit
    variance = np.maximum(items * (2 * restricted + difference * (1 - difference)), 0)
    excess: Floats = won - lost - items * difference - z * np.sqrt(variance)
    return excess


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
