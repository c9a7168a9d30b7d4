"""Evaluates removals block by block; what was measured once is in a journal and is not measured again."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Collection, Sequence
from contextlib import nullcontext
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from layerprune.artifacts import Outcomes
from layerprune.data.items import EvalItem, EvalSet, EvalTask, OwnAnswer, is_written, with_own_answers
from layerprune.errors import DocumentError, TaskError
from layerprune.files import write_all, writing
from layerprune.models.generation import generate
from layerprune.models.model import LoadedModel
from layerprune.parsing import parse_json
from layerprune.removal import Removal
from layerprune.scoring.aggregation import joined
from layerprune.scoring.engine import Account, Engine
from layerprune.scoring.evaluator import answer_items, as_requests, judged
from layerprune.scoring.racing import LEAST_ITEMS, Race
from layerprune.util import SILENT, Advance, Progress, tool_versions

# Evaluates removals block by block: each (removal, block of items) is measured once, remembered, and written down.


# Items of the longest task in a block. A block is what a killed run loses at most, and after which racing may stop a
# candidate; smaller blocks leave less choice of rows of equal length to batch together.
BLOCK_ITEMS = 50

# What a candidate did on the items seen so far, to its importance on each by task, in any unit whose mean over all
# items orders candidates as their scores do: (items,) of each.
Importance = Callable[[dict[str, Outcomes]], dict[str, np.ndarray]]

JOURNAL = "journal.jsonl"
# Raised when an entry's form, a block or the way to measure changes: entries of another format are left alone.
JOURNAL_FORMAT = 6

Piece = dict[str, Outcomes]  # one removal on one block, by task


def block_edges(items: int, blocks: int) -> list[int]:
    """Return where each block of a task's items begins, and where the last one ends.

    The same share of every task, so that a few blocks are a sample of the whole; but of a short task the first block
    has what a race asks for before it decides anything.
    """
    first = min(items, LEAST_ITEMS, BLOCK_ITEMS)
    return [0, *(max(items * edge // blocks, first) for edge in range(1, blocks + 1))]


@dataclass
class CachedEvaluator:
    """One model and its questions. Ask for the outcomes of removals; what was measured before is not measured again."""

    engine: Engine
    eval_set: EvalSet
    progress: Progress = SILENT
    folder: Path | None = None  # the run folder; None: nothing is written down

    def __post_init__(self) -> None:
        count = -(-max(len(task.items) for task in self.eval_set.tasks.values()) // BLOCK_ITEMS)
        self.blocks = [self._block(number, count) for number in range(count)]
        self.known: dict[tuple[int, Removal], Piece] = {}
        self.work: dict[tuple[int, Removal], dict[str, Any]] = {}  # behind each, and all it was measured beside
        self.account = Account()
        self.path = ""  # which evaluation path the figures came by
        self.journal = None
        if self.folder is not None:
            key = journal_key(  # batches have a say in the last digit of a figure
                self.engine.loaded, self.eval_set, format=JOURNAL_FORMAT, tokens=self.engine.tokens,
                memory=self.engine.memory, rows=self.engine.rows, block=BLOCK_ITEMS,
            )  # fmt: skip
            self.journal = Journal(self.folder / JOURNAL, key)
            for entry in self.journal.entries:
                self._take(entry)

    def outcomes(self, removals: Sequence[Removal], label: str = "scoring") -> dict[Removal, dict[str, Outcomes]]:
        """Return the outcomes of every item, by removal and task."""
        wanted = list(dict.fromkeys(removals))
        missing = [len(part) for b, part in enumerate(self.blocks) for one in wanted if (b, one) not in self.known]
        with self.progress.task(label, sum(missing), "items") if missing else nullcontext() as advance:
            for block in range(len(self.blocks)):
                self._bring(block, wanted, advance)
        return {removal: self.seen(removal, len(self.blocks)) for removal in wanted}

    def _bring(self, block: int, removals: Sequence[Removal], advance: Advance | None) -> int:
        """Measure what is not known yet on one block; return how many of the removals that were.

        The work behind what is asked for is taken into the account once, whichever run did it. A folder's journal may
        hold what another command has asked: documents say what theirs took.
        """
        pending = [removal for removal in removals if (block, removal) not in self.known]
        if pending:
            self.measure(block, pending, advance)
        for removal in removals:
            work = self.work.get((block, removal))
            if work is not None and not work["counted"]:
                work["counted"] = True
                self.path = work["path"]
                self.account.computed += work["computed"]
                self.account.naive += work["naive"]
        return len(pending)

    def measure(self, block: int, removals: Sequence[Removal], advance: Advance | None = None) -> None:
        """Measure removals on one block, remember it and write it down; ``advance`` hears of items x removals."""
        self.prepare()
        eval_set = self.blocks[block]
        items = [item for task in eval_set.tasks.values() for item in task.items]
        before = replace(self.engine.account)
        answers = answer_items(self.engine, items, removals, advance)
        pieces = [judged(eval_set, own, margins=True) for own in answers]
        entry = {
            "block": block,
            "removals": [list(removal.layers) for removal in removals],
            "pieces": [{name: o.model_dump(mode="json") for name, o in piece.items()} for piece in pieces],
            "path": self.engine.path.name,
            "computed": self.engine.account.computed - before.computed,
            "naive": self.engine.account.naive - before.naive,
        }
        if self.journal:
            self.journal.append(entry)
        self._take(entry)

    def _take(self, entry: dict[str, Any]) -> None:
        work = {"counted": False, "path": entry["path"], "computed": entry["computed"], "naive": entry["naive"]}
        for units, piece in zip(entry["removals"], entry["pieces"], strict=True):
            found = {name: Outcomes.model_validate(value) for name, value in piece.items()}
            place = entry["block"], Removal.from_layers(units)
            self.known[place], self.work[place] = found, work

    def prepare(self) -> None:
        """Test the paths, if that was not done yet, on all items: the path must suit the longest of them."""
        if self.engine.longest:
            return
        requests, groups = as_requests([item for task in self.eval_set.tasks.values() for item in task.items])
        if requests:
            self.engine.choose_path(requests, groups)

    def _block(self, number: int, count: int) -> EvalSet:
        """Return the items of one of ``count`` blocks."""
        parts = {}
        for name, task in self.eval_set.tasks.items():
            start, stop = block_edges(len(task.items), count)[number : number + 2]
            if stop > start:
                parts[name] = replace(task, items=task.items[start:stop])
        return EvalSet(parts)

    def race(
        self, removals: Sequence[Removal], keep: int, importance: Importance, label: str = "racing",
        counted: Collection[str] | None = None,
    ) -> tuple[dict[Removal, dict[str, Outcomes]], frozenset[Removal]]:  # fmt: skip
        """Run the removals until it is clear which ``keep`` of them do least harm; each stops when its place is clear.

        Returns the outcomes on the items each removal ran over, and those that left before the end as clearly among
        the best. What was measured before is not measured again, and a removal whose log-likelihoods are not finite is
        eliminated.
        ``counted`` names the tasks that have a say, None all of them: no number of items would show a difference on one
        that counts for nothing.
        """
        asked = list(dict.fromkeys(removals))
        tasks = [name for name in self.eval_set.tasks if counted is None or name in counted]
        items = tuple(len(self.eval_set.tasks[name].items) for name in tasks)
        race = Race(len(asked), items, keep, len(self.blocks))
        ran = dict.fromkeys(asked, 0)
        with self.progress.task(label, len(self.eval_set) * len(asked), "items") as advance:
            for block in range(len(self.blocks)):
                running = [asked[number] for number in race.running]
                measured = self._bring(block, running, advance)
                advance(len(self.blocks[block]) * (len(running) - measured))
                for removal in running:
                    ran[removal] = block + 1
                failed = {r for r in running if any(own.not_finite for own in self.known[block, r].values())}
                race.running = [number for number in race.running if asked[number] not in failed]
                found = [importance(self.seen(asked[number], block + 1)) for number in race.running]
                nothing = np.empty(0)  # of a task whose first item is yet to come
                settled = race.settle([np.array([own.get(name, nothing) for own in found]) for name in tasks])
                advance((len(failed) + len(settled)) * sum(map(len, self.blocks[block + 1 :])))
                if not race.running:
                    break
        accepted = frozenset(asked[number] for number in race.accepted if ran[asked[number]] < len(self.blocks))
        return {removal: self.seen(removal, blocks) for removal, blocks in ran.items()}, accepted

    def seen(self, removal: Removal, blocks: int) -> dict[str, Outcomes]:
        """Return a removal's outcomes on the first ``blocks`` blocks."""
        found = {}
        for name in self.eval_set.tasks:
            pieces = [self.known[b, removal][name] for b in range(blocks) if name in self.blocks[b].tasks]
            if pieces:
                found[name] = joined(pieces)
        return found


