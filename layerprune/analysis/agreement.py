"""How far a metric's ranking agrees with the accuracy that is really lost, and what chance would give."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from layerprune.documents.study import MEAN, Agreed, Confusion, Estimate, Shared
from layerprune.stats import (
    Losses,
    confusion,
    correlations,
    mean_losses,
    overlap,
    rank_agreement,
    resampled_losses,
)

Floats = NDArray[np.float64]
COEFFICIENTS = ("spearman", "kendall", "pearson")
DRAWS = 1000  # bootstrap samples of the items
ROWS = 500  # resamples correlated at once: all pairs of 80 units are 3,160 numbers a row
LARGEST = 0.999
SHARES = (8, 4, 2)  # the lowest eighth, quarter and half of the units


@dataclass(frozen=True)
class Reference:
    """The loss that rankings are held against, one task's or the mean of all, and what resampling its items gives."""

    task: str
    value: Floats  # (units,)
    drawn: Floats  # (draws, units)

    @classmethod
    def of(cls, losses: Losses, seed: int, task: str = MEAN) -> Reference:
        """Resample the items, each task's for itself."""
        return cls(task, mean_losses(losses), resampled_losses(losses, DRAWS, seed))


def agreed(
    reference: Reference, scores: Sequence[float], chosen: Sequence[bool], *, metric: str, calibration: str
) -> Agreed:
    """Compare a ranking with the loss on the ``chosen`` units; the intervals say what as many other items would give.

    Each interval is the correlation plus or minus 1.96 standard deviations of its bootstrap draws, on Fisher's scale.
    The draws themselves lie too low (resampling adds noise to losses that are noisy already), so their quantiles, BCa
    among them, miss; docs/notes/2026-11-25-study.md has the simulation. The correlation with losses free of noise is
    higher still, by the square root of the reliability.
    """
    mask = np.asarray(chosen)
    own, value = np.asarray(scores, dtype=float)[mask], reference.value[mask]
    found = rank_agreement(own.tolist(), value.tolist())
    parts = [correlations(own, reference.drawn[start : start + ROWS, mask]) for start in range(0, DRAWS, ROWS)]
    estimates = {
        name: _estimate(getattr(found, name), np.concatenate([part[name] for part in parts])) for name in COEFFICIENTS
    }
    return Agreed(
        metric=metric,
        calibration=calibration,
        task=reference.task,
        ends=bool(mask.all()),
        units=found.n,
        **estimates,
        spearman_by_chance=round(1.96 * found.spearman_spread, 4),
        misplaced=round(found.misplaced_share, 4),
        misplaced_by_chance=round(found.misplaced_by_chance, 4),
    )


def _estimate(value: float | None, drawn: Floats) -> Estimate:
    """Put an interval to a correlation; resamples without one (all units lose alike) are left out of it."""
    if value is None:
        return Estimate(value=None, interval=None)
    spread = 1.96 * float(_fisher(drawn[np.isfinite(drawn)]).std())
    low, high = (float(np.tanh(_fisher(np.array(value)) + side * spread)) for side in (-1, 1))
    return Estimate(value=round(value, 4), interval=(round(min(low, value), 4), round(max(high, value), 4)))


def _fisher(correlations: Floats) -> Floats:
    """Return Fisher's z, kept finite for rankings that agree in full."""
    z: Floats = np.arctanh(np.clip(correlations, -LARGEST, LARGEST))
    return z


def shared(metric: str, scores: Sequence[float], losses: Sequence[float]) -> list[Shared]:
    """Return how many of the lowest eighth, quarter and half the metric finds."""
    counts = sorted({max(1, len(scores) // share) for share in SHARES})
    return [
        Shared(
            metric=metric,
            count=found.count,
            shared=round(found.shared, 4),
            by_chance=round(found.by_chance, 4),
            chance_interval=found.chance_interval,
        )
        for found in (overlap(scores, losses, count) for count in counts)
    ]


def confused(metric: str, pairs: Sequence[tuple[Sequence[float], Sequence[float]]]) -> Confusion:
    """Return the rank-confusion matrix over tasks, from (loss, score) of each: rows by loss, columns by the metric."""
    matrix = np.mean([confusion(losses, scores) for losses, scores in pairs], axis=0)
    return Confusion(
        metric=metric,
        matrix=tuple(tuple(round(float(entry), 4) for entry in row) for row in matrix),
        misplaced=round(1 - float(np.trace(matrix)) / len(matrix), 4),
        by_chance=round(1 - 1 / len(matrix), 4),
    )
