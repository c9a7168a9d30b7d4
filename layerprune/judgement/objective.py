"""The objective: what a removal costs over several tasks, and what no task may lose.

mean      the mean over the tasks
weighted  a weighted mean; a task that is given no weight counts 1
worst     the largest loss of any task
A floor is a share of the intact model's accuracy above chance that a task must keep, on the items that select: piqa=0.9
of an intact .70 asks for .68, since guessing gives .50. Own answers have no chance level: a floor is the share of their
tokens that are still the likeliest ones. A removal below a floor comes after all that keep them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from layerprune.documents import Interval, Objective
from layerprune.errors import UsageError, did_you_mean
from layerprune.stats import clipped, mean_interval

EPSILON = 1e-9  # a share that equals its floor but for rounding keeps it


def asked_objective(
    name: str | None, weights: Mapping[str, float] | None, floors: Mapping[str, float] | None
) -> Objective:
    """Return the objective that options describe; raises ``UsageError`` for one that contradicts itself."""
    try:
        chosen = name or ("weighted" if weights else "mean")
        return Objective(name=chosen, weights=dict(weights or {}), floors=dict(floors or {}))
    except ValidationError as error:
        first = error.errors()[0]
        raise UsageError(f"--objective: {first['msg'].removeprefix('Value error, ')}") from error


def check_tasks(objective: Objective, tasks: Sequence[str]) -> None:
    """Raise ``UsageError`` for a weight or a floor of a task that is not there, and where no task has any weight."""
    for option, given in (("--weights", objective.weights), ("--floor", objective.floors)):
        for name in given:
            if name not in tasks:
                known = f"{did_you_mean(name, tasks)} Tasks: {', '.join(tasks)}"
                raise UsageError(f"{option} names the task {name!r}, which is not among those that score.{known}")
    if tasks and not sum(objective.weights.get(task, 1.0) for task in tasks) > 0:
        raise UsageError("--weights leaves every task without weight; give one at least a weight above 0")


def task_weights(objective: Objective, tasks: Sequence[str]) -> list[float]:
    """Return the weight of each task, 1 where none is given."""
    weights = [objective.weights.get(task, 1.0) for task in tasks]
    # Tasks without weight alone (a race stopped before the others' first item) count alike: there is nothing else.
    return weights if any(weights) else [1.0] * len(tasks)


def shares(objective: Objective, tasks: Sequence[str]) -> list[float]:
    """Return what part of the score each task has; they add up to 1."""
    weights = task_weights(objective, tasks)
    return [weight / sum(weights) for weight in weights]


def additive(objective: Objective) -> bool:
    """Whether the score is a mean of per-item harms, so that a race can tell from some items what all would say."""
    return objective.name != "worst" and not objective.floors


def combined(
    objective: Objective, tasks: Sequence[str], losses: Sequence[float], intervals: Sequence[Interval]
) -> tuple[float, Interval]:
    """Return the score and its interval.

    Of a mean: MOVER. Of the worst: from the largest lower to the largest upper limit, which holds the largest true loss
    whenever every task's interval holds its own (give intervals at ``1 - 0.05 / tasks``).
    """
    if objective.name == "worst":
        lows, highs = zip(*intervals, strict=True)
        return max(losses), (max(lows), max(highs))
    weights = task_weights(objective, tasks)
    middle = sum(weight * loss for weight, loss in zip(weights, losses, strict=True)) / sum(weights)
    return middle, mean_interval(losses, intervals, weights)


def combined_losses(objective: Objective, tasks: Sequence[str], losses: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the scores of many removals at once: (..., tasks, removals) to (..., removals)."""
    scores: NDArray[np.float64]
    scores = losses.max(axis=-2) if objective.name == "worst" else np.asarray(shares(objective, tasks)) @ losses
    return scores


def broken_floors(objective: Objective, relevances: Mapping[str, float]) -> dict[str, float]:
    """Return the tasks that keep less than their floor, and what share they miss it by; below chance a task keeps 0."""
    missed = {name: floor - (1 - clipped(relevances[name])) for name, floor in objective.floors.items()}
    return {name: round(share, 6) for name, share in missed.items() if share > EPSILON}
