"""Which candidates still need more items: a race in which one leaves as soon as its place is clear, either way.

All candidates answer the same items, block after block, in an order that has nothing to do with the answers. What the
full data would say of two candidates is known up to the items not yet seen: of N items, n seen with mean paired
difference m and spread s, the mean over all N has the opposite sign with probability about Phi(-z),
``z = (m / (s / sqrt(n))) * sqrt(N / (N - n))`` (sampling without replacement; at n = N nothing is left to chance).

A candidate that ``keep`` others are clearly ahead of cannot be among the ``keep`` best: it is out. One that is clearly
ahead of all but ``keep - 1`` others is among them: it is in, and needs no more items either. The race is over when all
places are taken.

Guarantee: with probability at least ``1 - error`` the ``keep`` candidates that the full data would put first are the
ones the race ends with. The error is divided by the looks and by the candidates (Bonferroni), the normal law is an
approximation; ``tests/test_racing.py`` holds it against simulations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


class Place(Enum):
    """What is known of a candidate."""

    IN = "in"  # among the best, by all that can be told
    OPEN = "open"
    OUT = "out"


@dataclass(frozen=True)
class Race:
    """One round: ``candidates`` run over ``items`` items, ``keep`` of them win; decisions are taken ``looks`` times."""

    candidates: int
    items: int
    keep: int
    looks: int
    error: float = 0.05

    @property
    def threshold(self) -> float:
        """How many standard errors one candidate must be behind another to be clearly behind it."""
        comparisons = self.looks * max(1, self.candidates - 1)
        return NormalDist().inv_cdf(1 - self.error / comparisons)

    def places(self, harms: Floats, keep: int) -> list[Place]:
        """Return what the items seen say of each candidate in the race; ``keep`` places are still to be taken.

        ``harms`` is (candidates, items seen), harm per item in any unit that adds up to the score. While there are
        fewer than two items to see a spread, everyone stays open; once all are seen, too: the caller has the full data.
        """
        count, seen = harms.shape
        if keep <= 0 or count <= keep:
            return [Place.OUT if keep <= 0 else Place.IN] * count
        if seen < 2 or seen >= self.items:
            return [Place.OPEN] * count
        behind = self.clearly_behind(harms)
        losses, wins = behind.sum(axis=1), behind.sum(axis=0)
        return [
            Place.OUT if lost >= keep else Place.IN if won >= count - keep else Place.OPEN
            for lost, won in zip(losses, wins, strict=True)
        ]

    def clearly_behind(self, harms: Floats) -> NDArray[np.bool_]:
        """Return (candidates, candidates): whether the row's is clearly more harmful than the column's.

        A spread of no differences at all would be no spread: one item more is counted as differing as much as any could
        by the harms seen, so that a lead of a single item never looks certain.
        """
        seen = harms.shape[1]
        mean, high, low = harms.mean(axis=1), harms.max(axis=1), harms.min(axis=1)
        centred = harms - mean[:, None]
        products = centred @ centred.T
        own = np.diag(products)
        squares = np.maximum(own[:, None] + own[None] - 2 * products, 0.0)  # of the centred paired differences
        largest = np.maximum(np.abs(high[:, None] - low[None]), np.abs(high[None] - low[:, None]))
        deviation = np.sqrt((squares + largest**2) / seen / seen * (1 - seen / self.items))  # of a mean difference
        behind: NDArray[np.bool_] = mean[:, None] - mean[None] > self.threshold * deviation
        return behind


@dataclass
class Field:
    """Who is still running, by number, and who is in; ``settle`` takes in one look's verdicts."""

    race: Race
    running: list[int]
    accepted: list[int]

    @classmethod
    def of(cls, race: Race) -> Field:
        """Everyone at the start."""
        return cls(race, list(range(race.candidates)), [])

    @property
    def over(self) -> bool:
        """Whether all places are taken."""
        return not self.running

    def settle(self, harms: Floats) -> Sequence[int]:
        """Take out whoever's place is clear, given the harms of those running; return who left, in or out."""
        left = []
        while self.running:  # one verdict may leave no places, or no rivals, for the rest
            places = self.race.places(harms, self.race.keep - len(self.accepted))
            if all(place is Place.OPEN for place in places):
                break
            self.accepted += [c for c, place in zip(self.running, places, strict=True) if place is Place.IN]
            left += [c for c, place in zip(self.running, places, strict=True) if place is not Place.OPEN]
            still = [index for index, place in enumerate(places) if place is Place.OPEN]
            self.running, harms = [self.running[index] for index in still], harms[still]
        return left
