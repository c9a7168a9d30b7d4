"""lm-eval's own filters and metrics, one item at a time, plus the gold answer's probability."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Sequence
from numbers import Real
from typing import Any

from layerprune.data.items import Answer, EvalItem, Verdict
from layerprune.errors import TaskError, one_line
from layerprune.util import source_of

# The accuracy of a task, in order of preference (the paper and the leaderboards use the length-normalised one).
ACCURACIES = ("acc_norm", "acc", "exact_match")


class LmEvalJudge:
    """Judges the items of one lm-eval task with the task's own ``process_results``.

    One that is ``ungraded`` may have no accuracy (its ``metric`` is empty, then), and must not be asked.
    """

    def __init__(self, task: Any, *, ungraded: bool = False) -> None:
        self.task = task
        self.filter = task._filters[0]
        self.metric = accuracy_of(task, ungraded=ungraded)
        _remember(task, "doc_to_choice")  # both are jinja templates, rendered anew for each removal otherwise
        _remember(task, "doc_to_target")

    def __call__(self, item: EvalItem, answers: Sequence[Answer]) -> Verdict:
        """Return the verdict on one item; raises ``TaskError`` when the metric is neither 0 nor 1.

        An item without a gold answer among its choices is wrong, as lm-eval has it, whatever the model says: its gold
        answer has the probability 0, and no lead.
        """
        if not item.answerable:
            offered = self.task.OUTPUT_TYPE == "multiple_choice"
            return Verdict(False, 0.0 if offered else None, 0.0 if offered else None)
        instances = item.key
        for instance, answer in zip(instances, answers, strict=True):
            instance.resps = [answer]
        self.filter.apply(instances)
        results = [instance.filtered_resps[self.filter.name] for instance in instances]
        try:
            value = self.task.process_results(instances[0].doc, results)[self.metric]
        except (TypeError, ValueError, IndexError, KeyError) as error:  # a label of a kind that lm-eval does not take
            what = f"task {self.task.config.task!r}: lm-eval cannot judge the item {item.fingerprint}"
            raise TaskError(f"{what}: {type(error).__name__}: {one_line(error)}") from error
        if value not in (0, 1):
            raise TaskError(f"task {self.task.config.task!r}: {self.metric} of one item is {value!r}; needed is 0 or 1")
        return Verdict(bool(value), *self._gold_figures(instances[0].doc, answers))

    def _gold_figures(self, doc: Any, answers: Sequence[Answer]) -> tuple[float | None, float | None]:
        """Return the gold answer's probability, and by how much the best gold answer leads the best wrong one.

        The lead is positive where the accuracy says right; it is in nats per character of the answer where the
        accuracy is acc_norm, which compares those, else in nats.
        """
        kind = self.task.OUTPUT_TYPE
        if kind == "loglikelihood":
            return math.exp(answers[0][0]), None  # type: ignore[index]
        if kind != "multiple_choice":
            return None, None
        choices, gold = choices_of(self.task, doc), gold_of(self.task, doc)
        logs = [answer[0] for answer in answers[: len(choices)]]  # type: ignore[index]
        top = max(logs)
        weights = [math.exp(value - top) for value in logs]
        probability = sum(weights[g] for g in gold) / sum(weights) if gold else None  # none: the task judges by itself
        if self.metric == "acc_norm":
            logs = [value / len(choice) for value, choice in zip(logs, choices, strict=True)]
        right = [value for number, value in enumerate(logs) if number in gold]
        wrong = [value for number, value in enumerate(logs) if number not in gold]
        return probability, max(right) - max(wrong) if right and wrong else None


def accuracy_of(task: Any, *, ungraded: bool = False) -> str:
    """Return the name of the task's accuracy; where it has none raises ``TaskError``, or returns "" if ``ungraded``."""
    known = list(task.higher_is_better())
    for name in ACCURACIES:
        if name in known:
            return name
    if ungraded:
        return ""
    more = "; signal=answers without only=right needs none" if task.OUTPUT_TYPE == "generate_until" else ""
    raise TaskError(
        f"task {task.config.task!r} has no accuracy to lose (its metrics: {', '.join(known) or 'none'}); "
        f"ablation needs one of {', '.join(ACCURACIES)}{more}"
    )


def definition_of(task: Any) -> str:
    """Return a hash of a task's config and code: functions and classes by the whole file they stand in.

    Where its file and its data lie is not in it, nor are files that those import.
    """
    config = {name: value for name, value in task.dump_config().items() if not name.startswith("dataset_")}
    told = {name: value for name, value in (config.pop("metadata", None) or {}).items() if name != "config_source"}
    return _hashed([config, told, _source(type(task))])


def content_of(doc: Any) -> str:
    """Return a hash of all that an item holds, whether a question shows it or only the judging reads it."""
    return _hashed(doc)


def _hashed(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=_source).encode()).hexdigest()


def _source(value: Any) -> str:
    """Return what stands for a value that JSON has no form for: of a function or a class its code."""
    text = source_of(value)
    return re.sub(r" at 0x[0-9a-f]+", "", str(value)) if text is None else text  # no address that a process gave


def choices_of(task: Any, doc: Any) -> list[str]:
    """Return the answers a multiple-choice item offers."""
    return list(task.doc_to_choice(doc))


def gold_of(task: Any, doc: Any) -> list[int]:
    """Return the indices of the right answers of an item that offers choices; empty where its label names none."""
    label = task.doc_to_text(doc) if getattr(task, "multiple_input", 0) else task.doc_to_target(doc)
    choices = choices_of(task, doc)
    places = [_place(each, choices) for each in (label if isinstance(label, list | tuple) else [label])]
    return list(dict.fromkeys(place for place in places if place is not None))


def _place(label: Any, choices: Sequence[str]) -> int | None:
    """Return the index a label stands for: itself, or that of the choice it spells; None where there is no such."""
    if isinstance(label, str):
        return choices.index(label) if label in choices else None
    whole = isinstance(label, Real) and float(label).is_integer()  # not None, and not the NaN of an empty cell
    return int(label) if whole and 0 <= label < len(choices) else None


def answerable(task: Any, doc: Any) -> bool:
    """Return whether an item's label is among its choices; tasks that judge by a function of their own need none."""
    judged_by_choices = task.OUTPUT_TYPE == "multiple_choice" or (
        task.OUTPUT_TYPE == "generate_until" and task.config.doc_to_choice is not None
    )
    return not judged_by_choices or callable(task.config.process_results) or bool(gold_of(task, doc))


def chance_of(task: Any, doc: Any) -> float:
    """Return the accuracy of guessing on one item: right answers over answers offered; 0 where no answer is right."""
    if task.OUTPUT_TYPE != "multiple_choice":
        return 0.0
    right = len(gold_of(task, doc)) or int(answerable(task, doc))  # a task that judges by itself: one, whichever it is
    return right / len(choices_of(task, doc))


def _remember(task: Any, name: str) -> None:
    """Wrap a task's template method on the instance so that each document is rendered once."""
    original = getattr(task, name)
    seen: dict[int, tuple[Any, Any]] = {}

    def rendered(doc: Any, template: Any = None) -> Any:
        if template is not None:
            return original(doc, template)
        entry = seen.get(id(doc))
        if entry is None or entry[0] is not doc:  # an id may be reused once its document is gone
            entry = seen[id(doc)] = (doc, original(doc))
        return entry[1]

    setattr(task, name, rendered)
