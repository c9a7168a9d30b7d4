"""The contract of a metric, what it may look at, and reading its texts in padded batches."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import ClassVar, Literal

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from layerprune.artifacts import MEAN, Candidate, Interval, Objective
from layerprune.data.items import EvalSet
from layerprune.errors import ModelError, UsageError
from layerprune.models.model import LoadedModel
from layerprune.registry import Plugin
from layerprune.removal import Removal
from layerprune.scoring.cached_evaluator import CachedEvaluator
from layerprune.util import SILENT, Progress

# The contract of a metric, and what it may look at.


Scope = Literal["single layers", "contiguous blocks", "any set"]
INTACT = Removal(())


@dataclass
class Data:
    """What a metric may look at beside the model."""

    eval_set: EvalSet | None = None
    # answers the questions under any removal and remembers; for metrics that need items
    evaluator: CachedEvaluator | None = None
    objective: Objective = MEAN  # over the tasks, for metrics that need items
    keep: int | None = None  # only this many of the candidates asked about matter; None: all of them
    seed: int = 0
    progress: Progress = SILENT
    rows: int | None = None  # a fixed number of rows in a batch; None: the engine's own number of tokens
    memory: int | None = None  # bytes that evaluating may hold beside the weights; None: the engine's own

    @cached_property
    def texts(self) -> list[tuple[int, ...]]:
        """Token sequences for metrics that need text: each item's prompt with its first listed answer.

        The same items that ablation answers, so that metrics differ in what they measure and not in what they read.
        Raises ``UsageError`` where there is nothing to read.
        """
        if self.eval_set is None:
            raise UsageError("this metric reads text: give it items with --tasks")
        items = [item for task in self.eval_set.tasks.values() for item in task.items]
        texts = [item.queries[0].parts[0].tokens for item in items if item.queries[0].parts]
        if not texts:
            names = ", ".join(self.eval_set.tasks)
            raise UsageError(f"prompts with their answers are to be read and {names} only generates; add a task")
        return texts


class Metric(Plugin):
    """Scores removals; higher means more harm. A metric is a frozen dataclass whose fields are its options."""

    needs: ClassVar[tuple[str, ...]] = ("text",)
    unit: ClassVar[str]  # of the score: "relevance", "1-cos"
    scope: ClassVar[Scope] = "any set"  # which removals it can score; a search that asks for more is refused
    search: ClassVar[str] = "one-shot"  # the search it is used with unless told otherwise

    @abstractmethod
    def score(self, loaded: LoadedModel, removals: Sequence[Removal], data: Data) -> list[Candidate]:
        """Return one candidate per removal, in the order given."""


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


def candidates(removals: Sequence[Removal], scores: Iterable[float], label: str) -> list[Candidate]:
    """Return a candidate for each removal from figures of the intact model, ``finite`` ones; ``label`` names them."""
    pairs = zip(removals, scores, strict=True)
    return [Candidate(removal=removal.layers, score=finite(score, label, removal)) for removal, score in pairs]


def candidate(removal: Removal, score: float, interval: Interval | None = None, *, failed: bool = False) -> Candidate:
    """Return a candidate whose score keeps nine digits; one that is no finite number, or ``failed``, is marked."""
    known = math.isfinite(score)
    return Candidate(
        removal=removal.layers,
        score=float(f"{score:.9g}") if known else 0.0,
        interval=interval if known else None,
        not_finite=failed or not known,
    )


def finite(value: float, label: str, of: object) -> float:
    """Keep nine digits; raises ``ModelError`` when a figure of the intact model is no finite number."""
    if not math.isfinite(value):
        raise ModelError(f"{label} of {of} is {value}: the model's states overflow; try --dtype float32")
    return float(f"{value:.9g}")


# Reading the texts of a metric in padded batches.

BATCH_TOKENS = 4096  # of a batch, padding counted

Tokens = Literal["all", "last"]
TOKENS_HELP = "average over all tokens of each text, or take its last token only"


@dataclass(frozen=True)
class Batch:
    """Texts of like length, padded to the right, where causal attention never looks: no mask is needed."""

    ids: torch.Tensor  # (rows, tokens)
    lengths: torch.Tensor  # (rows,)

    def places(self, tokens: Tokens) -> torch.Tensor:
        """Return which tokens count, (rows, tokens) bool: those of the texts, or the last one of each."""
        numbers = torch.arange(self.ids.shape[1], device=self.ids.device)[None]
        ends = self.lengths[:, None]
        return numbers < ends if tokens == "all" else numbers == ends - 1


def read(loaded: LoadedModel, data: Data, label: str, most: int | None = None) -> Iterator[Batch]:
    """Yield the texts of ``data`` in batches of up to ``most`` tokens (a longer text alone), on the device."""
    budget = BATCH_TOKENS if most is None else most
    texts = [torch.tensor(text) for text in sorted(data.texts, key=len, reverse=True)]
    starts = [0]
    for number, _ in enumerate(texts):
        if (number - starts[-1] + 1) * len(texts[starts[-1]]) > budget and number > starts[-1]:
            starts.append(number)
    with data.progress.task(label, sum(map(len, texts)), "tokens") as advance:
        for start, stop in pairwise([*starts, len(texts)]):
            ids = pad_sequence(texts[start:stop], batch_first=True)
            lengths = torch.tensor([len(text) for text in texts[start:stop]])
            yield Batch(ids.to(loaded.device), lengths.to(loaded.device))
            advance(int(lengths.sum()))


def spread(texts: Sequence[tuple[int, ...]], most: int) -> list[tuple[int, ...]]:
    """Return at most ``most`` of the texts, evenly spread."""
    chosen = np.unique(np.linspace(0, len(texts) - 1, min(most, len(texts))).round().astype(int))
    return [texts[index] for index in chosen]
