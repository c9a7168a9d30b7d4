"""What each unit's removal loses, item by item: means, resamples, and how far the ranking would repeat on other items.

Split-half reliability (Spearman 1910; Brown 1910): two random halves of the items rank the units; the mean correlation
r of the halves' rankings, stepped up to the whole by 2r / (1 + r), is the correlation to expect with the ranking that
as many other items would give. No score can be expected to agree better with a measured ranking than the square root
of its reliability.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from layerprune.stats.ranks import correlations

Floats = NDArray[np.float64]
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


def mean_over_tasks(losses: Floats) -> Floats:
    """Return the mean of (splits, tasks, units) over the tasks, (splits, units)."""
    means: Floats = losses.mean(axis=1)
    return means


def stepped(reliability: float, factor: float) -> float:
    """Return the reliability on ``factor`` times the items: k r / (1 + (k - 1) r) (Spearman 1910; Brown 1910)."""
    return factor * reliability / (1 + (factor - 1) * reliability)


def split_half(
    losses: Losses, splits: int = 200, seed: int = 0, combine: Callable[[Floats], Floats] = mean_over_tasks
) -> Reliability:
    """Return the split-half reliability of the units' ranking; raises ``ValueError`` under two items.

    ``combine`` makes one loss of those of all tasks, (splits, tasks, units) to (splits, units).
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
