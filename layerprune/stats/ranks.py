"""How far two rankings of the same layers agree, beside what chance would give."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


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
        misplaced_share=1 - float(np.trace(confusion(first, second))) / n,
        misplaced_by_chance=1 - 1 / n,
        spearman_spread=1 / float(np.sqrt(n - 1)),
    )


def correlations(fixed: Sequence[float] | Floats, drawn: Floats) -> dict[str, Floats]:
    """Return spearman, kendall (tau-b) and pearson of one score with many others at once; nan where one is constant.

    ``fixed`` is (units,) or one row a draw, ``drawn`` (draws, units); the results are (draws,). Meant for resampling:
    ``rank_agreement`` is scipy's own, row by row, and a test holds the two together.
    """
    from scipy.stats import rankdata

    other = np.atleast_2d(np.asarray(drawn, dtype=float))
    one = np.broadcast_to(np.asarray(fixed, dtype=float), other.shape)
    return {
        "spearman": _pearson(rankdata(one, axis=1), rankdata(other, axis=1)),
        "kendall": _cosine(_pair_signs(one), _pair_signs(other)),
        "pearson": _pearson(one, other),
    }


def confusion(a: Sequence[float] | Floats, b: Sequence[float] | Floats) -> Floats:
    """Return how many units stand at position i by ``a`` and at position j by ``b``, (positions, positions).

    Ties are broken at random, in expectation, so entries need not be whole; every row and column adds up to 1.
    """
    return _placements(np.asarray(a, dtype=float)).T @ _placements(np.asarray(b, dtype=float))


@dataclass(frozen=True)
class Overlap:
    """How many of the ``count`` lowest units two scores have in common, beside what unrelated scores would share."""

    count: int
    shared: float  # in expectation where ties reach over the border
    by_chance: float  # count^2 / n
    chance_interval: tuple[float, float]  # 95 % of unrelated rankings share that many (hypergeometric)


def overlap(a: Sequence[float] | Floats, b: Sequence[float] | Floats, count: int) -> Overlap:
    """Compare the ``count`` lowest units of two scores; raises ``ValueError`` unless there are that many."""
    from scipy.stats import hypergeom

    first, second = (_placements(np.asarray(scores, dtype=float))[:, :count].sum(axis=1) for scores in (a, b))
    if not 1 <= count <= first.size:
        raise ValueError(f"the {count} lowest of {first.size} units is not possible")
    low, high = hypergeom(first.size, count, count).interval(0.95)
    return Overlap(count, float(first @ second), count * count / first.size, (float(low), float(high)))


def _placements(scores: Floats) -> Floats:
    """Return how likely each unit stands at each position, lowest first, when ties are broken at random."""
    start = (scores[None, :] < scores[:, None]).sum(axis=1)
    size = (scores[None, :] == scores[:, None]).sum(axis=1)
    position = np.arange(scores.size)
    inside = (position >= start[:, None]) & (position < (start + size)[:, None])
    placed: Floats = inside / size[:, None]
    return placed


def _pearson(a: Floats, b: Floats) -> Floats:
    return _cosine(a - a.mean(axis=1, keepdims=True), b - b.mean(axis=1, keepdims=True))


def _cosine(a: Floats, b: Floats) -> Floats:
    """Return the cosine of each pair of rows; nan where one of them is zero."""
    length = np.sqrt((a * a).sum(axis=1) * (b * b).sum(axis=1))
    product: Floats = (a * b).sum(axis=1)
    cosine: Floats = np.divide(product, length, out=np.full(length.shape, np.nan), where=length > 0)
    return cosine


def _pair_signs(scores: Floats) -> Floats:
    """Return the order of each pair of units as -1, 0 or 1, (draws, pairs): tau-b is the cosine of two such rows."""
    i, j = np.triu_indices(scores.shape[1], k=1)
    signs: Floats = np.sign(scores[:, i] - scores[:, j])
    return signs
