"""Which candidates still need more items: a race in which one leaves as soon as its place is clear, either way.

All candidates answer the same items, block after block, in an order that has nothing to do with the answers. Of N items
of a task n were seen, with mean paired difference m and spread s; the score is a mean over all items, so that tasks
count by their share of them, and what the full data would say of two candidates is known up to the items not yet seen:
its sign is another with probability about Phi(-z), ``z = sum(w m) / sqrt(sum((w s)^2 / n (1 - n / N)))`` over the
tasks, ``w`` their shares (a stratified sample without replacement; where all is seen nothing is left to chance). Tasks
are not pooled: an item of a short task stands for more, and a few of them may not have shown what is lost there.

A candidate that ``keep`` others are clearly ahead of cannot be among the ``keep`` best: it is out. One that is clearly
ahead of all but ``keep - 1`` others is among them: it is in, and needs no more items either. The race is over when all
places are taken.

Aim: with probability at least ``1 - error`` the ``keep`` candidates that the full data would put first are the
ones the race ends with. A wrong end takes one of those that the full data keep to be called clearly behind one of those
that they do not: the error is divided by the looks and by the number of such pairs (Bonferroni). The normal law is an
approximation; ``tests/scoring/test_racing.py`` holds the aim against simulations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

# Nothing is decided before so many items of every task were seen, or all of a shorter one: of fewer, a spread says
# little, and a loss that shows in every third item may not have shown.
LEAST_ITEMS = 10


class Place(Enum):
    """What is known of a candidate."""

    IN = "in"  # among the best, by all that can be told
    OPEN = "open"
    OUT = "out"


@dataclass
class Race:
    """One round: ``keep`` of the candidates win; decisions are taken ``looks`` times, each by ``settle``."""

    candidates: int
    items: tuple[int, ...]  # of each task
    keep: int
    looks: int
    error: float = 0.05
    running: list[int] = field(init=False)  # by number; the race is over when none is left
    accepted: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.running, self.accepted = list(range(self.candidates)), []

    @property
    def threshold(self) -> float:
        """How many standard errors one candidate must be behind another to be clearly behind it."""
        pairs = max(1, self.keep * (self.candidates - self.keep))
        return NormalDist().inv_cdf(1 - self.error / (self.looks * pairs))

    def places(self, importances: Sequence[Floats], keep: int) -> list[Place]:
        """Return what the items seen say of each candidate in the race; ``keep`` places are still to be taken.

        ``importances`` holds (candidates, items seen) of each task, importance per item in any unit whose mean over all
        items adds up to the score. While a task has shown too few items everyone stays open; once all are seen, too:
        the caller has the full data.
        """
        count = len(importances[0])
        if keep <= 0 or count <= keep:
            return [Place.OUT if keep <= 0 else Place.IN] * count
        seen = [own.shape[1] for own in importances]
        enough = all(some >= min(LEAST_ITEMS, every) for some, every in zip(seen, self.items, strict=True))
        if not enough or sum(seen) >= sum(self.items):
            return [Place.OPEN] * count
        # how large a difference may be cannot be told while a task with items to come has shown none
        if any(own.shape[1] < items and np.ptp(own) == 0 for own, items in zip(importances, self.items, strict=True)):
            return [Place.OPEN] * count
        behind = self.clearly_behind(importances)
        losses, wins = behind.sum(axis=1), behind.sum(axis=0)
        return [
            Place.OUT if lost >= keep else Place.IN if won >= count - keep else Place.OPEN
            for lost, won in zip(losses, wins, strict=True)
        ]

    def clearly_behind(self, importances: Sequence[Floats]) -> NDArray[np.bool_]:
        """Return (candidates, candidates): whether the row's is clearly more harmful than the column's."""
        count, total = len(importances[0]), sum(self.items)
        lead, variance = np.zeros((count, count)), np.zeros((count, count))
        for own, items in zip(importances, self.items, strict=True):
            seen, share = own.shape[1], items / total
            lead += share * (own.mean(axis=1)[:, None] - own.mean(axis=1)[None])
            variance += share**2 * _squares(own) / seen / seen * (1 - seen / items)
        behind: NDArray[np.bool_] = lead > self.threshold * np.sqrt(variance)
        return behind

    def settle(self, importances: Sequence[Floats]) -> list[int]:
        """Take out whoever's place is clear, given the importances of those running; return who left, in or out."""
        left: list[int] = []
        while self.running:  # one verdict may leave no places, or no rivals, for the rest
            places = self.places(importances, self.keep - len(self.accepted))
            if all(place is Place.OPEN for place in places):
                break
            self.accepted += [c for c, place in zip(self.running, places, strict=True) if place is Place.IN]
            left += [c for c, place in zip(self.running, places, strict=True) if place is not Place.OPEN]
            still = [index for index, place in enumerate(places) if place is Place.OPEN]
            self.running, importances = [self.running[index] for index in still], [own[still] for own in importances]
        return left


def _squares(importances: Floats) -> Floats:
    """Return (candidates, candidates) sums of squares of the paired differences around their means.

    A spread of no differences at all would be no spread: one item more is counted as differing as much as any two of
    the task's importances do, whosever they are: two candidates that did alike so far are not taken to do so for ever.
    """
    centred = importances - importances.mean(axis=1)[:, None]
    products = centred @ centred.T
    own = np.diag(products)
    squares: Floats = np.maximum(own[:, None] + own[None] - 2 * products, 0.0) + np.ptp(importances) ** 2
    return squares
