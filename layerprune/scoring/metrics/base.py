"""The contract of a metric, what it may look at, and reading its texts in padded batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
import torch

from layerprune.artifacts import MEAN, Candidate, Interval, Objective
from layerprune.data.items import EvalSet
from layerprune.errors import ModelError, UsageError
from layerprune.models.model import LoadedModel
from layerprune.removal import Removal
from layerprune.scoring.cached_evaluator import CachedEvaluator
from layerprune.scoring.walk import replaced_forwards, split_hidden
from layerprune.util import SILENT, Progress

# The contract of a metric, and what it may look at.


Scope = Literal["single layers", "contiguous blocks", "any set"]
Needs = Literal["items", "text", "nothing"]


@dataclass
class Data:
    """What a metric may look at beside the model."""

    eval_set: EvalSet | None = None
    evaluator: CachedEvaluator | None = (
        None  # answers the questions under any removal and remembers; for ``needs = "items"``
    )
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
        if self.eval_set is None:
            raise UsageError("this metric reads text: give it items with --tasks")
        items = [item for task in self.eval_set.tasks.values() for item in task.items]
        texts = [item.queries[0].parts[0].tokens for item in items if item.queries[0].parts]
        if not texts:
            names = ", ".join(self.eval_set.tasks)
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

    def score(self, loaded: LoadedModel, removals: Sequence[Removal], data: Data) -> list[Candidate]:
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


# Reading the texts of a metric: in padded batches, with what passes between the layers looked at on the way.


BATCH_TOKENS = 4096  # of a batch, padding counted

Tokens = Literal["all", "last"]
Span = tuple[int, int]  # first and last layer of a block, both in it
Measure = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # states before and after, (tokens, hidden) -> (tokens,)


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


def read(
    loaded: LoadedModel,
    data: Data,
    label: str,
    most: int | None = None,
    texts: Sequence[tuple[int, ...]] | None = None,
) -> Iterator[Batch]:
    """Yield ``texts``, or all of ``data``, in batches of up to ``most`` tokens (a longer text alone), on the device."""
    budget = BATCH_TOKENS if most is None else most
    texts = sorted(data.texts if texts is None else texts, key=len, reverse=True)
    starts = [0]
    for number, _ in enumerate(texts):
        if (number - starts[-1] + 1) * len(texts[starts[-1]]) > budget and number > starts[-1]:
            starts.append(number)
    with data.progress.task(label, sum(map(len, texts)), "tokens") as advance:
        for start, stop in pairwise([*starts, len(texts)]):
            batch = padded(texts[start:stop], loaded.device)
            yield batch
            advance(int(batch.lengths.sum()))


def spread(texts: Sequence[tuple[int, ...]], most: int) -> list[tuple[int, ...]]:
    """Return at most ``most`` of the texts, evenly spread."""
    chosen = np.unique(np.linspace(0, len(texts) - 1, min(most, len(texts))).round().astype(int))
    return [texts[index] for index in chosen]


def padded(texts: Sequence[Sequence[int]], device: torch.device | str = "cpu") -> Batch:
    """Put texts of token ids into one batch."""
    lengths = torch.tensor([len(text) for text in texts])
    ids = torch.zeros(len(texts), int(lengths.max()), dtype=torch.long)
    for number, text in enumerate(texts):
        ids[number, : len(text)] = torch.tensor(text)
    return Batch(ids.to(device), lengths.to(device))


def compared_states(
    loaded: LoadedModel, data: Data, spans: Sequence[Span], tokens: Tokens, measure: Measure, label: str
) -> list[float]:
    """Return for each block the mean over tokens of ``measure(what goes in, what comes out)``, in one pass.

    What comes out of the last layer is taken before the final norm. States are compared in float64.
    """
    sums = dict.fromkeys(spans, 0.0)
    count = 0
    for batch in read(loaded, data, label):
        wanted = batch.places(tokens)
        count += int(wanted.sum())
        for span, values in _measured(loaded, batch.ids, wanted, list(sums), measure).items():
            sums[span] += float(values.sum())
    return [finite(sums[span] / count, label, span) for span in spans]


def finite(value: float, label: str, of: object) -> float:
    """Keep nine digits; raises ``ModelError`` when a figure of the intact model is no finite number."""
    if not math.isfinite(value):
        raise ModelError(f"{label} of {of} is {value}: the model's states overflow; try --dtype float32")
    return float(f"{value:.9g}")


def candidate(removal: Removal, score: float, interval: Interval | None = None, *, failed: bool = False) -> Candidate:
    """Return a candidate whose score keeps nine digits; one that is no finite number, or ``failed``, is marked."""
    known = math.isfinite(score)
    return Candidate(
        removal=removal.layers,
        score=float(f"{score:.9g}") if known else 0.0,
        interval=interval if known else None,
        not_finite=failed or not known,
    )


@torch.no_grad()
def _measured(
    loaded: LoadedModel, ids: torch.Tensor, wanted: torch.Tensor, spans: Sequence[Span], measure: Measure
) -> dict[Span, torch.Tensor]:
    """Return the measurements of every block on one batch; a state is kept while a block that began there is open."""
    ends = {first: max(last for start, last in spans if start == first) for first, _ in spans}
    held: dict[int, torch.Tensor] = {}
    found: dict[Span, torch.Tensor] = {}

    def make(index: int, original: Any) -> Any:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if index in ends:
                hidden = split_hidden(args, kwargs)[0]
                held[index] = hidden[wanted.to(hidden.device)]  # (tokens, hidden), a copy: layers may write to it
            output = original(*args, **kwargs)
            for first in [start for start in held if (start, index) in spans]:
                hidden = output[0] if isinstance(output, tuple) else output
                after = hidden[wanted.to(hidden.device)].to(held[first].device)
                found[first, index] = measure(held[first].double(), after.double())
            for first in [start for start in held if ends[start] == index]:
                del held[first]
            return output

        return forward

    with replaced_forwards(loaded.layers, make):
        loaded.model(input_ids=ids, use_cache=False)
    return found
