"""How far two rankings of the same layers agree, and how far one would repeat on other items."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# How far two rankings of the same layers agree, beside what chance would give.


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


# What each unit's removal loses, item by item: means, resamples, and how far the ranking would repeat on other items.
#
# Split-half reliability (Spearman 1910; Brown 1910): two random halves of the items rank the units; the mean
# correlation r of the halves' rankings, stepped up to the whole by 2r / (1 + r), is the correlation to expect with the
# ranking that as many other items would give. No score can be expected to agree better with a measured ranking than the
# square root of its reliability.


Losses = Mapping[str, Floats]  # by task, (items, units): lost without the unit, as a share of the task's level

TARGET = 0.9  # the least that decisions about single cases should rest on (Nunnally 1978, Psychometric Theory)


@dataclass(frozen=True)
class Reliability:
    """How well the ranking by mean loss repeats; None where no half ranks anything (all losses equal)."""

    items: int
    splits: int
    halves: float | None  # mean Spearman between the rankings of two halves
    whole: float | None  # the same for two sets of all the items: 2r / (1 + r), r where it is below 0
    items_needed: int | None  # items for a reliability of TARGET (Spearman-Brown); None: no end in sight


def mean_losses(losses: Losses) -> Floats:
    """Return each unit's loss, the mean over the tasks of the mean over the items, (units,)."""
    means: Floats = np.mean([lost.mean(axis=0) for lost in losses.values()], axis=0)
    return means


def resampled_losses(losses: Losses, draws: int, seed: int) -> Floats:
    """Return the same from bootstrap samples of each task's items, (draws, units)."""
    rng = np.random.default_rng(seed)
    total: Floats = np.zeros((draws, 1))
    for lost in losses.values():
        items = len(lost)
        counts = rng.multinomial(items, np.full(items, 1 / items), size=draws)  # how often each item is drawn
        total = total + counts @ lost / items
    return total / len(losses)


def half_losses(losses: Losses, splits: int, seed: int) -> tuple[Floats, Floats]:
    """Return the losses on the two halves of random splits of each task's items, (splits, tasks, units) each."""
    if min(len(lost) for lost in losses.values()) < 2:
        raise ValueError("a half needs an item: each task needs at least 2")
    rng = np.random.default_rng(seed)
    first, second = [], []
    for lost in losses.values():
        items = len(lost)
        size = (items + rng.integers(2, size=splits)) // 2  # an odd item goes to either half
        place = np.argsort(rng.random((splits, items)), axis=1)
        chosen = (place < size[:, None]).astype(float)
        first.append(chosen @ lost / size[:, None])
        second.append((1 - chosen) @ lost / (items - size)[:, None])
    return np.stack(first, axis=1), np.stack(second, axis=1)


def stepped(reliability: float, factor: float) -> float:
    """Return the reliability on ``factor`` times the items: k r / (1 + (k - 1) r) (Spearman 1910; Brown 1910)."""
    return factor * reliability / (1 + (factor - 1) * reliability)


def split_half(
    losses: Losses, splits: int = 200, seed: int = 0, combine: Callable[[Floats], Floats] = lambda it: it.mean(axis=1)
) -> Reliability:
    """Return the split-half reliability of the units' ranking; raises ``ValueError`` under two items.

    ``combine`` makes one loss of those of all tasks, (splits, tasks, units) to (splits, units); the mean by default.
    """
    one, other = (combine(halves) for halves in half_losses(losses, splits, seed))
    agreed = correlations(one, other)["spearman"]
    known = agreed[np.isfinite(agreed)]
    items = sum(len(lost) for lost in losses.values())
    if not known.size:
        return Reliability(items, splits, None, None, None)
    halves = float(known.mean())
    whole = stepped(halves, 2) if halves > 0 else halves  # more of nothing is nothing: below 0 there is no law
    needed = int(np.ceil(items * TARGET * (1 - whole) / (whole * (1 - TARGET)))) if whole > 0 else None
    return Reliability(items, splits, halves, whole, needed)
