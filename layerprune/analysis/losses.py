"""What each unit's removal loses on every audit item, as a share of what the intact model has there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from layerprune.documents import Outcomes, TaskData
from layerprune.stats import Losses, as_bits

Answered = Mapping[str, Outcomes]  # by task


def accuracy_losses(data: Sequence[TaskData], intact: Answered, without: Sequence[Answered]) -> Losses:
    """Return right answers lost with each unit over the task's accuracy above chance, (items, units) by task.

    The mean over the items is the relevance.
    """
    found = {}
    for task in data:
        base = as_bits(intact[task.task].correct).astype(float)
        own = np.array([as_bits(one[task.task].correct) for one in without], dtype=float)
        found[task.task] = (base - own).T / (base.mean() - task.chance)
    return found


def probability_losses(data: Sequence[TaskData], intact: Answered, without: Sequence[Answered]) -> Losses:
    """Return the gold answer's probability lost over its mean, (items, units), for tasks that offer choices."""
    found = {}
    for task in data:
        known = [one[task.task].gold_probability for one in (intact, *without)]
        if None not in known:
            base, *own = (np.array(values) for values in known)
            found[task.task] = (base - np.array(own)).T / base.mean()
    return found
