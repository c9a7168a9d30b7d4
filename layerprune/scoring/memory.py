"""What an evaluation path holds beside the weights, and the batches that fit into ``--memory``."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import groupby
from typing import Any

import numpy as np
import torch
from scipy.optimize import nnls
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from layerprune.errors import UsageError
from layerprune.formatting import in_words, rounded_up
from layerprune.models.model import LoadedModel
from layerprune.models.placement import process_memory
from layerprune.removal import Removal
from layerprune.scoring.paths import EvaluationPath, by_length
from layerprune.scoring.prefix_tree import ROW_TOKENS, AnswerSpan, Row
from layerprune.scoring.walk import Stage, Traffic, tensors_in, traffic

# What an evaluation path holds beside the weights, as a function of a batch's shape and of the removals.
#
# No formula knows what is alive inside the layers of 180 model types. So it is measured, once for each path: a few tiny
# batches run while the bytes of all live tensors are noted after every operation. At each moment they are a sum of
# products of the batch's sizes, so a few shapes tell all others. More removals add states to that, and a beginning's
# keys and values; how many follows from the walk's own ``traffic``.


# Sizes of the batches that are tried: rows, width, tokens before, graded places of each row, places in a piece (all
# pieces of a batch are of one size, or moments of the last would be compared with those of others).
TRIALS = (
    (1, 5, 3, 1, 99), (2, 5, 4, 2, 99), (3, 4, 7, 1, 99), (1, 9, 10, 4, 99), (2, 8, 6, 3, 3), (4, 6, 5, 2, 99),
    (1, 12, 8, 6, 2), (3, 7, 3, 5, 99), (2, 11, 12, 1, 99), (1, 16, 9, 2, 1), (5, 3, 11, 2, 99), (2, 6, 14, 4, 4),
)  # fmt: skip
ALONE = 9  # of these are enough where nothing stands before the rows
# Recurrent layers pad a row to whole chunks of so many tokens (Mamba-2, gated delta rule). So rows of one token more
# are tried, too, where rows may be as wide.
CHUNKS = (64, 128, 256)
WIDER = ((1, 65), (3, 65), (2, 129), (1, 257))  # rows, width
TOKEN = 3  # every token of a trial: experts then meet their worst case, all tokens in the same few of them
# Of each answer token that is read where another one is: its number and place, and what is made of them on the way.
ANSWER_BYTES = {"grade": 25, "sum": 17}
GRADE: Stage = ("grade", 0)
# Of each answer token under each removal: what is found (float32 and bool); when it is added up also the same of all
# removals together, and in float64.
FOUND_BYTES = {"grade": 5, "sum": 17}


@dataclass(frozen=True)
class Event:
    """One operation of a run."""

    stage: Stage
    operation: str
    alive: int  # bytes when it is done


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors that are made in the context and still alive.

    A tensor's memory counts once, however many views there are. What a kernel holds inside itself is not seen.
    """

    def __init__(self, stage: Callable[[], Stage]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.stage = stage
        self.live = 0
        self.events: list[Event] = []
        self._known: dict[int, tuple[Any, int]] = {}  # a weak reference to each storage, and its bytes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        stage = self.stage()
        found = func(*args, **(kwargs or {}))
        given = {id(storage) for storage in _storages((*args, *(kwargs or {}).values()))}
        for storage in _storages(found):
            if id(storage) not in given and id(storage) not in self._known:
                self._count(storage)
        self.events.append(Event(stage, str(func), self.live))
        return found

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and to see to that takes longer than the counting

    def _count(self, storage: torch.UntypedStorage) -> None:
        number = id(storage)
        self.live += storage.nbytes()
        self._known[number] = weakref.ref(storage, lambda _: self._forget(number)), storage.nbytes()

    def _forget(self, number: int) -> None:
        self.live -= self._known.pop(number)[1]


def _storages(value: Any) -> list[torch.UntypedStorage]:
    """Return the memory of all tensors in (nested) lists and tuples; a sparse or packed one has none of its own."""
    return [tensor.untyped_storage() for tensor in tensors_in(value) if tensor.layout == torch.strided]


@dataclass(frozen=True)
class BatchShape:
    """What of a batch its memory depends on."""

    rows: int
    width: int  # tokens of the longest row
    before: int  # tokens of the beginning
    places: int  # whose next token is graded
    answers: int = 0  # answer tokens that are graded there
    branches: bool = True  # a row that is a tree is among them

    @classmethod
    def of(cls, rows: Sequence[Row]) -> BatchShape:
        width = max(row.length for row in rows)
        places, answers = sum(row.places for row in rows), sum(row.answers for row in rows)
        return cls(len(rows), width, len(rows[0].beginning), places, answers, any(row.branches for row in rows))

    def sizes(self, piece: int) -> np.ndarray:
        """Return the products that tensors' sizes are sums of; ``piece``: places whose logits are computed at once."""
        r, w, b, p = self.rows, self.width, self.before, self.places
        plain = [1, r, w, r * w, w * (b + w), r * w * (b + w), r * b, b, b * b, p, min(p, piece)]
        return np.array([*plain, *(r * math.ceil(w / chunk) * chunk for chunk in CHUNKS)], dtype=float)


PIECE, PLAIN = 10, 11  # where the piece stands among them; how many know of no chunks


@dataclass(frozen=True)
class MemoryEstimate:
    """Gives the most bytes that a path holds at once, beside the weights and what is kept of earlier batches."""

    stages: list[Stage]  # of each moment
    moments: np.ndarray  # (moments, sizes) bytes alive in the trials
    trial: Traffic  # the states that were alive in them
    like: list[int]  # for each layer the one that ran in its place
    state: np.ndarray  # (depth + 1, sizes) bytes of a state in front of each layer, and behind the last
    cache: np.ndarray  # (depth,) bytes of one token of a beginning in each layer
    peak: int  # bytes that the trials themselves took

    @classmethod
    def of(cls, path: EvaluationPath, longest: int, *, beginning: bool = False, masked: bool = False) -> MemoryEstimate:
        """Run tiny batches, ``beginning``: such as follow on one, ``masked``: of trees, and see what is alive when.

        ``longest``: tokens of the longest row there will be without a mask. Of layers that are alike one runs; all do
        where what one holds depends on those before.
        """
        depth = len(path.loaded.layers)
        like = kinds(path.loaded) if path.together and not path.walk.shares else list(range(depth))
        removals = [Removal.from_layers(set(range(depth)) - set(like))]
        trials = TRIALS if beginning else [(r, w, 0, p, piece) for r, w, _, p, piece in TRIALS[:ALONE]]
        if not path.together:
            removals *= 2  # the last logits under one removal are there while the next one runs
        if not beginning and not masked:
            trials = [*trials, *((rows, width, 0, 2, 99) for rows, width in WIDER if width <= longest)]
        runs, sizes, states, cache = [], [], [], np.zeros(depth)
        usual, computed = path.piece, path.walk.work.computed
        for rows, width, before, places, path.piece in trials:
            made = _rows(rows, width, before, places, branches=masked)
            with LiveBytes(lambda: path.walk.stage) as counter:
                path.run(made, removals)
            runs.append(counter.events)
            sizes.append(BatchShape.of(made).sizes(path.piece))
            states.append([path.walk.handed_on.get(layer, 0) for layer in range(depth)])
            if path.read is not None:
                cache = np.array(path.read[2].sizes(depth)) / before
            path.read = None
        path.piece, path.walk.work.computed = usual, computed
        peak = max(event.alive for run in runs for event in run)
        trial, known = traffic(depth, (frozenset(removals[0]),)), np.stack(sizes)
        fitted = [_fit(known, seen) for seen in np.array(states, dtype=float).T]
        state = np.stack([fitted[like[max(layer - 1, 0)]] for layer in range(depth + 1)])
        return cls(*_moments(runs, known), trial, like, state, cache[like], peak)

    def of_batch(self, shape: BatchShape, states: Traffic, piece: int) -> int:
        """Return the bytes of one batch under some removals; ``piece``: places whose logits are computed at once."""
        more = self._more(shape, states)
        alive = self.moments @ shape.sizes(piece) + np.array([more[stage] for stage in self.stages])  # (moments,)
        return math.ceil(alive.max())

    @cached_property
    def logits(self) -> float:
        """The bytes of one place's logits and what is made of them; 0 where all places' are computed at once."""
        moments = zip(self.moments, self.stages, strict=True)
        return max((float(moment[PIECE]) for moment, stage in moments if stage == GRADE), default=0.0)

    def _more(self, shape: BatchShape, states: Traffic) -> dict[Stage, float]:
        """Return what is alive at each stage beyond what was in the trials."""
        depth = len(self.like)
        extra = np.subtract(states.alive, self.trial.alive)  # (depth + 1,) states at each layer
        for layer in set(self.like):  # it stands for the one with most of them
            alive = max(states.alive[other] for other, like in enumerate(self.like) if like == layer)
            extra[layer] = alive - self.trial.alive[layer]
        kept = np.cumsum(np.subtract(states.runs, self.trial.runs) * self.cache) * shape.before  # up to each layer
        batch, begun = self.state @ shape.sizes(1), self.state @ BatchShape(1, shape.before, 0, 1).sizes(1)
        more = {}
        for what, layer in set(self.stages):
            found = kept[min(max(layer, 0), depth - 1)] if what == "read" else kept[-1]
            if what in ("run", "read") and layer >= 0:
                found += extra[layer] * (batch if what == "run" else begun)[layer]
            if what in FOUND_BYTES:  # the other removals' last states are there, at graded places
                found += (states.removals - 1) * shape.places * float(self.state[-1] @ BatchShape(1, 1, 0, 0).sizes(1))
                found += (states.removals - 1) * shape.answers * FOUND_BYTES[what]
                # in the trials every place has one answer token
                found += ANSWER_BYTES[what] * max(shape.answers - shape.places, 0)
            more[what, layer] = float(found)
        return more


def _moments(runs: Sequence[Sequence[Event]], sizes: np.ndarray) -> tuple[list[Stage], np.ndarray]:
    """Return the stages and the bytes by size, (moments, sizes), of the moments that count."""
    grouped = [[(stage, list(own)) for stage, own in groupby(run, key=lambda event: event.stage)] for run in runs]
    stages: list[Stage] = []
    moments: list[np.ndarray] = []
    for parts in zip(*grouped, strict=True):  # every trial goes through the same stages
        stage, events = parts[0][0], [own for _, own in parts]
        peaks = [np.array([max(event.alive for event in own) for own in events])]  # of the pieces the largest counts
        own = _highest([_fit(sizes, alive) for alive in (peaks if stage == GRADE else _aligned(events))])
        stages += [stage] * len(own)
        moments += own
    return stages, np.stack(moments)


def _highest(moments: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Return the moments of a stage that no other one of it exceeds in every size."""
    kept: list[np.ndarray] = []
    for moment in moments:
        if not any((other >= moment).all() for other in kept):
            kept = [other for other in kept if not (moment >= other).all()] + [moment]
    return kept


def _rows(count: int, width: int, before: int, places: int, *, branches: bool) -> list[Row]:
    """Return rows of one branch each, or of two, the last ``places`` tokens of each graded."""
    tokens = np.full(width, TOKEN)
    nodes, positions = np.arange(width - places, width), np.arange(before, before + width)
    targets = [(AnswerSpan(number, nodes, tokens[:places]),) for number in range(count)]
    spans = ((0, width - 1, -1), (width - 1, width, 0)) if branches else ((0, width, -1),)
    return [Row(tokens, positions, spans, target, (TOKEN,) * before) for target in targets]


def _aligned(runs: Sequence[Sequence[Event]]) -> Iterator[np.ndarray]:
    """Yield the bytes alive at each moment that all runs of a stage have, (runs,).

    Where they differ, in loops over experts or pieces, moments cannot be told apart: their peak counts as one.
    """
    names = [[event.operation for event in run] for run in runs]
    shortest = min(map(len, names))
    head = next((i for i in range(shortest) if len({own[i] for own in names}) > 1), shortest)
    rest = shortest - head
    tail = next((i for i in range(rest) if len({own[-1 - i] for own in names}) > 1), rest)
    for place in range(head):
        yield np.array([run[place].alive for run in runs])
    between = [run[head : len(run) - tail] for run in runs]
    if any(between):
        yield np.array([max(event.alive for event in own or run) for own, run in zip(between, runs, strict=True)])
    for place in range(-tail, 0):
        yield np.array([run[place].alive for run in runs])


def _fit(sizes: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """Return how many bytes each of a batch's sizes takes; where they do not tell all, so that no trial had more."""
    scale = np.maximum(sizes.max(axis=0), 1)
    found = np.zeros(sizes.shape[1])
    found[:PLAIN] = np.linalg.lstsq((sizes / scale)[:, :PLAIN], seen, rcond=1e-12)[0] / scale[:PLAIN]
    if np.abs(sizes @ found - seen).max() < 0.5:
        return np.round(found, 6)
    known = sizes.shape[1] if len(set(sizes[:, PLAIN] / sizes[:, 1])) > 1 else PLAIN  # whether any row fills a chunk
    found[:] = 0
    found[:known] = nnls((sizes / scale)[:, :known], seen)[0] / scale[:known]
    return found * max(1.0, float((seen / np.maximum(sizes @ found, 1)).max()))


# Batches and portions of removals that stay within ``--memory``: what may be held beside the weights at any time.


# A batch of up to this many tokens need not leave room for the removals of all layers at once: those are then measured
# in portions, which costs less than batches of a few tokens do.
LEAST_TOKENS = 512
LOGITS_SHARE = 0.25  # of what a batch may hold; a piece of logits takes no more


class Allowance:
    """What one batch may hold on one path, and what fits into that."""

    def __init__(self, path: EvaluationPath, memory: int, kept_share: float, longest: int, *, own: bool = True) -> None:
        """``memory`` is in bytes; ``kept_share`` of it is for states of earlier batches.

        ``longest``: tokens of the longest request. ``own``: the weights of the path's model are not counted.
        """
        self.path, self.memory, self.kept_share, self.longest = path, memory, kept_share, longest
        self.weights = 0 if own else sum(p.numel() * p.element_size() for p in path.loaded.model.parameters())
        self.estimates: dict[tuple[bool, bool], MemoryEstimate] = {}
        self.each = self.states_of([Removal.of(layer) for layer in range(len(path.loaded.layers))])
        self.alone = self.states_of([Removal(())])
        self.usual_piece = path.piece
        path.piece = self._piece(self.room)

    @cached_property
    def room(self) -> int:
        """The bytes that a batch may hold."""
        return int((1 - self.kept_share) * self.memory) - self.weights

    def fits(self, batch: list[Row]) -> bool:
        """Whether a batch leaves room for one removal at a time and, if it is large, for those of all layers at once.

        It does not depend on the removals that are asked about: a batch, and with it the last digit of a result, is the
        same whatever else is measured beside it.
        """
        large = len(batch) * batch[0].length > LEAST_TOKENS
        return self.need(batch, self.each if large else self.alone) <= self.room

    def portions(self, section: Sequence[list[Row]], removals: Sequence[Removal]) -> list[list[int]]:
        """Split the removals, by number, so that each part fits together with any batch of the section."""
        numbers = sorted(range(len(removals)), key=lambda number: removals[number].layers)  # like stays with like
        parts: list[list[int]] = []
        while numbers:
            asked = [removals[number] for number in numbers]
            count = _most(len(asked), partial(self._fit_together, section, asked))  # one does: every row was checked
            parts.append(numbers[:count])
            numbers = numbers[count:]
        return parts

    def _fit_together(self, section: Sequence[list[Row]], removals: Sequence[Removal], count: int) -> bool:
        """Whether the first ``count`` of the removals fit together with any batch of the section."""
        states = self.states_of(removals[:count])
        return all(self.need(batch, states) <= self.room for batch in section)

    def longest_row(self, before: int) -> int:
        """Return how long a row may become by joining questions, behind a beginning of so many tokens."""

        def fits(length: int) -> bool:
            return self._bytes(BatchShape(1, length, before, length), self.alone, self.path.piece) <= self.room

        return _most(ROW_TOKENS, fits)

    def check(self, rows: Sequence[Row]) -> None:
        """Raise ``UsageError``, with the least memory that works, where one row under one removal takes too much."""
        trials = max(self._estimate(bool(row.beginning), row.branches).peak for row in rows)
        if max(trials, *(self.need([row], self.alone) for row in rows)) <= self.room:
            return
        room = trials
        while (needed := max(self.need([row], self.alone, self._piece(room)) for row in rows)) > room:
            room = needed  # with more of it a piece of logits may be larger
        least = math.ceil((room + self.weights) / (1 - self.kept_share))
        longest = max(row.length + len(row.beginning) for row in rows)
        raise UsageError(
            f"--memory {in_words(self.memory)} does not hold one item under one removal (path {self.path.name!r}, rows "
            f"of up to {longest} tokens); the least that does is {rounded_up(least)}"
        )

    def need(self, batch: Sequence[Row], states: Traffic, piece: int | None = None) -> int:
        """Return the most bytes that a batch holds at once."""
        piece = self.path.piece if piece is None else piece
        if self.path.together:
            return self._bytes(BatchShape.of(batch), states, piece)
        return max(self._bytes(BatchShape.of(rows), states, piece) for rows in by_length(batch))

    def _bytes(self, shape: BatchShape, states: Traffic, piece: int) -> int:
        return self._estimate(shape.before > 0, shape.branches).of_batch(shape, states, piece)

    def _estimate(self, beginning: bool, branches: bool) -> MemoryEstimate:
        """Return what batches hold: behind a beginning, with a mask of their own, or without."""
        kind = beginning, not beginning and self.path.masked(branches)
        if kind not in self.estimates:
            self.estimates[kind] = MemoryEstimate.of(self.path, self.longest, beginning=kind[0], masked=kind[1])
        return self.estimates[kind]

    def states_of(self, removals: Sequence[Removal]) -> Traffic:
        """Return the states of a walk for these removals."""
        return traffic(len(self.path.loaded.layers), tuple(frozenset(removal) for removal in removals))

    def _piece(self, room: int) -> int:
        """Return for how many places logits are computed at once."""
        logits = self._estimate(beginning=False, branches=True).logits
        most = int(LOGITS_SHARE * room / logits) if logits else self.usual_piece
        return max(1, min(self.usual_piece, most))


def _most(count: int, fits: Callable[[int], bool]) -> int:
    """Return the largest number up to ``count`` that fits, which is tried first; at least 1."""
    low, high = 1, count
    while low < high:
        middle = high if low == 1 and high == count else (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


# Which layers of a model are alike: what is found out of one holds for the others.


def kinds(loaded: LoadedModel) -> list[int]:
    """Return for each layer the last one of its kind: of the same modules, switches and layer type."""
    types = getattr(loaded.model.config.get_text_config(decoder=True), "layer_types", None) or []
    listed = types if len(types) == len(loaded.layers) else [None] * len(loaded.layers)
    built = [(kind, _build(layer)) for kind, layer in zip(listed, loaded.layers, strict=True)]
    last = {kind: number for number, kind in enumerate(built)}
    return [last[kind] for kind in built]


def _build(layer: nn.Module) -> tuple[object, ...]:
    """Return the modules of a layer by name, class and size, and their switches.

    Other numbers are left out: they may be the layer's own, such as its index.
    """

    def switches(part: nn.Module) -> list[tuple[str, bool | str]]:
        return sorted((key, value) for key, value in vars(part).items() if isinstance(value, bool | str))

    def sizes(part: nn.Module) -> list[tuple[int, ...]]:
        return [tuple(parameter.shape) for parameter in part.parameters(recurse=False)]

    parts = layer.named_modules()
    return tuple((name, type(part).__name__, *sizes(part), *switches(part)) for name, part in parts)


# The default of ``--memory`` and of a batch's tokens.
#
# How much may be held beside the weights, unless --memory says so. With less, removals are measured in portions and
# batches shrink; with more, more of the intact model's states stay for the rounds to come.
#
# It stands in the keys of journals. So it is made from what a machine has and not from what is free just now, and
# rounded down: a run that is taken up again on the same machine finds its entries.


# Of a device that is neither a CPU nor a CUDA card, whose memory nobody has looked at.
MEMORY = 4 * 1024**3
# Shares of what the weights leave. A CPU's memory is also that of other processes, the page cache holds the checkpoint,
# and what a kernel holds inside itself is not counted. A card is rarely shared; the rest is for its context, for
# workspaces and for what the allocator cannot use in one piece. Neither has been measured against others.
CPU_SHARE, CUDA_SHARE = 0.4, 0.8
CPU_MOST = 32 * 1024**3  # batches on a CPU have CPU_TOKENS however much there is: more only keeps more states
LEAST = 64 * 1024**2  # also the step below a GiB


def default_memory(loaded: LoadedModel) -> int:
    """Return the bytes that evaluating a model may hold beside its weights, unless the user says otherwise.

    A share of the memory of the device that the weights leave; of several cards, that of the fullest. Whole GiB, below
    one GiB whole steps of 64 MiB, at least one.
    """
    weights: dict[torch.device, int] = {}
    for parameter in loaded.model.parameters():
        weights[parameter.device] = weights.get(parameter.device, 0) + parameter.numel() * parameter.element_size()
    if loaded.stream is not None:
        weights[loaded.device] = weights.get(loaded.device, 0) + loaded.stream.room
    kind = loaded.device.type
    if kind == "cpu":
        here = sum(nbytes for device, nbytes in weights.items() if device.type == kind)
        room = min(CPU_SHARE * (process_memory() - here), CPU_MOST)
    elif kind == "cuda":
        cards = {loaded.device: 0} | {device: nbytes for device, nbytes in weights.items() if device.type == kind}
        room = CUDA_SHARE * min(torch.cuda.mem_get_info(card)[1] - nbytes for card, nbytes in cards.items())
    else:
        room = MEMORY
    step = 1024**3 if room >= 1024**3 else LEAST
    return max(LEAST, int(room) // step * step)


# Tokens in a batch. On two cores 512 to 4,096 take about the same time (measured, SmolLM2-135M, bfloat16): larger ones
# multiply faster and pad more. A card wants more in flight. Its figures have not been measured on one: 32,768 tokens of
# a model as wide as an 8B, as many more as a model is narrower, since launching a kernel takes the same time. What such
# a batch holds is bounded by the memory, as that of every batch.
CPU_TOKENS = 1024
CUDA_TOKENS, CUDA_MOST_TOKENS = 32768, 262144
CUDA_WIDTH = 4096  # hidden size of an 8B


def default_tokens(loaded: LoadedModel) -> int:
    """Return how many tokens a batch has where memory allows it; a card's from the model's hidden size."""
    if loaded.device.type != "cuda":
        return CPU_TOKENS
    width = getattr(loaded.model.config.get_text_config(decoder=True), "hidden_size", None) or CUDA_WIDTH
    return min(max(CUDA_TOKENS, CUDA_TOKENS * CUDA_WIDTH // int(width)), CUDA_MOST_TOKENS)
