"""The intact model answers the prompts of tasks that have it write: once, kept in the run folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from layerprune.engine.engine import Engine
from layerprune.engine.journal import Journal, journal_key
from layerprune.errors import TaskError
from layerprune.generation import generate
from layerprune.progress import SILENT, Progress
from layerprune.tasks.answers import OwnAnswer, is_written, with_own_answers
from layerprune.tasks.items import Item, Questions, TaskQuestions

FILENAME = "answers.jsonl"
CHUNK = 64  # prompts between two entries of the journal: what a killed run loses at most


def own_answers(
    engine: Engine,
    questions: Questions,
    *,
    only_right: bool = False,
    folder: Path | None = None,
    progress: Progress = SILENT,
) -> Questions:
    """Have the intact model answer, and return the questions with those answers in the place of its writing.

    Tasks that offer choices stay as they are. ``folder`` keeps what was written: killed and called again, it goes on.
    Raises ``TaskError`` where no task has the model write, and for ``only_right`` where it was never right, or where
    a task has no accuracy.
    """
    written = {name: task for name, task in questions.tasks.items() if is_written(task)}
    if not written:
        names = ", ".join(questions.tasks)
        raise TaskError(f"signal=answers reads what the model writes, and {names} only offers choices; add a task")
    if ungraded := [name for name, task in written.items() if only_right and not task.metric]:
        raise TaskError(f"task {ungraded[0]!r} has no accuracy that says which answers are right: leave only=right out")
    settings = {"memory": engine.memory, "rows": engine.rows, "chunk": CHUNK, "graded": only_right}
    key = journal_key(engine.subject, Questions(written), purpose="own answers", **settings)
    journal = Journal(folder / FILENAME, key) if folder else None
    known: dict[tuple[str, int], list[OwnAnswer]] = {
        (entry["task"], entry["start"]): [OwnAnswer(tuple(p), tuple(a), right) for p, a, right in entry["answers"]]
        for entry in (journal.entries if journal else [])
    }
    found: dict[str, TaskQuestions] = {}
    total = sum(len(task.items) for task in written.values())
    with progress.task("the intact model answers", total, "prompts") as advance:
        for name, task in written.items():
            answers: list[OwnAnswer] = []
            for start in range(0, len(task.items), CHUNK):
                few = task.items[start : start + CHUNK]
                if (name, start) not in known:
                    known[name, start] = _answered(engine, task, few, graded=only_right)
                    if journal:
                        journal.append({"task": name, "start": start, "answers": list(map(_plain, known[name, start]))})
                answers += known[name, start]
                advance(len(few))
            found[name] = _kept(task, answers, only_right)
    return replace(questions, tasks={name: found.get(name, task) for name, task in questions.tasks.items()})


def _answered(engine: Engine, task: TaskQuestions, items: Sequence[Item], *, graded: bool) -> list[OwnAnswer]:
    instances = [item.queries[0].generation.instance for item in items if item.queries[0].generation]
    texts = generate(engine.subject, instances, memory=engine.memory, rows=engine.rows, greedy=True)
    return [
        OwnAnswer(own.prompt, own.ids, task.judge(item, [own.text]).correct if graded else None)
        for item, own in zip(items, texts, strict=True)
    ]


def _plain(own: OwnAnswer) -> list[Any]:
    return [own.prompt, own.answer, own.right]


def _kept(task: TaskQuestions, answers: Sequence[OwnAnswer], only_right: bool) -> TaskQuestions:
    kept = with_own_answers(task, answers, only_right=only_right)
    if not kept.items:
        raise TaskError(
            f"task {task.name!r}: the intact model is right on none of {len(answers)} prompts; leave only=right out, "
            "or the task"
        )
    return kept
