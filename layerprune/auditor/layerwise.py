"""Layer by layer: the compensation check, the path from the base to the removal, and cosine beside the plan's ranking.

A plan's own scores flatter the layers it chose: they were chosen by them. So single layers are asked again here, on
items that no plan has seen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace

import numpy as np

from layerprune import formatting
from layerprune.architecture import Architecture
from layerprune.artifacts import (
    AuditedTask,
    Compensated,
    Compensation,
    LayerRanking,
    Layerwise,
    ModelRef,
    Plan,
    Ranked,
    Scores,
    Units,
    Without,
)
from layerprune.data.items import EvalSet, hash_share
from layerprune.errors import DocumentError, RefusedError
from layerprune.models.model import LoadedModel
from layerprune.removal import Removal
from layerprune.scoring.engine import Engine
from layerprune.scoring.evaluator import evaluate
from layerprune.scoring.metrics.base import Data
from layerprune.scoring.metrics.proxies import Cosine
from layerprune.stats import as_bits, clipped, counted_interval, mean_interval, paired_interval, relevance
from layerprune.util import Progress

ITEMS = 200  # of each task; asked once for each removed layer and once more along the path, so it has to end

Correct = Mapping[Units, Mapping[str, str]]  # by removed units and task


def chosen(fingerprints: Sequence[str], most: int = ITEMS) -> list[int]:
    """Return the places of the layerwise items among a task's items: the same whoever works them out."""
    places = sorted(range(len(fingerprints)), key=lambda place: hash_share(fingerprints[place], "layerwise"))
    return sorted(places[:most])


def layer_by_layer(
    engine: Engine,
    plan: Plan,
    eval_set: EvalSet,
    tasks: Sequence[AuditedTask],
    unhealed: str,
    rankings: tuple[LayerRanking, ...],
    progress: Progress,
) -> tuple[Layerwise | None, tuple[LayerRanking, ...]]:
    """Ask the base layer by layer, and rank its layers by cosine unless plan or ``rankings`` do.

    Asked are the layerwise items of every task; one that generates text is left out: it would take hours.
    """
    few = EvalSet(
        {
            name: replace(task, items=tuple(task.items[place] for place in chosen([i.fingerprint for i in task.items])))
            for name, task in eval_set.tasks.items()
            if not any(query.generation for item in task.items for query in item.queries)
        }
    )
    parts = parts_of(plan, engine.loaded.architecture)
    found = layerwise(ask_layers(engine, few, parts, progress), parts, tasks, unhealed)
    if few.tasks and "cosine" not in (plan.metric and plan.metric.spec, *(ranking.metric for ranking in rankings)):
        rankings += (cosine_ranking(engine.loaded, few, progress),)
    return found, rankings


def parts_of(plan: Plan, architecture: Architecture) -> tuple[Units, ...]:
    """Return what of the removal can go by itself, in the plan's order: single units, or those that go together."""
    groups: dict[int, Units] = {
        unit: tuple(sorted(group & set(plan.removal))) for group in architecture.together for unit in group
    }
    return tuple(dict.fromkeys(groups.get(unit, (unit,)) for unit in plan.order))


def ask_layers(
    engine: Engine, eval_set: EvalSet, parts: Sequence[Units], progress: Progress
) -> dict[Units, dict[str, str]]:
    """Ask the base without each part alone and without the first 2, 3, ... of them; what it cannot do is left out."""
    removals = []
    for units in (*parts, *(_all_of(parts[:count]) for count in range(2, len(parts)))):
        with suppress(RefusedError):
            engine.loaded.architecture.check(Removal.from_layers(units))
            removals.append(Removal.from_layers(units))
    if len(parts) < 2 or not eval_set.tasks or not removals:  # one part alone is the whole removal
        return {}
    found = evaluate(engine, eval_set, list(dict.fromkeys(removals)), progress, "asking layer by layer")
    return {one.layers: {name: outcomes.correct for name, outcomes in own.items()} for one, own in found.items()}


def _all_of(parts: Sequence[Units]) -> Units:
    return tuple(sorted(unit for part in parts for unit in part))


def layerwise(
    correct: Correct, parts: Sequence[Units], tasks: Sequence[AuditedTask], unhealed: str
) -> Layerwise | None:
    """Put what was asked into figures; ``unhealed`` labels the whole removal among the tasks' models.

    The figures follow from ``correct`` and the audited tasks alone, so ``verify`` can work them out again.
    """
    if not correct:
        return None
    known = [task for task in tasks if all(task.data.task in own for own in correct.values())]
    whole = _all_of(parts)
    everything = {
        **correct,
        whole: {task.data.task: _picked(task, task.models[unhealed].outcomes.correct) for task in known},
    }
    firsts = [_all_of(parts[:count]) for count in range(1, len(parts) + 1)]
    alone = [part for part in parts if part in correct]
    return Layerwise(
        items={task.data.task: len(_picked(task, task.base_outcomes.correct)) for task in known},
        parts=tuple(parts),
        alone=tuple(_without(units, everything, known) for units in alone),
        path=tuple(_without(units, everything, known) for units in firsts if units in everything),
        compensation=_compensation([correct[part] for part in parts], everything[whole], known)
        if len(parts) > 1 and len(alone) == len(parts)
        else None,
    )


