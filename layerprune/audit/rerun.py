"""Repeating a random part of an audit: the strongest check a stranger can make of somebody else's figures."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from layerprune.audit.exported import Exported
from layerprune.audit.models import Loading, base_source
from layerprune.documents import PRUNED, Audit, AuditedTask, Outcomes
from layerprune.engine import Engine, examine
from layerprune.errors import UsageError
from layerprune.progress import SILENT, Progress
from layerprune.removal import Removal
from layerprune.tasks import Questions, TaskQuestions, load_questions
from layerprune.tasks.encoding import Encoder
from layerprune.tasks.judging import choices_of

# Another batch shape or machine moves a probability by rounding, and may turn an item that stands on the edge.
# Measured in bfloat16 on the same machine: below 0.02. A forged outcome has to be that close to the truth to pass.
PROBABILITY_TOLERANCE = 0.05
# A decision may turn only on an item that stands on the edge: where the gold answer and the best wrong one are so close
# that rounding decides. As much rounding as the probability is allowed: 0.05 at even odds are 0.05 / (0.5 * 0.5) nats.
# In float32 far less is lost: the same margins on the same machine differ by less than 1e-4 nats.
MARGIN_TOLERANCE = {"float32": 0.002, "float64": 0.002}
MARGIN_TOLERANCE_HALF = PROBABILITY_TOLERANCE / 0.25


@dataclass(frozen=True)
class Repeated:
    """What came out when random audit items were asked again."""

    items: int  # of each model
    same_decisions: int  # of base and pruned together, so at most twice the items
    largest_change: float | None  # of a gold answer's probability
    problems: tuple[str, ...]


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
) -> Repeated:
    """Ask both models ``count`` random items of the audit again and compare decisions and gold probabilities.

    ``seed`` None draws anew each time, so that nobody can know beforehand which items will be asked.
    """
    exported = Exported.read(folder)
    audit = Audit.load(Path(folder) / "layerprune" / Audit.filename)
    chosen = _draw(audit, count, seed)
    loading = replace(loading or Loading(), dtype=audit.dtype)
    pruned = loading.subject(str(folder))
    tasks = {task.data.task: _questions(task, pruned.encoder, chosen, include_path, data_dir) for task in audit.tasks}
    questions = Questions({name: task for name, task in tasks.items() if task.items})
    found = {PRUNED: _ask(loading.engine(pruned), questions, progress, "asking the pruned model")}
    del pruned
    subject = loading.subject(*base_source(exported.receipt, base))
    found["base"] = _ask(loading.engine(subject), questions, progress, "asking the base model")
    return _compare(audit, questions, found)


def _draw(audit: Audit, count: int, seed: int | None) -> frozenset[str]:
    every = [(task.data.task, mark) for task in audit.tasks for mark in task.data.fingerprints]
    if not 1 <= count <= len(every):
        raise UsageError(f"{count} items cannot be repeated: the audit has {len(every)}")
    return frozenset(mark for _, mark in random.Random(seed).sample(every, count))


def _questions(
    task: AuditedTask,
    encoder: Encoder,
    chosen: frozenset[str],
    include_path: Sequence[str | Path],
    data_dir: Path | None,
) -> TaskQuestions:
    """Build the audited items as the audit did, and keep the chosen ones.

    Few-shot examples are drawn item after item, so the items the audit left out have to be left out here too.
    """

    def load(exclude: frozenset[str]) -> TaskQuestions:
        return load_questions(
            [task.data.task], encoder, use="evaluation", include_path=include_path, data_dir=data_dir,
            num_fewshot=task.data.num_fewshot, exclude=exclude,
        ).tasks[task.data.task]  # fmt: skip

    audited = frozenset(task.data.fingerprints)
    questions = load(frozenset())
    left_out = frozenset(item.fingerprint for item in questions.items) - audited
    if task.data.num_fewshot and left_out:
        questions = load(left_out)
    return replace(questions, items=tuple(item for item in questions.items if item.fingerprint in chosen & audited))


def _ask(engine: Engine, questions: Questions, progress: Progress, label: str) -> dict[str, Outcomes]:
    intact = Removal(())
    return examine(engine, questions, [intact], progress, label, margins=True)[intact]


def _compare(audit: Audit, questions: Questions, found: dict[str, dict[str, Outcomes]]) -> Repeated:
    problems: list[str] = []
    same, changes = 0, []
    for task in audit.tasks:
        name = task.data.task
        if name not in questions.tasks:
            continue
        place = {mark: index for index, mark in enumerate(task.data.fingerprints)}
        for label, written in (("base", task.base_outcomes), (PRUNED, task.models[PRUNED].outcomes)):
            again = found[label][name]
            for number, item in enumerate(questions.tasks[name].items):
                index = place[item.fingerprint]
                agrees = again.correct[number] == written.correct[index]
                same += agrees
                change = _change(again, number, written, index)
                if change is not None:
                    changes.append(change)
                moved = change is not None and change > PROBABILITY_TOLERANCE
                if moved or not (agrees or _on_the_edge(questions.tasks[name], number, again, audit.dtype)):
                    problems.append(f"{name}: item {item.fingerprint} does not repeat for the {label} model")
    items = len(questions)
    return Repeated(items, same, max(changes, default=None), tuple(problems))


def _change(again: Outcomes, number: int, written: Outcomes, index: int) -> float | None:
    if again.gold_probability is None or written.gold_probability is None:
        return None
    return abs(again.gold_probability[number] - written.gold_probability[index])


def _on_the_edge(task: TaskQuestions, number: int, again: Outcomes, dtype: str) -> bool:
    """Whether rounding alone may have decided an item; one without a margin is never so excused."""
    if again.margin is None:
        return False
    tolerance = MARGIN_TOLERANCE.get(dtype, MARGIN_TOLERANCE_HALF)
    if task.metric == "acc_norm":  # its margins are in nats a character
        judge, item = getattr(task.judge, "task", None), task.items[number]
        tolerance /= max(1, min(len(answer) for answer in choices_of(judge, item.key[0].doc)))
    return abs(again.margin[number]) <= tolerance
