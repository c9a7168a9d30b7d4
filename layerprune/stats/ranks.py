"""How far two rankings of the same layers agree, beside what chance would give."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Agreement:
    """Agreement of two scores over the same ``n`` units; a correlation is None where one score is constant."""

    n: int
    spearman: float | None
    kendall: float | None  # tau-b
    pearson: float | None
    misplaced_share: float  # share of rank positions that hold another unit; ties broken at random, in expectation
    misplaced_by_chance: float  # the same for a random ranking: 1 - 1/n
    spearman_spread: float  # standard deviation of Spearman between unrelated rankings: 1/sqrt(n - 1)


def rank_agreement(a: Sequence[float], b: Sequence[float]) -> Agreement:
    """Compare two scores of the same units, in the same order; raises ``ValueError`` under two units."""
    from scipy import stats as scipy_stats

    first, second = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    if first.shape != second.shape or first.size < 2:
        raise ValueError(f"rank agreement needs two scores of the same units: got {first.size} and {second.size}")
    if not (np.isfinite(first).all() and np.isfinite(second).all()):
        raise ValueError("rank agreement needs finite scores")
    n, constant = first.size, bool(np.ptp(first) == 0 or np.ptp(second) == 0)

    def correlation(function: object) -> float | None:
        if constant:
            return None
        with warnings.catch_warnings():  # scipy warns about nearly constant input; the figure is still the figure
            warnings.simplefilter("ignore")
            return float(function(first, second).statistic)  # type: ignore[operator]

    return Agreement(
        n=n,
        spearman=correlation(scipy_stats.spearmanr),
        kendall=correlation(scipy_stats.kendalltau),
        pearson=correlation(scipy_stats.pearsonr),
        misplaced_share=_misplaced(first, second),
        misplaced_by_chance=1 - 1 / n,
        spearman_spread=1 / float(np.sqrt(n - 1)),
    )


def _misplaced(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """Return the expected share of positions with different units when ties are broken at random.

    A unit tied with others is equally likely at each position its group covers, so it sits at the same position in
    both rankings with probability ``overlap / (size_a * size_b)``.
    """
    in_place = 0.0
    for x, y in zip(a, b, strict=True):
        start_a, size_a = int((a < x).sum()), int((a == x).sum())
        start_b, size_b = int((b < y).sum()), int((b == y).sum())
        overlap = min(start_a + size_a, start_b + size_b) - max(start_a, start_b)
        in_place += max(overlap, 0) / (size_a * size_b)
    return 1 - in_place / a.size
