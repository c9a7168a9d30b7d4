"""The items of an audit, found again among their task's own: which are there, and which the audit passed over."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass, replace

from layerprune.documents import AuditedTask
from layerprune.tasks import Item, TaskQuestions

Load = Callable[[AuditedTask, Set[str]], TaskQuestions]  # a task's evaluation items but for those so fingerprinted


@dataclass(frozen=True)
class Refound:
    """What became of one task's audited items."""

    asked: TaskQuestions  # the drawn items that are there
    places: tuple[int, ...]  # of each of them among the audit's outcomes
    missing: tuple[str, ...]  # fingerprints in the audit that the task does not have, or not so often
    chances: tuple[float, ...] | None  # of guessing each audited item; None where some are missing
    unexplained: int  # items that no earlier step has seen and that the audit left out all the same


def refind(task: AuditedTask, drawn: Set[int], explained: Set[str], limit: int | None, load: Load) -> Refound:
    """Build one task's items anew and find the audited ones; ``drawn`` are the places of those to be asked.

    ``explained`` are the items that the audit had to leave out, ``limit`` is the audit's.
    """
    questions = load(task, frozenset())
    found = _matched(task.data.fingerprints, questions.items)
    missing = tuple(mark for mark, at in zip(task.data.fingerprints, found, strict=True) if at is None)
    chances = None if missing else tuple(questions.items[at].chance for at in found if at is not None)
    there = {at for at in found if at is not None}
    unexplained = _unexplained(questions.items, there, explained, limit == len(found))
    left_out = {item.fingerprint for item in questions.items} - set(task.data.fingerprints)
    if task.data.num_fewshot and left_out and there:
        # few-shot examples are drawn item after item, so the items the audit left out have to be left out here too
        questions = load(task, left_out)
        found = _matched(task.data.fingerprints, questions.items)
    asked = [(place, at) for place, at in enumerate(found) if place in drawn and at is not None]
    items = tuple(questions.items[at] for _, at in asked)
    places = tuple(place for place, _ in asked)
    return Refound(replace(questions, items=items), places, missing, chances, unexplained)


def _matched(fingerprints: Sequence[str], items: Sequence[Item]) -> list[int | None]:
    """Return for each fingerprint the place of its item, None where there is none; equal ones in the data's order."""
    waiting: dict[str, deque[int]] = defaultdict(deque)
    for at, item in enumerate(items):
        waiting[item.fingerprint].append(at)
    return [waiting[mark].popleft() if waiting[mark] else None for mark in fingerprints]


def _unexplained(items: Sequence[Item], there: Set[int], explained: Set[str], full: bool) -> int:
    """Count the items passed over; an audit takes the first ones, so one whose limit is ``full`` ends at its last."""
    end = max(there, default=-1) + 1 if full else len(items)
    return sum(at not in there and item.fingerprint not in explained for at, item in enumerate(items[:end]))
