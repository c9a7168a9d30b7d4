"""From outcomes to figures: each task, and all informative tasks together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from layerprune.documents import AuditedTask, Comparison, Flips, Outcomes, Overall, TaskData
from layerprune.stats import above_chance, bootstrap_interval, holm, mcnemar, mean_interval, paired_interval

SIGNIFICANT = 0.05  # one-sided: a base that is not above chance by this has nothing to lose on a task
CONFIDENCE = 0.95


def compare_task(
    data: TaskData,
    chances: Sequence[float],
    excluded: int,
    base: Outcomes,
    models: Mapping[str, Outcomes],
    seed: int,
) -> AuditedTask:
    """Compare each model with the base on one task's items; p-values are adjusted later, over the tasks."""
    p_above = above_chance(base.correct, chances)
    return AuditedTask(
        data=data,
        excluded=excluded,
        informative=p_above <= SIGNIFICANT,
        p_above_chance=p_above,
        base_accuracy=base.accuracy,
        base_gold_probability=base.mean_gold_probability,
        base_outcomes=base,
        models=compare_models(base, models, seed),
    )


def compare_models(base: Outcomes, models: Mapping[str, Outcomes], seed: int) -> dict[str, Comparison]:
    """Return each model beside the base on the same items; p-values not yet adjusted."""
    return {label: _compare(base, other, seed) for label, other in models.items()}


def adjusted(tasks: Sequence[AuditedTask]) -> tuple[AuditedTask, ...]:
    """Return the tasks with Holm-adjusted p-values, per model over the informative tasks."""
    informative = [task for task in tasks if task.informative]
    labels = list(tasks[0].models) if tasks else []
    raised = {
        label: dict(
            zip(
                (task.data.task for task in informative),
                holm([task.models[label].flips.p_value for task in informative]),
                strict=True,
            )
        )
        for label in labels
    }

    def with_adjusted(task: AuditedTask) -> AuditedTask:
        models = {}
        for label, found in task.models.items():
            value = raised[label].get(task.data.task, found.flips.p_value)
            models[label] = found.model_copy(update={"flips": found.flips.model_copy(update={"p_adjusted": value})})
        return task.model_copy(update={"models": models})

    return tuple(with_adjusted(task) for task in tasks)


def overall(tasks: Sequence[AuditedTask]) -> dict[str, Overall]:
    """Return each model over all informative tasks; empty when there is none."""
    informative = [task for task in tasks if task.informative]
    return {label: _overall(informative, label) for label in informative[0].models} if informative else {}


def _overall(tasks: Sequence[AuditedTask], label: str) -> Overall:
    found = [task.models[label] for task in tasks]
    counts = [task.data.items for task in tasks]
    differences, intervals = [one.difference for one in found], [one.interval for one in found]
    test = mcnemar("".join(t.base_outcomes.correct for t in tasks), "".join(one.outcomes.correct for one in found))
    return Overall(
        items=sum(counts),
        base_accuracy=_mean([task.base_accuracy for task in tasks]),
        accuracy=_mean([one.accuracy for one in found]),
        difference=_mean(differences),
        interval=mean_interval(differences, intervals),
        pooled_difference=sum(n * d for n, d in zip(counts, differences, strict=True)) / sum(counts),
        pooled_interval=mean_interval(differences, intervals, weights=counts),
        flips=Flips(
            right_to_wrong=test.right_to_wrong,
            wrong_to_right=test.wrong_to_right,
            p_value=test.p_value,
            p_adjusted=test.p_value,
        ),
    )


def _compare(base: Outcomes, other: Outcomes, seed: int) -> Comparison:
    test = mcnemar(base.correct, other.correct)
    before, after = base.mean_gold_probability, other.mean_gold_probability
    return Comparison(
        accuracy=other.accuracy,
        difference=other.accuracy - base.accuracy,
        interval=paired_interval(base.correct, other.correct, CONFIDENCE),
        flips=Flips(
            right_to_wrong=test.right_to_wrong,
            wrong_to_right=test.wrong_to_right,
            p_value=test.p_value,
            p_adjusted=test.p_value,
        ),
        gold_probability=after,
        gold_probability_change=None if before is None or after is None else after - before,
        gold_probability_interval=_probability_interval(base, other, seed),
        outcomes=other,
    )


def _probability_interval(base: Outcomes, other: Outcomes, seed: int) -> tuple[float, float] | None:
    if base.gold_probability is None or other.gold_probability is None or len(base.correct) < 2:
        return None
    differences = np.subtract(other.gold_probability, base.gold_probability)
    return bootstrap_interval([differences], confidence=CONFIDENCE, seed=seed)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
