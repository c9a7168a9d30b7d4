"""How far may a path of removals be followed with a guarantee: exact paired tests, in the path's order.

Learn then Test (Angelopoulos et al., arXiv:2110.01052) with fixed-sequence testing: the path (nested removals, chosen
on other items) is walked from its smallest step; a step is certified while "its accuracy loss is at least the limit" is
rejected; the first step that is not ends the walk. The chance that any certified step loses the limit or more is at
most ``1 - confidence``, whatever the model and the number of steps.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from layerprune.stats.intervals import Correct, flips, score_parts

Floats = NDArray[np.float64]

_UNCERTAIN = 1e-4  # Berger & Boos (1994): the nuisance is searched in its 99.99 % interval, 0.0001 is added to p
_MOST_ITEMS = 2**20
_GRID = 33  # points of that interval, a quarter of the nuisance's standard error apart; refined around the largest


@dataclass(frozen=True)
class PathStep:
    """One step of the path on the certification items."""

    right_to_wrong: int
    wrong_to_right: int
    items: int
    p_value: float  # of "the loss is at least the limit"
    certified: bool


@dataclass(frozen=True)
class CertifiedPath:
    """How many steps of the path are certified to lose less accuracy than the limit."""

    certified: int  # 0: not even the first step
    steps: tuple[PathStep, ...]  # up to the first step that was not certified


def certify(base: Correct, path: Iterable[Correct], limit: float, confidence: float = 0.95) -> CertifiedPath:
    """Walk ``path`` (outcomes of ever larger removals on the base's items) as far as the loss is certified.

    The items must be drawn like those the guarantee is about and must have had no say in the path. ``limit`` is in
    accuracy: 0.02 is two points. Steps beyond the first failure are not asked for:
    ``path`` may make them as it goes.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence {confidence} is not between 0 and 1")
    steps: list[PathStep] = []
    for other in path:
        flipped = flips(base, other)
        p_value = loss_p_value(*flipped, limit)
        steps.append(PathStep(*flipped, p_value, p_value <= 1 - confidence))
        if not steps[-1].certified:
            break
    return CertifiedPath(sum(step.certified for step in steps), tuple(steps))


def items_needed(right_to_wrong: int, wrong_to_right: int, items: int, limit: float, confidence: float) -> int | None:
    """Return about how many items would certify, were answers to flip as often as on these; None: no number would.

    Where one flip more or less decides, the figure may be a few items off; beyond a million it is not looked for.
    """

    def enough(count: int) -> bool:
        lost, won = (round(flips / items * count) for flips in (right_to_wrong, wrong_to_right))
        return loss_p_value(lost, won, count, limit) <= 1 - confidence

    if (right_to_wrong - wrong_to_right) / items >= limit:
        return None
    high = 1
    while not enough(high):
        high *= 2
        if high > _MOST_ITEMS:
            return None
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


@lru_cache(maxsize=4096)
def loss_p_value(right_to_wrong: int, wrong_to_right: int, items: int, limit: float) -> float:
    """Return the exact p-value of "the accuracy loss is at least ``limit``", from the flips on ``items`` items.

    Unconditional: outcomes are ordered by Tango's score statistic, and the probability of one at least as favourable
    is maximised over the unknown share of wrong-to-right flips. Cost: milliseconds, linear in ``items``.
    """
    if items < 1 or min(right_to_wrong, wrong_to_right) < 0 or right_to_wrong + wrong_to_right > items:
        raise ValueError(f"{right_to_wrong} and {wrong_to_right} flips of {items} items is not possible")
    if not 0 <= limit < 1:
        raise ValueError(f"the limit {limit} is not an accuracy loss; give 0.02 for two points")
    seen = float(score_statistic(np.array([right_to_wrong]), np.array([wrong_to_right]), items, limit)[0])
    shares = _nuisance_grid(wrong_to_right, items, limit)
    share = shares[-1]  # more wrong-to-right flips than this have a probability below 1e-13 (Bernstein's bound)
    most_won = min(items, int(items * share + 8 * np.sqrt(items * share * (1 - share))) + 40)
    most_lost = _largest_as_favourable(seen, items, limit, most_won)
    best = int(_probability(most_lost, shares, items, limit).argmax())
    finer = np.linspace(shares[max(best - 1, 0)], shares[min(best + 1, _GRID - 1)], _GRID)
    return min(1.0, float(_probability(most_lost, finer, items, limit).max()) + _UNCERTAIN)


def draw_mixture(items: Mapping[str, int], seed: int) -> dict[str, NDArray[np.int64]]:
    """Draw certification items from several tasks so that the loss certified is the mean of the tasks' losses.

    Each drawn item belongs to a task chosen at random with equal chances, which makes the outcomes independent and
    alike, as the exact test needs. As many items are drawn as the tasks' sizes allow; indices are per task, sorted.
    """
    if not items or min(items.values()) < 1:
        raise ValueError("each task needs at least one item")
    draws = smallest = min(items.values())
    if len(items) > 1:
        # The smallest task is asked for more than it has once in a million times or less. The number depends on the
        # sizes alone: stopping when a task runs out would make the last draw a biased one.
        draws = max(1, min(sum(items.values()), int(len(items) * (smallest - 5 * np.sqrt(smallest)))))
    rng = np.random.default_rng(seed)
    labels = rng.integers(len(items), size=draws)
    counts = np.bincount(labels, minlength=len(items)).tolist()
    return {
        name: np.sort(rng.permutation(size)[:count]) for (name, size), count in zip(items.items(), counts, strict=True)
    }


def score_statistic(lost: NDArray[np.generic], won: NDArray[np.generic], items: int, limit: float) -> Floats:
    """Return Tango's score statistic of ``loss - limit``; the more negative, the stronger against "at least limit"."""
    above, variance = score_parts(lost.astype(float), won.astype(float), items, limit)
    score: Floats = above / np.sqrt(items * np.maximum(variance, 1e-15))
    return score


def _largest_as_favourable(seen: float, items: int, limit: float, most_won: int) -> Floats:
    """Return for each count of wrong-to-right flips the largest count of losses that scores at most ``seen``, or -1."""
    won = np.arange(most_won + 1)
    low, high = np.full(most_won + 1, -1), items - won  # low: known to be as favourable; above high: known not to be
    while (low < high).any():
        middle = (low + high + 1) // 2
        fits = (middle < 0) | (score_statistic(np.maximum(middle, 0), won, items, limit) <= seen + 1e-9)
        low, high = np.where(fits, middle, low), np.where(fits, high, middle - 1)
    return low.astype(float)


def _nuisance_grid(won: int, items: int, limit: float) -> Floats:
    """Return probabilities of a wrong-to-right flip to try: its Clopper-Pearson interval, within what is possible."""
    from scipy.special import betaincinv

    tail = _UNCERTAIN / 2
    low = 0.0 if won == 0 else float(betaincinv(won, items - won + 1, tail))
    high = 1.0 if won == items else float(betaincinv(won + 1, items - won, 1 - tail))
    most = (1 - limit) / 2  # with a loss of exactly the limit, both flips together cannot exceed 1
    return np.linspace(min(low, most), min(high, most), _GRID)


def _probability(most_lost: Floats, shares: Floats, items: int, limit: float) -> Floats:
    """Return P(outcome at least as favourable) for each share of wrong-to-right flips, the loss being the limit."""
    from scipy.special import betainc, gammaln, xlog1py, xlogy

    won = np.arange(float(most_lost.size))
    q = shares[:, None]  # (shares, 1) against (counts of wrong to right,)
    log_choose = gammaln(items + 1) - gammaln(won + 1) - gammaln(items - won + 1)
    weight = np.exp(log_choose + xlogy(won, q) + xlog1py(items - won, -q))
    of_the_rest = np.clip((q + limit) / (1 - q), 0, 1)  # P(right to wrong | not wrong to right)
    spare = items - won - most_lost  # P(binomial <= k of n) = I(1 - p; n - k, k + 1); 1 where k = n
    below = betainc(np.maximum(spare, 1), np.maximum(most_lost, 0) + 1, 1 - of_the_rest)
    tail = np.where(most_lost < 0, 0.0, np.where(spare < 1, 1.0, below))
    probability: Floats = (weight * tail).sum(axis=1)
    return probability