# What has been measured so far, appended to a file as it comes, so that a killed run goes on where it was.


def journal_key(loaded: LoadedModel, eval_set: EvalSet | None, **settings: Any) -> str:
    """Return a hash of what a measurement depends on: the model, what is asked and how it is judged, tools, settings.

    Not in it: files that a task's own file imports.
    """
    asked = None if eval_set is None else eval_set.mark()
    whole = {"subject": loaded.marks, "asked": asked, "versions": tool_versions(), "settings": settings}
    return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()[:16]


def _check(entry: dict[str, Any]) -> str:
    """Return what tells a line that was changed since it was written."""
    return hashlib.sha256(json.dumps(entry, separators=(",", ":")).encode()).hexdigest()[:16]


class Journal:
    """An append-only file of JSON lines. Lines of a run with other settings (another ``key``) are left alone."""

    def __init__(self, path: Path, key: str) -> None:
        self.path, self.key = path, key
        self.entries = self._read()

    def _read(self) -> list[dict[str, Any]]:
        """Return this key's entries; a last line that a kill cut short is removed from the file."""
        if not self.path.exists():
            return []
        data = self.path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        if len(whole) < len(data):
            with writing(self.path):
                os.truncate(self.path, len(whole))
        entries = []
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                entry = parse_json(line.decode())
                if not isinstance(entry, dict):
                    raise ValueError("it is no object")
                if entry.get("key") == self.key and entry.pop("check", None) != _check(entry):
                    raise ValueError("it is not as it was written")
            except ValueError as error:
                said = f"{self.path} is damaged (line {number}: {error}); remove it to measure again"
                raise DocumentError(said) from error
            if entry.get("key") == self.key:
                entries.append(entry)
        return entries

    def append(self, entry: dict[str, Any]) -> None:
        """Add one entry and have it on the disk before returning; on a ``WriteError`` the file is as it was."""
        entry = {"key": self.key, **entry}
        line = json.dumps(entry | {"check": _check(entry)}, separators=(",", ":"), allow_nan=False) + "\n"
        with writing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            before = self.path.stat().st_size if self.path.exists() else 0
            try:
                with self.path.open("ab", buffering=0) as file:
                    write_all(file, line.encode())
                    os.fsync(file.fileno())
            except BaseException:  # take back what was written of the entry
                if before:
                    os.truncate(self.path, before)
                else:
                    self.path.unlink(missing_ok=True)
                raise
        self.entries.append(entry)


