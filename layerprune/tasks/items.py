"""Benchmark items as data: what to ask a model, and how its answers are judged."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from layerprune.documents import PLAIN, Prompting, TaskData


@dataclass(frozen=True)
class Request:
    """One log-likelihood to measure: the model reads ``tokens[:-1]`` and the last ``scored`` tokens are graded."""

    tokens: tuple[int, ...]
    scored: int


@dataclass(frozen=True)
class Generation:
    """One text to generate: an lm-eval generate_until instance."""

    instance: Any


@dataclass(frozen=True)
class Query:
    """One lm-eval instance. The log-likelihoods of a rolling query's parts (its windows) add up."""

    parts: tuple[Request, ...] = ()
    rolling: bool = False
    generation: Generation | None = None
    counted: bool = False  # wanted is how many tokens are greedy, not whether all are

    def asked(self) -> list[Any]:
        """Return what the model is given, as JSON."""
        given = [str(part) for part in self.generation.instance.args] if self.generation is not None else []
        return [self.rolling, [[part.scored, *part.tokens] for part in self.parts], given]


# What lm-eval expects back for one query: (sum of log-probabilities in nats, all tokens greedy), or generated text; of
# a counted query (sum, how many tokens are greedy).
Answer = tuple[float, bool | int] | float | str


@dataclass(frozen=True)
class Verdict:
    """What one item's answers were worth."""

    correct: bool
    gold_probability: float | None
    margin: float | None = None  # of the gold answer's log-likelihood over the best wrong one's
    finite: bool = True  # whether all its log-likelihoods were finite numbers
    answer: float | None = None  # log-likelihood of the intact model's own answer, nats per token
    agreed: float | None = None  # share of its tokens that are the most likely ones


@dataclass(frozen=True)
class Item:
    """One question of one task."""

    fingerprint: str
    chance: float
    queries: tuple[Query, ...]
    key: Any = field(compare=False, default=None)  # the judge's own handle for the item
    answerable: bool = True  # whether its label is among its choices; else it is wrong, whatever the model says
    content: str = ""  # stands for the whole document: what judging may read and no question shows


class Judge(Protocol):
    """Turns a task's answers into verdicts; lm-eval's own processing behind it."""

    def __call__(self, item: Item, answers: Sequence[Answer]) -> Verdict: ...


@dataclass(frozen=True)
class TaskQuestions:
    """The items of one task that a step may use."""

    name: str
    split: str  # "train", or "half of test": what a reader needs to know about where the items come from
    metric: str
    num_fewshot: int
    items: tuple[Item, ...]
    judge: Judge
    excluded: int = 0  # items left out because an earlier step has seen them
    prompting: Prompting = PLAIN
    definition: str = ""  # stands for the task's own config and code: metrics, filters, what ends a generation

    def data(self) -> TaskData:
        """Describe these items for a document."""
        return TaskData(
            task=self.name,
            split=self.split,
            items=len(self.items),
            fingerprints=tuple(item.fingerprint for item in self.items),
            num_fewshot=self.num_fewshot,
            metric=self.metric,
            chance=round(sum(item.chance for item in self.items) / len(self.items), 6),
            prompting=self.prompting,
        )

    def asked(self) -> Iterator[Any]:
        """Yield what is asked and how the task judges it, as JSON: the very tokens, and not the items alone.

        An item's fingerprint says which question it is; a description or examples before it are in its tokens only.
        """
        yield [self.name, self.metric, self.num_fewshot, self.definition]
        for item in self.items:
            yield [item.fingerprint, item.content, [query.asked() for query in item.queries]]


@dataclass(frozen=True)
class Questions:
    """All tasks' items, by task name."""

    tasks: dict[str, TaskQuestions]

    def __len__(self) -> int:
        return sum(len(task.items) for task in self.tasks.values())

    def data(self) -> tuple[TaskData, ...]:
        return tuple(task.data() for task in self.tasks.values())

    def remarks(self) -> list[str]:
        """Return what a user has to know of these items, a line each."""
        without = {
            name: [item.answerable for item in task.items].count(False) for name, task in self.tasks.items()
        }
        return [
            f"task {name!r}: the label of {count} of {len(self.tasks[name].items)} items is none of their choices; "
            "they are counted wrong, as lm-eval does"
            for name, count in without.items()
            if count
        ]

    def mark(self) -> str:
        """Return a hash of everything that is asked and of how it is judged."""
        digest = hashlib.sha256()
        for task in self.tasks.values():
            for part in task.asked():
                digest.update(json.dumps(part, separators=(",", ":")).encode() + b"\n")
        return digest.hexdigest()

    def followed_by(self, other: Questions) -> Questions:
        """Return these items with the other's after them, task by task."""
        return Questions(
            {name: replace(task, items=(*task.items, *other.tasks[name].items)) for name, task in self.tasks.items()}
        )

    def held_back(self, share: float, purpose: str = "held back") -> tuple[Questions, Questions]:
        """Split every task by item fingerprint into (the rest, about ``share`` of the items)."""
        parts: tuple[dict[str, TaskQuestions], ...] = ({}, {})
        for name, task in self.tasks.items():
            ordered = sorted(task.items, key=lambda item: hash_share(item.fingerprint, purpose))
            chosen = {item.fingerprint for item in ordered[: round(share * len(ordered))]}
            for part, wanted in zip(parts, (False, True), strict=True):
                part[name] = replace(task, items=tuple(i for i in task.items if (i.fingerprint in chosen) is wanted))
        return Questions(parts[0]), Questions(parts[1])


def fingerprint(content: Any) -> str:
    """Return 16 hex digits that stand for an item's rendered text, wherever its task got it from."""
    text = json.dumps(content, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def hash_share(mark: str, purpose: str) -> float:
    """Return a number in [0, 1) that depends only on the item and the purpose it is hashed for."""
    return int(hashlib.sha256(f"{purpose}:{mark}".encode()).hexdigest()[:13], 16) / 16**13
