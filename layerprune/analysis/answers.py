"""Right and wrong answers of several models on the same items: means over tasks, and paired differences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from layerprune.documents import Outcomes
from layerprune.stats import as_bits, bootstrap_interval, mean_interval, paired_interval

Interval = tuple[float, float]
Answers = Mapping[str, NDArray[np.float64]]  # by task, one value an item: 1 right, 0 wrong, between: a mean over draws


def answers_of(drawn: Sequence[Mapping[str, Outcomes]]) -> dict[str, NDArray[np.float64]]:
    """Return each item's share of right answers over several removals (draws of one baseline) on the same items."""
    return {
        task: np.mean([as_bits(outcomes[task].correct).astype(float) for outcomes in drawn], axis=0)
        for task in drawn[0]
    }


def mean_accuracy(answers: Answers) -> float:
    """Return the mean over the tasks of the accuracies."""
    return float(np.mean([values.mean() for values in answers.values()]))


def difference(base: Answers, other: Answers, seed: int = 0) -> tuple[float, Interval]:
    """Return accuracy(other) - accuracy(base), mean over tasks, and its 95 % interval paired over the items.

    Right-or-wrong answers: Tango's interval a task, joined by MOVER. Means over draws are neither right nor wrong:
    stratified BCa bootstrap.
    """
    if base.keys() != other.keys():
        raise ValueError(f"answers to {sorted(base)} cannot be compared with answers to {sorted(other)}")
    seen = mean_accuracy(other) - mean_accuracy(base)
    if all(np.isin(values, (0.0, 1.0)).all() for side in (base, other) for values in side.values()):
        pairs = [(base[task].astype(bool), other[task].astype(bool)) for task in base]
        return seen, mean_interval(
            [float(b.mean()) - float(a.mean()) for a, b in pairs], [paired_interval(a, b) for a, b in pairs]
        )
    return seen, bootstrap_interval([other[task] - base[task] for task in base], seed=seed)
