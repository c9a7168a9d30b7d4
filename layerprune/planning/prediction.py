"""What a removal is expected to cost, on items that had no say in choosing it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from layerprune.documents import Interval, Outcomes, PredictedTask, Prediction
from layerprune.metrics.ablation import INTACT
from layerprune.planning.desk import Desk
from layerprune.removal import Removal
from layerprune.stats import bootstrap_interval, mean_interval, paired_interval

OPTIMISTIC = "the items that selected; expect it to be too good"


def prepare(desk: Desk, removals: Sequence[Removal]) -> None:
    """Measure several removals on the held-back items in one go; ``predict`` then finds them there."""
    if desk.held_back is not None:
        desk.held_back.outcomes([INTACT, *removals], "every step, on items held back")


def predict(desk: Desk, removal: Removal) -> Prediction | None:
    """Judge the chosen removal on the held-back items; None for a metric that answers no items."""
    examiner = desk.held_back or desk.data.examiner
    if examiner is None:
        return None
    found = examiner.outcomes([INTACT, removal], "the chosen removal, on items held back")
    tasks: dict[str, PredictedTask] = {}
    for name in examiner.questions.tasks:
        base, own = found[INTACT][name], found[removal][name]
        low, high = paired_interval(base.correct, own.correct)
        tasks[name] = PredictedTask(
            base_accuracy=round(base.accuracy, 6),
            accuracy=round(own.accuracy, 6),
            difference=round(own.accuracy - base.accuracy, 6),
            interval=(round(low, 6), round(high, 6)),
            items=len(own.correct),
            **_own_answers(base, own),
        )
    counted = counted_by_accuracy(tasks)
    differences = [task.difference for task in counted]
    low, high = mean_interval(differences, [task.interval for task in counted])
    items = sum(task.items for task in tasks.values())
    return Prediction(
        source=f"{items} selection items held back from the search" if desk.held_back else OPTIMISTIC,
        accuracy_difference=round(sum(differences) / len(differences), 6),
        interval=(round(low, 6), round(high, 6)),
        tasks=tasks,
    )


def counted_by_accuracy(tasks: Mapping[str, PredictedTask]) -> list[PredictedTask]:
    """Return the tasks whose accuracies are averaged: where some have one, not those of own answers."""
    return [task for task in tasks.values() if task.nats is None] or list(tasks.values())


def _own_answers(base: Outcomes, own: Outcomes) -> dict[str, Any]:
    """Return what the intact model's own answers lose; nothing where none were read."""
    if base.answer is None or base.agreed is None or own.answer is None or own.agreed is None:
        return {}
    lost, agreed = np.subtract(base.answer, own.answer), np.array(own.agreed)
    return {
        "nats": round(float(lost.mean()), 6),
        "nats_interval": _interval(lost),
        "base_agreed": round(float(np.mean(base.agreed)), 6),
        "agreed": round(float(agreed.mean()), 6),
        "agreed_interval": _interval(agreed),
    }


def _interval(values: NDArray[np.float64]) -> Interval | None:
    if len(values) < 2:
        return None
    low, high = bootstrap_interval([values])
    return round(low, 6), round(high, 6)