# The intact model answers the prompts of tasks that have it write: once, kept in the run folder.


FILENAME = "answers.jsonl"
CHUNK = 64  # prompts between two entries of the journal: what a killed run loses at most


def own_answers(
    engine: Engine,
    eval_set: EvalSet,
    *,
    only_right: bool = False,
    folder: Path | None = None,
    progress: Progress = SILENT,
) -> EvalSet:
    """Have the intact model answer, and return the questions with those answers in the place of its writing.

    Tasks that offer choices stay as they are. ``folder`` keeps what was written: killed and called again, it goes on.
    Raises ``TaskError`` where no task has the model write, and for ``only_right`` where it was never right, or where
    a task has no accuracy.
    """
    written = {name: task for name, task in eval_set.tasks.items() if is_written(task)}
    if not written:
        names = ", ".join(eval_set.tasks)
        raise TaskError(f"signal=answers reads what the model writes, and {names} only offers choices; add a task")
    if ungraded := [name for name, task in written.items() if only_right and not task.metric]:
        raise TaskError(f"task {ungraded[0]!r} has no accuracy that says which answers are right: leave only=right out")
    settings = {"memory": engine.memory, "rows": engine.rows, "chunk": CHUNK, "graded": only_right}
    key = journal_key(engine.loaded, EvalSet(written), purpose="own answers", **settings)
    journal = Journal(folder / FILENAME, key) if folder else None
    known: dict[tuple[str, int], list[OwnAnswer]] = {
        (entry["task"], entry["start"]): [OwnAnswer(tuple(p), tuple(a), right) for p, a, right in entry["answers"]]
        for entry in (journal.entries if journal else [])
    }
    found: dict[str, EvalTask] = {}
    total = sum(len(task.items) for task in written.values())
    with progress.task("the intact model answers", total, "prompts") as advance:
        for name, task in written.items():
            answers: list[OwnAnswer] = []
            for start in range(0, len(task.items), CHUNK):
                few = task.items[start : start + CHUNK]
                if (name, start) not in known:
                    known[name, start] = _answered(engine, task, few, graded=only_right)
                    if journal:
                        answered = [astuple(own) for own in known[name, start]]
                        journal.append({"task": name, "start": start, "answers": answered})
                answers += known[name, start]
                advance(len(few))
            found[name] = with_own_answers(task, answers, only_right=only_right)
            if not found[name].items:
                raise TaskError(
                    f"task {task.name!r}: the intact model is right on none of {len(answers)} prompts; leave "
                    "only=right out, or the task"
                )
    return replace(eval_set, tasks={name: found.get(name, task) for name, task in eval_set.tasks.items()})


def _answered(engine: Engine, task: EvalTask, items: Sequence[EvalItem], *, graded: bool) -> list[OwnAnswer]:
    instances = [item.queries[0].generation for item in items if item.queries[0].generation]
    texts = generate(engine.loaded, instances, memory=engine.memory, rows=engine.rows, greedy=True)
    return [
        OwnAnswer(own.prompt, own.ids, task.judge(item, [own.text]).correct if graded else None)
        for item, own in zip(items, texts, strict=True)
    ]
