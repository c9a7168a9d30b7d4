"""Examines removals block by block: each (removal, block of items) is measured once, remembered, and written down."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from layerprune.documents import Outcomes
from layerprune.engine.engine import Account, Engine
from layerprune.engine.exam import answer_items, as_requests, joined, judged
from layerprune.engine.journal import Journal, journal_key
from layerprune.progress import SILENT, Advance, Progress
from layerprune.racing import LEAST_ITEMS, Field, Race
from layerprune.removal import Removal
from layerprune.tasks.items import Questions

# Items of the longest task in a block. A block is what a killed run loses at most, and after which racing may stop a
# candidate; smaller blocks leave less choice of rows of equal length to batch together.
BLOCK_ITEMS = 50

# What a candidate did on the items seen so far, to its harm on each by task, in any unit whose mean over all items
# orders candidates as their scores do: (items,) of each.
Harm = Callable[[dict[str, Outcomes]], dict[str, np.ndarray]]

JOURNAL = "journal.jsonl"
# Raised when an entry's form, a block or the way to measure changes: entries of another format are left alone.
JOURNAL_FORMAT = 4

Piece = dict[str, Outcomes]  # one removal on one block, by task


def block_edges(items: int, blocks: int) -> list[int]:
    """Return where each block of a task's items begins, and where the last one ends.

    The same share of every task, so that a few blocks are a sample of the whole; but of a short task the first block
    has what a race asks for before it decides anything.
    """
    first = min(items, LEAST_ITEMS, BLOCK_ITEMS)
    return [0, *(max(items * edge // blocks, first) for edge in range(1, blocks + 1))]


@dataclass(frozen=True)
class Raced:
    """What a race ended with."""

    outcomes: dict[Removal, dict[str, Outcomes]]  # of the items each removal ran over
    accepted: frozenset[Removal]  # left before the end as clearly among the best


@dataclass
class Examiner:
    """One model and its questions. Ask for the outcomes of removals; what was measured before is not measured again."""

    engine: Engine
    questions: Questions
    progress: Progress = SILENT
    folder: Path | None = None  # the run folder; None: nothing is written down

    def __post_init__(self) -> None:
        count = -(-max(len(task.items) for task in self.questions.tasks.values()) // BLOCK_ITEMS)
        self.blocks = [self._block(number, count) for number in range(count)]
        self.known: dict[tuple[int, Removal], Piece] = {}
        self.uncounted: dict[tuple[int, Removal], dict[str, Any]] = {}  # what the account has not taken in yet
        self.account = Account()
        self.path = ""  # which evaluation path the figures came by
        self.journal = Journal(self.folder / JOURNAL, self._key()) if self.folder else None
        for entry in self.journal.entries if self.journal else []:
            self._take(entry)

    def outcomes(self, removals: Sequence[Removal], label: str = "scoring") -> dict[Removal, dict[str, Outcomes]]:
        """Return the outcomes of every item, by removal and task."""
        wanted = list(dict.fromkeys(removals))
        missing = {b: [r for r in wanted if (b, r) not in self.known] for b in range(len(self.blocks))}
        total = sum(len(self.blocks[b]) * len(removals) for b, removals in missing.items())
        if total:
            with self.progress.task(label, total, "items") as advance:
                for block, pending in missing.items():
                    if pending:
                        self.measure(block, pending, advance)
        for block in range(len(self.blocks)):
            self._count(block, wanted)
        return {removal: self._joined(removal) for removal in wanted}

    def measure(self, block: int, removals: Sequence[Removal], advance: Advance | None = None) -> None:
        """Measure removals on one block, remember it and write it down; ``advance`` hears of items x removals."""
        self.prepare()
        questions = self.blocks[block]
        items = [item for task in questions.tasks.values() for item in task.items]
        before = replace(self.engine.account)
        answers = answer_items(self.engine, items, removals, advance)
        pieces = [judged(questions, own, margins=True) for own in answers]
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
        for units, piece in zip(entry["removals"], entry["pieces"], strict=True):
            found = {name: Outcomes.model_validate(value) for name, value in piece.items()}
            place = entry["block"], Removal.from_layers(units)
            self.known[place], self.uncounted[place] = found, entry

    def _count(self, block: int, removals: Sequence[Removal]) -> None:
        """Take the work behind what is asked for into the account, once, whichever run did it.

        A folder's journal may hold what another command has asked: documents say what theirs took.
        """
        for removal in removals:
            entry = self.uncounted.pop((block, removal), None)
            if entry is None:
                continue
            for units in entry["removals"]:
                self.uncounted.pop((block, Removal.from_layers(units)), None)
            self.path = entry["path"]
            self.account.computed += entry["computed"]
            self.account.naive += entry["naive"]

    def prepare(self) -> None:
        """Test the paths, if that was not done yet, on all items: the path must suit the longest of them."""
        if self.engine.longest:
            return
        requests, groups = as_requests([item for task in self.questions.tasks.values() for item in task.items])
        if requests:
            self.engine.choose_path(requests, groups)

    def _block(self, number: int, count: int) -> Questions:
        """Return the items of one of ``count`` blocks."""
        parts = {}
        for name, task in self.questions.tasks.items():
            start, stop = block_edges(len(task.items), count)[number : number + 2]
            if stop > start:
                parts[name] = replace(task, items=task.items[start:stop])
        return Questions(parts)

    def race(
        self, removals: Sequence[Removal], keep: int, harm: Harm, label: str = "racing",
        counted: Collection[str] | None = None,
    ) -> Raced:  # fmt: skip
        """Run the removals until it is clear which ``keep`` of them do least harm; each stops when its place is clear.

        What was measured before is not measured again, and a removal whose log-likelihoods are not finite is put out.
        ``counted`` names the tasks that have a say, None all of them: no number of items would show a difference on one
        that counts for nothing.
        """
        asked = list(dict.fromkeys(removals))
        tasks = [name for name in self.questions.tasks if counted is None or name in counted]
        items = tuple(len(self.questions.tasks[name].items) for name in tasks)
        field = Field.of(Race(len(asked), items, keep, len(self.blocks)))
        ran = dict.fromkeys(asked, 0)
        with self.progress.task(label, len(self.questions) * len(asked), "items") as advance:
            for block in range(len(self.blocks)):
                running = [asked[number] for number in field.running]
                pending = [removal for removal in running if (block, removal) not in self.known]
                if pending:
                    self.measure(block, pending, advance)
                self._count(block, running)
                advance(len(self.blocks[block]) * (len(running) - len(pending)))
                for removal in running:
                    ran[removal] = block + 1
                left = field.withdraw([n for n in field.running if self._failed(block, asked[n])])
                still = [asked[number] for number in field.running]
                left = [*left, *field.settle(self._harms(still, block + 1, harm, tasks))]
                advance(len(left) * sum(len(questions) for questions in self.blocks[block + 1 :]))
                if field.over:
                    break
        accepted = frozenset(asked[number] for number in field.accepted if ran[asked[number]] < len(self.blocks))
        return Raced({removal: self.seen(removal, blocks) for removal, blocks in ran.items()}, accepted)

    def _failed(self, block: int, removal: Removal) -> bool:
        return any(own.not_finite for own in self.known[block, removal].values())

    def seen(self, removal: Removal, blocks: int) -> dict[str, Outcomes]:
        """Return a removal's outcomes on the first ``blocks`` blocks."""
        found = {}
        for name in self.questions.tasks:
            pieces = [self.known[b, removal][name] for b in range(blocks) if name in self.blocks[b].tasks]
            if pieces:
                found[name] = joined(pieces)
        return found

    def _harms(self, removals: Sequence[Removal], blocks: int, harm: Harm, tasks: Sequence[str]) -> list[np.ndarray]:
        """Return (removals, items) of each task, none where its first item is yet to come."""
        found = [harm(self.seen(removal, blocks)) for removal in removals]
        nothing = np.empty(0)
        return [np.stack([own.get(name, nothing) for own in found]) for name in tasks]

    def _joined(self, removal: Removal) -> dict[str, Outcomes]:
        return self.seen(removal, len(self.blocks))

    def _key(self) -> str:
        """Return the key of what is measured: batches have a say in the last digit of a figure."""
        engine = self.engine
        return journal_key(
            engine.subject, self.questions, format=JOURNAL_FORMAT, tokens=engine.tokens, memory=engine.memory,
            rows=engine.rows, block=BLOCK_ITEMS,
        )  # fmt: skip
