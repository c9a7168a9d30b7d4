"""The intact model's own answers as items: what it wrote to each prompt, to be read again under removals.

Reading an answer costs one forward pass over prompt and answer, which removals share as they share choices; writing it
anew under each removal costs a pass per token. No gold answer is needed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from layerprune.documents import OWN_ANSWER
from layerprune.tasks.items import Answer, Item, Query, Request, TaskQuestions, Verdict


@dataclass(frozen=True)
class OwnAnswer:
    """What the intact model wrote to one item's prompt: token ids of both, with what ended the answer."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    right: bool | None  # by the task's own accuracy; None: nobody asked


class AgreementJudge:
    """Judges how well a model goes along with the intact model's answer, token by token."""

    def __call__(self, item: Item, answers: Sequence[Answer]) -> Verdict:
        """Return log-likelihood and agreement; an item counts as right where every token is the most likely one."""
        total, agreed = answers[0]  # type: ignore[misc]  # of a counted query
        tokens = item.queries[0].parts[0].scored
        return Verdict(agreed == tokens, None, answer=total / tokens, agreed=agreed / tokens)


def is_written(task: TaskQuestions) -> bool:
    """Whether the task's items have the model write."""
    return all(query.generation is not None for item in task.items for query in item.queries)


def with_own_answers(task: TaskQuestions, answers: Sequence[OwnAnswer], *, only_right: bool = False) -> TaskQuestions:
    """Return the task's items as the model's own answers to them, in order; ``only_right`` leaves out wrong ones."""
    items = [
        replace(item, chance=0.0, queries=(_read(own),), key=None)
        for item, own in zip(task.items, answers, strict=True)
        if own.right or not only_right
    ]
    return replace(task, items=tuple(items), metric=OWN_ANSWER, judge=AgreementJudge())


def own_answer_items(answers: Mapping[str, OwnAnswer]) -> tuple[Item, ...]:
    """Return answers to prompts that are no task's as items, by fingerprint."""
    return tuple(Item(mark, 0.0, (_read(own),)) for mark, own in answers.items())


def _read(own: OwnAnswer) -> Query:
    return Query((Request((*own.prompt, *own.answer), len(own.answer)),), counted=True)
