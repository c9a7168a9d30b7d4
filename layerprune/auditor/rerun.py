"""Repeating a random part of an audit: the strongest check a stranger can make of somebody else's figures."""

from __future__ import annotations

import math
import random
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from layerprune.artifacts import PRUNED, UNHEALED, Audit, AuditedTask, Outcomes
from layerprune.auditor.inputs import ExportedFolder, Loading
from layerprune.checkpoint.location import source_of
from layerprune.data.items import EvalItem, EvalSet, EvalTask
from layerprune.data.judging import choices_of
from layerprune.data.tasks import load_eval_set
from layerprune.errors import UsageError
from layerprune.removal import Removal
from layerprune.scoring.engine import Engine
from layerprune.scoring.evaluator import evaluate
from layerprune.stats import above_chance
from layerprune.util import SILENT, Progress

# Another batch shape or machine moves a probability by rounding, and may turn an item that stands on the edge.
# Measured in bfloat16 on the same machine: below 0.02. A forged outcome has to be that close to the truth to pass.
PROBABILITY_TOLERANCE = 0.05
# A decision may turn only on an item that stands on the edge: where the gold answer and the best wrong one are so close
# that rounding decides. As much rounding as the probability is allowed: 0.05 at even odds are 0.05 / (0.5 * 0.5) nats.
# In float32 far less is lost: the same margins on the same machine differ by less than 1e-4 nats.
MARGIN_TOLERANCE = {"float32": 0.002, "float64": 0.002}
MARGIN_TOLERANCE_HALF = PROBABILITY_TOLERANCE / 0.25


@dataclass(frozen=True)
class RerunResult:
    """What came out when random audit items were asked again."""

    items: int  # of each model
    same_decisions: int  # of base and pruned together, so at most twice the items
    largest_change: float | None  # of a gold answer's probability
    problems: tuple[str, ...]
    unexplained: int = 0  # items left out that only a compared plan, which is not in the folder, can have seen


def repeat(
    folder: Path,
    count: int,
    *,
    base: str | None = None,
    include_path: Sequence[str | Path] = (),
    data_dir: Path | None = None,
    loading: Loading | None = None,
    seed: int | None = None,
    progress: Progress = SILENT,
) -> RerunResult:
    """Ask both models ``count`` random items of the audit again and compare decisions and gold probabilities.

    Of every task it is also looked whether it has the audited items, and whether any was left out that no earlier step
    has seen. ``seed`` None draws anew each time, so that nobody can know beforehand which items will be asked.
    """
    exported = ExportedFolder.read(folder)
    audit = exported.audit or Audit.load(Path(folder) / "layerprune" / Audit.filename)
    drawn = _draw(audit, count, seed)
    loading = replace(loading or Loading(), dtype=audit.dtype, attn_implementation=audit.attention or "auto")
    pruned = loading.load_model(str(folder))
    load = partial(
        load_eval_set, encoder=pruned.encoder, use="evaluation", include_path=include_path, data_dir=data_dir
    )
    tasks = {
        task.data.task: refind(task, places, exported.seen, audit.limit, load)
        for task, places in zip(audit.tasks, drawn, strict=True)
    }
    problems, unexplained = _passed_over(audit, tasks)
    problems += _chances(audit, tasks)
    eval_set = EvalSet({name: task.asked for name, task in tasks.items() if task.asked.items})
    if not eval_set.tasks:
        return RerunResult(0, 0, None, tuple(problems), unexplained)
    found = {PRUNED: _ask(loading.engine(pruned), eval_set, progress, "asking the pruned model")}
    del pruned, load  # both hold the model
    loaded = loading.load_model(*source_of(exported.receipt.base, base))
    found["base"] = _ask(loading.engine(loaded), eval_set, progress, "asking the base model")
    same, changes, forged = _compare(audit, tasks, found)
    largest = max(changes, default=None)
    return RerunResult(len(eval_set), same, largest, (*problems, *forged), unexplained)


def _draw(audit: Audit, count: int, seed: int | None) -> list[Set[int]]:
    """Return for each task the places of the items to ask."""
    every = [(number, place) for number, task in enumerate(audit.tasks) for place in range(task.data.items)]
    if not 1 <= count <= len(every):
        raise UsageError(f"{count} items cannot be repeated: the audit has {len(every)}")
    chosen = random.Random(seed).sample(every, count)
    return [{place for task, place in chosen if task == number} for number in range(len(audit.tasks))]


def _passed_over(audit: Audit, tasks: Mapping[str, MatchedItems]) -> tuple[list[str], int]:
    """Return what is wrong with the choice of items, and how many only a compared plan can explain."""
    problems, unexplained = list[str](), 0
    others = set(audit.compared) - {UNHEALED}
    for name, task in tasks.items():
        if task.missing:
            problems.append(f"{name}: {len(task.missing)} audited items are not the task's, {task.missing[0]} for one")
        if task.unexplained and not others:
            problems.append(f"{name}: {task.unexplained} items were left out that no earlier step has seen")
        unexplained += task.unexplained if others else 0
    return problems, unexplained


