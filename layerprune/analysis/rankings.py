"""Every metric's ranking of the layers, held against what removing each layer really costs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from layerprune.analysis.agreement import Reference, agreed, confused, shared
from layerprune.analysis.bench import Bench
from layerprune.analysis.losses import accuracy_losses, probability_losses
from layerprune.analysis.spread import spreads
from layerprune.documents import Outcomes
from layerprune.documents.study import ALL_TASKS, MEAN, TEXT, Agreed, Confusion, Lost, Ranking, Repeated
from layerprune.metrics import METRICS
from layerprune.metrics.ablation import INTACT
from layerprune.removal import Removal
from layerprune.specs import build
from layerprune.stats import Losses, split_half


def ranked(bench: Bench) -> list[Ranking]:
    """Score every unit alone by every metric: on all tasks, on each task, and on the plain text."""
    everything, by_task = bench.scorer(), {task: bench.scorer_for(task) for task in bench.tasks}
    found = []
    for spec in bench.specs:
        _, metric = build(METRICS, spec)
        scorers = {ALL_TASKS: everything} | (by_task if metric.needs != "nothing" else {})
        if metric.needs == "text" and (on_text := bench.scorer_on_text()):
            scorers[TEXT] = on_text
        for calibration, scorer in scorers.items():
            scores = tuple(candidate.score for candidate in scorer.judge(spec)(bench.units))
            found.append(Ranking(metric=spec, calibration=calibration, scores=scores))
    return found


def judged(bench: Bench, rankings: Sequence[Ranking]) -> dict[str, Any]:
    """Answer the questions about rankings from the audit outcomes of every unit's removal: fields of a ``Study``."""
    seed, lost = bench.request.seed, losses_of(bench)
    accuracy = lost["accuracy"]
    mean = Reference.of(accuracy, seed)
    by_task = {task: Reference.of({task: values}, seed, task) for task, values in accuracy.items()}
    whole = [ranking for ranking in rankings if ranking.calibration == ALL_TASKS]
    own = {(ranking.metric, ranking.calibration): ranking.scores for ranking in rankings}
    complete = {
        one.metric: [own[one.metric, task] for task in by_task] for one in whole if (one.metric, bench.tasks[0]) in own
    }
    return {
        "lost": tuple(_lost(lost)),
        "agreement": tuple(_agreement(bench, rankings, mean, by_task)),
        "shared": tuple(part for one in whole for part in shared(one.metric, one.scores, mean.value.tolist())),
        "confusion": tuple(_confusion(one, own, by_task) for one in whole),
        "spread": tuple(spreads(accuracy, complete, seed)),
        "reliability": tuple(_reliability(lost, seed)),
    }


def losses_of(bench: Bench) -> dict[str, Losses]:
    """Return what each unit's removal loses on the audit items, by signal."""
    data = [one for examiner in bench.audits.values() for one in examiner.questions.data()]

    def answered(removal: Removal) -> dict[str, Outcomes]:
        return {task: bench.outcomes(removal, task) for task in bench.tasks}

    intact, without = answered(INTACT), [answered(unit) for unit in bench.units]
    return {
        "accuracy": accuracy_losses(data, intact, without),
        "probability": probability_losses(data, intact, without),
    }


def _lost(lost: dict[str, Losses]) -> list[Lost]:
    return [
        Lost(
            task=task,
            accuracy=_means(values),
            probability=_means(lost["probability"][task]) if task in lost["probability"] else None,
        )
        for task, values in lost["accuracy"].items()
    ]


def _agreement(
    bench: Bench, rankings: Sequence[Ranking], mean: Reference, by_task: dict[str, Reference]
) -> list[Agreed]:
    """Compare rankings made on one task with that task's loss, all others with the mean's, without the ends too."""
    everyone = [True] * len(bench.units)
    inner = [not {0, bench.constraints.depth - 1} & set(unit.layers) for unit in bench.units]
    found = []
    for ranking in rankings:
        reference = by_task.get(ranking.calibration)
        for chosen in (everyone, inner) if reference is None else (everyone,):
            found.append(
                agreed(
                    reference or mean, ranking.scores, chosen, metric=ranking.metric, calibration=ranking.calibration
                )
            )
    return found


def _confusion(one: Ranking, own: dict[tuple[str, str], tuple[float, ...]], by_task: dict[str, Reference]) -> Confusion:
    """Hold a metric's ranking on each task (its only one, where it reads nothing) against the task's loss."""
    pairs = [(reference.value.tolist(), own.get((one.metric, task), one.scores)) for task, reference in by_task.items()]
    return confused(one.metric, pairs)


def _reliability(lost: dict[str, Losses], seed: int) -> list[Repeated]:
    found = []
    for signal, losses in lost.items():
        if not losses:  # no task offers choices: no gold answer has a probability
            continue
        parts: dict[str, Losses] = {MEAN: losses} | {task: {task: values} for task, values in losses.items()}
        for task, part in parts.items():
            it = split_half(part, seed=seed)
            halves, whole = (None if value is None else round(value, 4) for value in (it.halves, it.whole))
            found.append(
                Repeated(
                    task=task,
                    signal=signal,  # type: ignore[arg-type]
                    items=it.items,
                    halves=halves,
                    whole=whole,
                    items_needed=it.items_needed,
                )
            )
    return found


def _means(values: np.ndarray) -> tuple[float, ...]:
    return tuple(round(float(value), 6) for value in values.mean(axis=0))
