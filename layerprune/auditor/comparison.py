"""From outcomes to figures: each task, all informative tasks together, the items that flipped, the verdict."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from layerprune import formatting
from layerprune.artifacts import (
    PRUNED,
    AuditedTask,
    Comparison,
    FlippedItem,
    Flips,
    Generation,
    ModelRef,
    Outcomes,
    Overall,
    OwnAnswers,
    TaskData,
    Units,
)
from layerprune.auditor.generation import SAMPLES
from layerprune.data.items import EvalItem, EvalTask
from layerprune.data.judging import choices_of, gold_of
from layerprune.stats import above_chance, bootstrap_interval, holm, mcnemar, mean_interval, paired_interval

# From outcomes to figures: each task, and all informative tasks together.


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
    adjusted_p: dict[tuple[str, str], float] = {}  # by task and label
    for label in tasks[0].models if tasks else ():
        values = holm([task.models[label].flips.p_value for task in informative])
        adjusted_p |= {(task.data.task, label): value for task, value in zip(informative, values, strict=True)}

    def with_adjusted(task: AuditedTask) -> AuditedTask:
        models = {}
        for label, found in task.models.items():
            value = adjusted_p.get((task.data.task, label), found.flips.p_value)
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
    before = "".join(task.base_outcomes.correct for task in tasks)
    return Overall(
        items=sum(counts),
        base_accuracy=_mean([task.base_accuracy for task in tasks]),
        accuracy=_mean([one.accuracy for one in found]),
        difference=_mean(differences),
        interval=mean_interval(differences, intervals),
        pooled_difference=sum(n * d for n, d in zip(counts, differences, strict=True)) / sum(counts),
        pooled_interval=mean_interval(differences, intervals, weights=counts),
        flips=_flips(before, "".join(one.outcomes.correct for one in found)),
    )


def _compare(base: Outcomes, other: Outcomes, seed: int) -> Comparison:
    before, after = base.mean_gold_probability, other.mean_gold_probability
    return Comparison(
        accuracy=other.accuracy,
        difference=other.accuracy - base.accuracy,
        interval=paired_interval(base.correct, other.correct, CONFIDENCE),
        flips=_flips(base.correct, other.correct),
        gold_probability=after,
        gold_probability_change=None if before is None or after is None else after - before,
        gold_probability_interval=_probability_interval(base, other, seed),
        outcomes=other,
    )


def _flips(base: str, other: str) -> Flips:
    test = mcnemar(base, other)
    return Flips(
        right_to_wrong=test.right_to_wrong,
        wrong_to_right=test.wrong_to_right,
        p_value=test.p_value,
        p_adjusted=test.p_value,
    )


def _probability_interval(base: Outcomes, other: Outcomes, seed: int) -> tuple[float, float] | None:
    if base.gold_probability is None or other.gold_probability is None or len(base.correct) < 2:
        return None
    differences = np.subtract(other.gold_probability, base.gold_probability)
    return bootstrap_interval([differences], confidence=CONFIDENCE, seed=seed)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


# The one sentence at the top: what was removed, what it cost in choices and in writing, and on how much of each.


def verdict(
    removal: Units,
    depth: int,
    tasks: Sequence[AuditedTask],
    generation: Generation | None = None,
    unlooked: Sequence[str] = (),
    own_answers: Sequence[OwnAnswers] = (),
) -> str:
    """Return the verdict; an accuracy in it is the mean over the informative tasks of its kind.

    ``unlooked`` are the tasks whose items nobody looked for in the text that healed: they may have been seen.
    """
    share = f"{100 * len(removal) / depth:.0f} % of layers removed ({len(removal)} of {depth})"
    return _sentence(share, tasks, generation, own_answers, lambda names: _met(names, unlooked))


def foreign_verdict(
    base: ModelRef,
    candidate: ModelRef,
    tasks: Sequence[AuditedTask],
    generation: Generation | None = None,
    own_answers: Sequence[OwnAnswers] = (),
) -> str:
    """Return the verdict on a checkpoint without plan and receipt: nobody knows which items its makers saw."""
    ours, theirs = (formatting.number(one.parameters) for one in (candidate, base))
    share = f"{ours} of {theirs} parameters, {candidate.layers} of {base.layers} layers"
    if candidate.parameters > base.parameters or candidate.layers > base.layers:
        share = f"{ours} parameters (base: {theirs}), {candidate.layers} layers (base: {base.layers})"
    items = "items, which its makers may have seen"
    return _sentence(share, tasks, generation, own_answers, lambda _: items, unseen="", change="the change")


def _met(names: Sequence[str], unlooked: Sequence[str]) -> str:
    met = [name for name in names if name in unlooked]
    return f"items, those of {formatting.listed(met)} perhaps met in healing" if met else "unseen items"


def _sentence(
    share: str,
    tasks: Sequence[AuditedTask],
    generation: Generation | None,
    own_answers: Sequence[OwnAnswers],
    items: Callable[[Sequence[str]], str],
    unseen: str = "unseen ",
    change: str = "what that cost",
) -> str:
    """Join the parts; ``items`` says what is known of the items of these tasks, ``unseen`` of the prompts.

    ``change`` is what is not known where the base is at chance.
    """
    # choices and written answers are never averaged: one may be kept while the other is lost
    chosen, written = ([task for task in tasks if task.written is kind] for kind in (False, True))
    kinds = {"choice accuracy" if written else "accuracy": chosen, "accuracy of written answers": written}
    accuracies = [_accuracy(what, some, items, change) for what, some in kinds.items() if some]
    agreed = _agreement(own_answers, unseen)
    return "; ".join([share, *accuracies, *agreed, *_writing(generation, bool(written))])


def _accuracy(what: str, tasks: Sequence[AuditedTask], items: Callable[[Sequence[str]], str], change: str) -> str:
    found = overall(tasks).get(PRUNED)
    uninformative = [task.data.task for task in tasks if not task.informative]
    if found is None:
        cost = change if what == "accuracy" else f"{change} in {what}"
        return f"{cost} is not known: the base model is not above chance on {formatting.listed(uninformative)}"
    said = (
        f"{what} {formatting.points(found.difference)} points "
        f"(95 % CI {formatting.points_interval(found.interval)}) on {found.items:,} "
        f"{items([task.data.task for task in tasks if task.informative])}"
    )
    if uninformative:
        said += f", {formatting.listed(uninformative)} left out (base at chance)"
    return said


def _agreement(own_answers: Sequence[OwnAnswers], unseen: str) -> list[str]:
    parts = []
    for one in own_answers:
        found, count = one.models[PRUNED], len(one.fingerprints)
        interval = f" (95 % CI {formatting.percent_interval(found.agreed_interval)})" if found.agreed_interval else ""
        share = f"{formatting.percent(found.agreed)}{interval}{'' if parts else ' of the tokens the base wrote'}"
        prompts = "prompt" if count == 1 else "prompts"
        asked = f"sample {prompts}" if one.task == SAMPLES else f"{unseen}{prompts} of {one.task}"
        parts.append(f"{share} on {count:,} {asked}")
    return [f"agrees with {formatting.listed(parts)}"] if parts else []


def _writing(generation: Generation | None, written: bool) -> list[str]:
    if generation is None:
        return [] if written else ["not looked at: generated text"]
    if generation.healthy:
        return [f"{generation.prompts - generation.faulty} of {generation.prompts} sample texts are sound"]
    return [
        f"it no longer writes reliably: {generation.faulty} of {generation.prompts} sample texts are faulty "
        f"(base: {generation.base_faulty})"
    ]


# The items whose answers changed, in words: what a reader looks at to see what kind of knowledge went.


SHOWN = 20  # items each way and task: enough to read, and an audit stays a few hundred kilobytes
LONGEST = 500  # characters of a question; few-shot examples stand before it and are cut off


def flipped_items(task: EvalTask, base: Outcomes, pruned: Outcomes) -> tuple[FlippedItem, ...]:
    """Return the flipped items of one task, right to wrong first, each way by how far the gold probability moved."""
    flipped = [
        _flipped(task, item, place, base, pruned)
        for place, item in enumerate(task.items)
        if base.correct[place] != pruned.correct[place]
    ]

    def moved(item: FlippedItem) -> float:
        if item.base_gold_probability is None or item.gold_probability is None:
            return 0.0
        return -abs(item.gold_probability - item.base_gold_probability)

    lost, won = (sorted((item for item in flipped if item.fixed is fixed), key=moved) for fixed in (False, True))
    return (*lost[:SHOWN], *won[:SHOWN])


def _flipped(task: EvalTask, item: EvalItem, place: int, base: Outcomes, pruned: Outcomes) -> FlippedItem:
    lm_task = getattr(task.judge, "task", None)
    offered = lm_task is not None and lm_task.OUTPUT_TYPE == "multiple_choice"
    doc = item.key[0].doc
    return FlippedItem(
        fingerprint=item.fingerprint,
        fixed=pruned.correct[place] == "1",
        question=str(item.key[0].args[0])[-LONGEST:],
        answers=tuple(str(answer) for answer in choices_of(lm_task, doc)) if offered else (),
        gold=tuple(gold_of(lm_task, doc)) if offered else (),
        base_gold_probability=None if base.gold_probability is None else base.gold_probability[place],
        gold_probability=None if pruned.gold_probability is None else pruned.gold_probability[place],
    )
