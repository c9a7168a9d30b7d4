"""The contract of a metric, and what it may look at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Literal, Protocol

from layerprune.documents import MEAN, Candidate, Objective
from layerprune.engine import Examiner
from layerprune.errors import UsageError
from layerprune.progress import SILENT, Progress
from layerprune.removal import Removal
from layerprune.subject import Subject
from layerprune.tasks import Questions

Scope = Literal["single layers", "contiguous blocks", "any set"]
Needs = Literal["items", "text", "nothing"]


@dataclass
class Data:
    """What a metric may look at beside the model."""

    questions: Questions | None = None
    examiner: Examiner | None = None  # answers the questions under any removal and remembers; for ``needs = "items"``
    objective: Objective = MEAN  # over the tasks, for ``needs = "items"``
    keep: int | None = None  # only this many of the candidates asked about matter; None: all of them
    seed: int = 0
    progress: Progress = SILENT
    rows: int | None = None  # a fixed number of rows in a batch; None: the engine's own number of tokens
    memory: int | None = None  # bytes that evaluating may hold beside the weights; None: the engine's own

    @cached_property
    def texts(self) -> list[tuple[int, ...]]:
        """Token sequences for ``needs = "text"``: each item's prompt with its first listed answer.

        The same items that ablation answers, so that metrics differ in what they measure and not in what they read.
        Raises ``UsageError`` where there is nothing to read.
        """
        if self.questions is None:
            raise UsageError("this metric reads text: give it items with --tasks")
        items = [item for task in self.questions.tasks.values() for item in task.items]
        texts = [item.queries[0].parts[0].tokens for item in items if item.queries[0].parts]
        if not texts:
            names = ", ".join(self.questions.tasks)
            raise UsageError(f"prompts with their answers are to be read and {names} only generates; add a task")
        return texts


class Metric(Protocol):
    """Scores removals; higher means more harm. A metric is a frozen dataclass whose fields are its options.

    The class attributes are shown by ``layerprune metrics`` and written into scores.json.
    """

    unit: ClassVar[str]  # of the score: "relevance", "1-cos"
    scope: ClassVar[Scope]  # which removals it can score; a search that asks for more is refused
    needs: ClassVar[Needs]
    cost: ClassVar[str]  # in words, in forward passes over the data
    source: ClassVar[str]  # paper, or where it comes from
    search: ClassVar[str]  # the search it is used with unless told otherwise

    def score(self, subject: Subject, removals: Sequence[Removal], data: Data) -> list[Candidate]:
        """Return one candidate per removal, in the order given."""
        ...


def check_scope(name: str, scope: Scope, removals: Sequence[Removal]) -> None:
    """Raise ``UsageError`` when a removal lies beyond what the metric can score."""
    for removal in removals:
        units = removal.layers
        block = bool(units) and units[-1] - units[0] == len(units) - 1
        if (scope == "single layers" and len(units) != 1) or (scope == "contiguous blocks" and not block):
            raise UsageError(
                f"the metric {name!r} scores {scope} and was asked about {removal}; use --search one-shot, or a metric "
                "that scores any set, such as ablation"
            )
