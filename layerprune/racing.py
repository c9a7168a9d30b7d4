"""Which candidates still need more items: a race in which one that is clearly not among the next to go stops early.

All candidates answer the same items, block after block, in an order that has nothing to do with the answers. What the
full data would say of two candidates is known up to the items not yet seen: of N items, n seen with mean paired
difference m and spread s, the mean over all N has the opposite sign with probability about Phi(-z),
``z = (m / (s / sqrt(n))) * sqrt(N / (N - n))`` (sampling without replacement; at n = N nothing is left to chance).

Guarantee: with probability at least ``1 - error`` the ``keep`` candidates that the full data would put first are never
stopped, so that the race ends with the removed set of the full data. The error is divided by the looks and by the
candidates (Bonferroni), the normal law is an approximation; ``tests/test_racing.py`` holds it against simulations.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


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
        """How many standard errors behind the last of the leaders a candidate must be to be stopped."""
        comparisons = self.looks * max(1, self.candidates - self.keep)
        return NormalDist().inv_cdf(1 - self.error / comparisons)

    def running(self, harms: Floats) -> NDArray[np.bool_]:
        """Return which candidates go on, given the harms of those still in it.

        ``harms`` is (candidates still running, items seen), harm per item in any unit that adds up to the score.
        Everyone goes on until there are two items to see a spread.
        """
        count, seen = harms.shape
        if count <= self.keep or seen < 2:
            return np.ones(count, dtype=bool)
        order = np.argsort(harms.mean(axis=1), kind="stable")
        leader = harms[order[self.keep - 1]]  # the last that would go now
        behind = harms - leader
        mean = behind.mean(axis=1)
        if seen >= self.items:
            done: NDArray[np.bool_] = mean <= 0
            return done
        # A spread of no differences at all would be no spread: one item more is counted as differing by the largest
        # difference seen, so that a lead of a single item never looks certain.
        largest = np.abs(behind).max(axis=1)
        variance = (((behind - mean[:, None]) ** 2).sum(axis=1) + largest**2) / seen
        left = 1 - seen / self.items
        with np.errstate(divide="ignore", invalid="ignore"):
            z = np.where(variance > 0, mean / np.sqrt(variance / seen * left), 0.0)
        go_on: NDArray[np.bool_] = z <= self.threshold
        go_on[order[: self.keep]] = True
        return go_on
