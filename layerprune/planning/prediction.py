"""What a removal is expected to cost, on items that had no say in choosing it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from layerprune.documents import Outcomes, PredictedTask, Prediction
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
    differences = [task.difference for task in tasks.values()]
    low, high = mean_interval(differences, [task.interval for task in tasks.values()])
    items = sum(task.items for task in tasks.values())
    return Prediction(
        source=f"{items} selection items held back from the search" if desk.held_back else OPTIMISTIC,
        accuracy_difference=round(sum(differences) / len(differences), 6),
        interval=(round(low, 6), round(high, 6)),
        tasks=tasks,
    )


def _own_answers(base: Outcomes, own: Outcomes) -> dict[str, Any]:
    """Return what the intact model's own answers lose; nothing where none were read."""
    if base.answer is None or own.answer is None or own.agreed is None:
        return {}
    lost = np.subtract(base.answer, own.answer)
    found = {"nats": round(float(lost.mean()), 6), "agreed": round(float(np.mean(own.agreed)), 6)}
    if len(lost) < 2:
        return found
    low, high = bootstrap_interval([lost])
    return {**found, "nats_interval": (round(low, 6), round(high, 6))}
