"""The one sentence at the top: what was removed, what it cost in choices and in writing, and on how much of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from layerprune.auditor.agreement import SAMPLES
from layerprune.auditor.compare import overall as compared
from layerprune.documents import PRUNED, AuditedTask, Generation, Overall, OwnAnswers, Units
from layerprune.report import words


def verdict(
    removal: Units,
    depth: int,
    tasks: Sequence[AuditedTask],
    overall: Mapping[str, Overall],
    generation: Generation | None = None,
    unlooked: Sequence[str] = (),
    own_answers: Sequence[OwnAnswers] = (),
) -> str:
    """Return the verdict; an accuracy in it is the mean over the informative tasks of its kind.

    ``unlooked`` are the tasks whose items nobody looked for in the text that healed: they may have been seen.
    """
    share = f"{100 * len(removal) / depth:.0f} % of layers removed ({len(removal)} of {depth})"
    accuracies = _accuracies(tasks, overall.get(PRUNED), unlooked)
    written = any(task.written for task in tasks)
    return "; ".join([share, *accuracies, *_agreement(own_answers), *_writing(generation, written)])


def _accuracies(tasks: Sequence[AuditedTask], found: Overall | None, unlooked: Sequence[str]) -> list[str]:
    """Choices and written answers are never averaged: one may be kept while the other is lost."""
    chosen, written = ([task for task in tasks if task.written is kind] for kind in (False, True))
    if not written:
        return [_accuracy("accuracy", chosen, found, unlooked)]
    if not chosen:
        return [_accuracy("accuracy of written answers", written, found, unlooked)]
    return [
        _accuracy("choice accuracy", chosen, compared(chosen).get(PRUNED), unlooked),
        _accuracy("accuracy of written answers", written, compared(written).get(PRUNED), unlooked),
    ]


def _accuracy(what: str, tasks: Sequence[AuditedTask], found: Overall | None, unlooked: Sequence[str]) -> str:
    uninformative = [task.data.task for task in tasks if not task.informative]
    if found is None:
        cost = "what that cost" if what == "accuracy" else f"what that cost in {what}"
        return f"{cost} is not known: the base model is not above chance on {words.listed(uninformative)}"
    met = [task.data.task for task in tasks if task.data.task in unlooked and task.informative]
    said = (
        f"{what} {words.points(found.difference)} points "
        f"(95 % CI {words.points_interval(found.interval)}) on {found.items:,} "
        + (f"items, those of {words.listed(met)} perhaps met in healing" if met else "unseen items")
    )
    if uninformative:
        said += f", {words.listed(uninformative)} left out (base at chance)"
    return said


def _agreement(own_answers: Sequence[OwnAnswers]) -> list[str]:
    parts = []
    for one in own_answers:
        found, count = one.models[PRUNED], len(one.fingerprints)
        interval = f" (95 % CI {words.percent_interval(found.agreed_interval)})" if found.agreed_interval else ""
        share = f"{words.percent(found.agreed)}{interval}{'' if parts else ' of the tokens the base wrote'}"
        prompts = "prompt" if count == 1 else "prompts"
        asked = f"sample {prompts}" if one.task == SAMPLES else f"unseen {prompts} of {one.task}"
        parts.append(f"{share} on {count:,} {asked}")
    return [f"agrees with {words.listed(parts)}"] if parts else []


def _writing(generation: Generation | None, written: bool) -> list[str]:
    if generation is None:
        return [] if written else ["not looked at: generated text"]
    if generation.healthy:
        return [f"{generation.prompts - generation.faulty} of {generation.prompts} sample texts are sound"]
    return [
        f"it no longer writes reliably: {generation.faulty} of {generation.prompts} sample texts are faulty "
        f"(base: {generation.base_faulty})"
    ]