def _chances(audit: Audit, tasks: Mapping[str, MatchedItems]) -> Iterator[str]:
    """Yield the tasks whose chance level, or how far the base is above it, is not what their items give."""
    for task in audit.tasks:
        chances = tasks[task.data.task].chances
        if chances is None:  # said already
            continue
        p_value = above_chance(task.base_outcomes.correct, chances)
        # another scipy may round a far tail differently; what counts is on which side of 5 % it lies
        same = math.isclose(p_value, task.p_above_chance, rel_tol=1e-6, abs_tol=1e-12)
        if not same or not math.isclose(sum(chances) / len(chances), task.data.chance, abs_tol=1e-6):
            yield f"{task.data.task}: its chance level and the base's p-value do not follow from its items"


def _ask(engine: Engine, eval_set: EvalSet, progress: Progress, label: str) -> dict[str, Outcomes]:
    intact = Removal(())
    return evaluate(engine, eval_set, [intact], progress, label, margins=True)[intact]


def _compare(
    audit: Audit, tasks: Mapping[str, MatchedItems], found: Mapping[str, Mapping[str, Outcomes]]
) -> tuple[int, list[float], list[str]]:
    """Return how many decisions are the same, how far gold probabilities moved, and which items do not repeat."""
    same, changes, problems = 0, list[float](), list[str]()
    for task in audit.tasks:
        name = task.data.task
        eval_set = tasks[name].asked
        if not eval_set.items:
            continue
        for label, written in (("base", task.base_outcomes), (PRUNED, task.models[PRUNED].outcomes)):
            again = found[label][name]
            for number, index in enumerate(tasks[name].places):
                agrees, change = again.correct[number] == written.correct[index], 0.0
                same += agrees
                if again.gold_probability is not None and written.gold_probability is not None:
                    change = abs(again.gold_probability[number] - written.gold_probability[index])
                    changes.append(change)
                if change > PROBABILITY_TOLERANCE or not (agrees or on_the_edge(eval_set, number, again, audit.dtype)):
                    mark = task.data.fingerprints[index]
                    problems.append(f"{name}: item {mark} does not repeat for the {label} model")
    return same, changes, problems


def on_the_edge(task: EvalTask, number: int, again: Outcomes, dtype: str) -> bool:
    """Whether rounding alone may have decided an item; one without a margin is never so excused."""
    if again.margin is None:
        return False
    tolerance = MARGIN_TOLERANCE.get(dtype, MARGIN_TOLERANCE_HALF)
    if task.metric == "acc_norm":  # its margins are in nats a character
        judge, item = getattr(task.judge, "task", None), task.items[number]
        tolerance /= max(1, min(len(answer) for answer in choices_of(judge, item.key[0].doc)))
    return abs(again.margin[number]) <= tolerance


# The items of an audit, found again among their task's own: which are there, and which the audit passed over.


@dataclass(frozen=True)
class MatchedItems:
    """What became of one task's audited items."""

    asked: EvalTask  # the drawn items that are there
    places: tuple[int, ...]  # of each of them among the audit's outcomes
    missing: tuple[str, ...]  # fingerprints in the audit that the task does not have, or not so often
    chances: tuple[float, ...] | None  # of guessing each audited item; None where some are missing
    unexplained: int  # items that no earlier step has seen and that the audit left out all the same


def refind(
    task: AuditedTask,
    drawn: Set[int],
    explained: Set[str],
    limit: int | None,
    load: Callable[..., EvalSet],
) -> MatchedItems:
    """Build one task's items anew and find the audited ones; ``drawn`` are the places of those to be asked.

    ``explained`` are the items that the audit had to leave out, ``limit`` is the audit's. ``load`` is
    ``load_eval_set`` with all that is the same for every task.
    """
    name, options = task.data.task, {"num_fewshot": task.data.num_fewshot, "prompting": task.data.prompting}
    eval_set = load([name], **options).tasks[name]
    found = _matched(task.data.fingerprints, eval_set.items)
    missing = tuple(mark for mark, at in zip(task.data.fingerprints, found, strict=True) if at is None)
    chances = None if missing else tuple(eval_set.items[at].chance for at in found if at is not None)
    there = {at for at in found if at is not None}
    unexplained = _unexplained(eval_set.items, there, explained, limit == len(found))
    left_out = {item.fingerprint for item in eval_set.items} - set(task.data.fingerprints)
    if task.data.num_fewshot and left_out and there:
        # few-shot examples are drawn item after item, so the items the audit left out have to be left out here too
        eval_set = load([name], **options, exclude=left_out).tasks[name]
        found = _matched(task.data.fingerprints, eval_set.items)
    asked = [(place, at) for place, at in enumerate(found) if place in drawn and at is not None]
    items = tuple(eval_set.items[at] for _, at in asked)
    places = tuple(place for place, _ in asked)
    return MatchedItems(replace(eval_set, items=items), places, missing, chances, unexplained)


def _matched(fingerprints: Sequence[str], items: Sequence[EvalItem]) -> list[int | None]:
    """Return for each fingerprint the place of its item, None where there is none; equal ones in the data's order."""
    waiting: dict[str, deque[int]] = defaultdict(deque)
    for at, item in enumerate(items):
        waiting[item.fingerprint].append(at)
    return [waiting[mark].popleft() if waiting[mark] else None for mark in fingerprints]


def _unexplained(items: Sequence[EvalItem], there: Set[int], explained: Set[str], full: bool) -> int:
    """Count the items passed over; an audit takes the first ones, so one whose limit is ``full`` ends at its last."""
    end = max(there, default=-1) + 1 if full else len(items)
    return sum(at not in there and item.fingerprint not in explained for at, item in enumerate(items[:end]))
