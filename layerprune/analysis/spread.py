"""How much the relevance of a layer varies from task to task, by each metric, and what the draw of items explains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from layerprune.documents.study import Spread
from layerprune.stats import Losses
from layerprune.stats.reliability import half_losses

Floats = NDArray[np.float64]
ACCURACY_DROP = "accuracy drop"
SPLITS = 100


def spreads(losses: Losses, by_task: Mapping[str, Sequence[Sequence[float]]], seed: int) -> list[Spread]:
    """Return the variance over the tasks of every unit's z-scored loss, and of its z-scored score by each metric.

    ``by_task``: metric -> its scores of the units, task by task. Scores are z-scored over the units within each task,
    so that only the pattern of the layers counts. Each metric's variances are compared with the accuracy drop's by
    Wilcoxon's signed-rank test, paired by unit. Empty with fewer than two tasks; a metric that gives all units of a
    task the same score is left out.
    """
    drop = np.array([lost.mean(axis=0) for lost in losses.values()])  # (tasks, units)
    if len(drop) < 2 or not _varied(drop):
        return []
    reference = _variances(drop)
    found = [_spread(ACCURACY_DROP, reference, noise=item_noise(losses, seed))]
    for metric, scores in by_task.items():
        rows = np.asarray(scores, dtype=float)
        if _varied(rows):
            variances = _variances(rows)
            found.append(_spread(metric, variances, p_value=_wilcoxon(reference, variances)))
    return found


def item_noise(losses: Losses, seed: int) -> float:
    """Return the variance over tasks that the draw of items would give a unit if all tasks agreed, mean over units.

    Two halves of one task's items differ by noise alone: their z-scores differ by twice the variance of a half, and
    the whole has half of a half's.
    """
    one, other = (_z_scored(half) for half in half_losses(losses, SPLITS, seed))
    return float(np.nanmean((one - other) ** 2) / 4)


def _spread(metric: str, variances: Floats, noise: float | None = None, p_value: float | None = None) -> Spread:
    return Spread(
        metric=metric,
        variances=tuple(round(float(value), 4) for value in variances),
        mean=round(float(variances.mean()), 4),
        noise=None if noise is None else round(noise, 4),
        wilcoxon_p=None if p_value is None else float(f"{p_value:.3g}"),
    )


def _wilcoxon(reference: Floats, variances: Floats) -> float:
    from scipy.stats import wilcoxon

    if np.array_equal(reference, variances):
        return 1.0
    return float(wilcoxon(reference, variances).pvalue)


def _varied(rows: Floats) -> bool:
    return bool((np.ptp(rows, axis=1) > 0).all())


def _variances(rows: Floats) -> Floats:
    variances: Floats = _z_scored(rows).var(axis=0, ddof=1)
    return variances


def _z_scored(rows: Floats) -> Floats:
    """Return scores with mean 0 and variance 1 over the units (the last axis); nan where all are the same."""
    spread = rows.std(axis=-1, keepdims=True)
    scored: Floats = (rows - rows.mean(axis=-1, keepdims=True)) / np.where(spread > 0, spread, np.nan)
    return scored