def _picked(task: AuditedTask, outcomes: str) -> str:
    return "".join(outcomes[place] for place in chosen(task.data.fingerprints))


def _without(units: Units, correct: Correct, tasks: Sequence[AuditedTask]) -> Without:
    pairs = [
        (_picked(task, task.base_outcomes.correct), correct[units][task.data.task])
        for task in tasks
        if task.informative
    ]
    differences = [float(as_bits(own).mean() - as_bits(base).mean()) for base, own in pairs]
    return Without(
        units=units,
        correct={task.data.task: correct[units][task.data.task] for task in tasks},
        difference=_mean(differences),
        interval=mean_interval(differences, [paired_interval(*pair) for pair in pairs]) if pairs else None,
    )


def _compensation(
    singles: Sequence[Mapping[str, str]], whole: Mapping[str, str], tasks: Sequence[AuditedTask]
) -> Compensation:
    compared = [_compensated(task, [own[task.data.task] for own in singles], whole[task.data.task]) for task in tasks]
    telling = [one for task, one in zip(tasks, compared, strict=True) if task.informative]
    interval = mean_interval([one.excess for one in telling], [one.interval for one in telling]) if telling else None
    alone, together = (_mean([getattr(one, name) for one in telling]) for name in ("alone", "together"))
    return Compensation(
        tasks=tuple(compared),
        alone=alone,
        together=together,
        excess=_mean([one.excess for one in telling]),
        interval=interval,
        verdict=_sentence(len(singles), alone, together, interval),
    )


def _compensated(task: AuditedTask, singles: Sequence[str], whole: str) -> Compensated:
    base = _picked(task, task.base_outcomes.correct)
    before = as_bits(base).astype(int)
    lost = sum((before - as_bits(own) for own in singles), np.zeros(len(base)))  # (items,)
    joint = before - as_bits(whole)
    chance, accuracy = task.data.chance, float(before.mean())
    tells = task.informative and accuracy > chance
    return Compensated(
        task=task.data.task,
        items=len(base),
        alone=float(lost.mean()),
        together=float(joint.mean()),
        excess=float((joint - lost).mean()),
        interval=counted_interval(joint - lost),
        relevance_alone=sum(_shown(own, accuracy, chance) for own in singles) if tells else None,
        relevance_together=_shown(whole, accuracy, chance) if tells else None,
    )


def _shown(own: str, accuracy: float, chance: float) -> float:
    """Return a relevance as it is shown, at most 1."""
    return clipped(relevance(float(as_bits(own).mean()), accuracy, chance))


def _sentence(count: int, alone: float | None, together: float | None, interval: tuple[float, float] | None) -> str:
    """Say in plain words whether single-layer scores told the truth."""
    if alone is None or together is None or interval is None:
        return "Whether single-layer scores tell the truth cannot be said: the base is at chance on every task."
    told = (
        f"Taken out one at a time, these {count} cost {_cost(alone)} in sum; taken out together they cost "
        f"{_cost(together)} (difference {formatting.points(together - alone)}, "
        f"95 % CI {formatting.points_interval(interval)})"
    )
    if interval[0] > 0:
        return f"{told}: they stand in for each other, so single-layer scores understate what this removal costs."
    if interval[1] < 0:
        return f"{told}: they harm the same answers, so single-layer scores overstate what this removal costs."
    return f"{told}: as far as these items can tell, single-layer scores told the truth about this removal."


def _cost(lost: float) -> str:
    return f"{formatting.signed(100 * lost).removeprefix('+')} points"


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def recorded_ranking(scores: Scores, base: ModelRef) -> LayerRanking:
    """Return what a scores.json says of every single layer; raises ``DocumentError`` when there is nothing to take."""
    if scores.model.fingerprint != base.fingerprint:
        raise DocumentError(
            f"the scores by {scores.metric.words} are of another model: {scores.model.id}, not {base.id}"
        )
    singles = [one for one in scores.rounds[0].candidates if len(one.removal) == 1]
    if not singles:
        raise DocumentError(f"the scores by {scores.metric.words} hold no single layer, only sets of them")
    items = sum(data.items for data in scores.data)
    return LayerRanking(
        metric=scores.metric.words,
        unit=scores.metric.unit,
        source=f"{items} selection items" if items else "no items",
        ranking=tuple(Ranked(unit=one.removal[0], score=one.score, interval=one.interval) for one in singles),
    )


def cosine_ranking(loaded: LoadedModel, eval_set: EvalSet, progress: Progress) -> LayerRanking:
    """Return the cosine score of every layer on the layerwise items."""
    data = Data(eval_set=eval_set, progress=progress)
    removals = [Removal.of(layer) for layer in range(loaded.architecture.depth)]
    found = Cosine().score(loaded, removals, data)
    return LayerRanking(
        metric="cosine",
        unit=Cosine.unit,
        source=f"{len(eval_set)} audit items",
        ranking=tuple(Ranked(unit=one.removal[0], score=one.score) for one in found),
    )
