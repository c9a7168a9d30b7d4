"""Requests that share their beginnings, laid out so that every shared token is computed once.

The answers to one question share its context; few-shot questions may share their examples. All inputs of a group form a
prefix tree. A tree is laid out as one row: its branches one after another, every token keeping the position it has in
its own request and attending only to its ancestors. Short trees share a row. A row with a single branch is an ordinary
causal row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from transformers.cache_utils import Cache

from layerprune.data.items import Request

# A row may grow to this many tokens by taking in further groups that share a prefix with it. Attention in a row costs
# tokens squared, the rest tokens: at 1,024 tokens its scores are a quarter of a layer's arithmetic where d = 576.
ROW_TOKENS = 1024
# Joining two groups must save at least this share of the tokens of the smaller one, or the row only grows.
MIN_SHARED = 0.25
# Rows shorter than this are filled up with other trees, which see nothing of each other: a batch of short rows of
# unequal length is padding to a third (arc_easy 0-shot, 50 items: 1.2 to 1.5 times the tokens). Attention in a row of
# 256 tokens is a twelfth of a layer's arithmetic where d = 576.
PACK_TOKENS = 256
# A beginning is kept apart and read once when so many groups begin with so many tokens: below that, rows that hold
# it anyway share it well enough.
BEGINNING_GROUPS = 3
BEGINNING_TOKENS = 64


Requests = Sequence[Request] | Mapping[int, Request]
Limit = Callable[[int], int]


def unlimited(before: int) -> int:
    """Return how long joining may make a row where memory sets no limit, whatever stands before it."""
    return ROW_TOKENS


@dataclass(frozen=True)
class AnswerSpan:
    """Where one request's answer is read in its row."""

    request: int  # index in the list of requests that was laid out
    nodes: np.ndarray  # (scored,) index in the row of the token each answer token is predicted from
    tokens: np.ndarray  # (scored,) the answer tokens


@dataclass(frozen=True)
class Row:
    """One prefix tree as a sequence."""

    tokens: np.ndarray  # (length,)
    positions: np.ndarray  # (length,) position of each token in its own request
    spans: tuple[tuple[int, int, int], ...]  # branches: (start, stop, index of the parent token or -1); one: a chain
    targets: tuple[AnswerSpan, ...]
    beginning: tuple[int, ...] = ()  # tokens before the row, seen by all of it and not part of it

    @property
    def length(self) -> int:
        return len(self.tokens)

    @property
    def branches(self) -> bool:
        """Whether it is a tree, and no ordinary causal row."""
        return len(self.spans) > 1

    @cached_property
    def places(self) -> int:
        """How many of its tokens predict answer tokens."""
        return len({int(node) for target in self.targets for node in target.nodes})

    @property
    def answers(self) -> int:
        """How many answer tokens are graded; several may be read at one place."""
        return sum(len(target.tokens) for target in self.targets)

    def visible(self) -> np.ndarray:
        """Return who attends to whom: (length, length) bool, row = query."""
        seen = np.zeros((self.length, self.length), dtype=bool)
        for start, stop, parent in self.spans:
            if parent >= 0:
                seen[start:stop] = seen[parent]
            size = stop - start
            seen[start:stop, start:stop] = np.tri(size, dtype=bool)
        return seen


def chains(requests: Sequence[Request]) -> list[Row]:
    """Lay out one row per distinct input: the layout every model understands."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for index, request in enumerate(requests):
        groups.setdefault(request.tokens[:-1], []).append(index)
    return [_row(requests, members) for members in groups.values()]


def trees(requests: Requests, groups: Iterable[Sequence[int]], most: int = ROW_TOKENS, before: int = 0) -> list[Row]:
    """Lay out one row per group of request indices, joining groups that share much and packing those that are short.

    Neither makes a row longer than ``most`` tokens, behind ``before`` others. Where there is no tree among them, and
    nothing before them, they stay apart: batches of ordinary rows need no mask, which saves more than their padding
    costs (measured, SmolLM2-135M, answers of one token: 0.83 to 0.97 of the time at 40 to 160 tokens, 1.0 at 300).
    """
    joined = _joined(requests, groups, most)
    rows = [_row(requests, members) for _, members in joined]
    if not before and not any(row.branches for row in rows):
        return rows
    return [_row(requests, members) for members in _packed(joined, most)]


def trees_after_beginnings(requests: Requests, groups: Iterable[Sequence[int]], most: Limit = unlimited) -> list[Row]:
    """Lay out trees, those of many groups with a long common beginning without it.

    ``most`` tells how long joining and packing may make a row behind so many tokens.
    """
    rows: list[Row] = []
    for shared, members in beginnings(requests, groups):
        beginning = requests[members[0][0]].tokens[:shared]
        rest = {i: Request(requests[i].tokens[shared:], requests[i].scored) for group in members for i in group}
        for row in trees(rest, members, most(shared), shared):
            rows.append(replace(row, positions=row.positions + shared, beginning=beginning))
    return rows


def beginnings(requests: Requests, groups: Iterable[Sequence[int]]) -> list[tuple[int, list[list[int]]]]:
    """Split groups by the beginning they share: (its tokens, the groups), 0 for those that share none worth keeping.

    A beginning ends at least one token before the first answer: that token's prediction is the group's own.
    """
    ordered = sorted((list(group) for group in groups), key=lambda group: requests[group[0]].tokens)
    clusters: list[tuple[int, list[list[int]]]] = []
    for group in ordered:
        own = _context(requests, group)
        if clusters:
            shared, members = clusters[-1]
            first = requests[members[0][0]].tokens
            joint = min(shared, own, shared_length(first, requests[group[0]].tokens))
            enough = joint >= BEGINNING_TOKENS and (len(members) == 1 or joint >= 0.8 * shared)
            if enough:
                clusters[-1] = joint, [*members, group]
                continue
        clusters.append((own, [group]))
    kept = [(shared, members) for shared, members in clusters if len(members) >= BEGINNING_GROUPS]
    others = [group for _, members in clusters if len(members) < BEGINNING_GROUPS for group in members]
    return [*kept, *([(0, others)] if others else [])]


def _context(requests: Requests, group: Sequence[int]) -> int:
    """Return how many tokens all requests of a group share before the token that predicts the first answer token."""
    first = requests[group[0]].tokens
    return min(
        min(shared_length(first, requests[i].tokens), len(requests[i].tokens) - requests[i].scored - 1) for i in group
    )


def _joined(requests: Requests, groups: Iterable[Sequence[int]], most: int) -> list[tuple[int, list[int]]]:
    """Join groups that share much of their beginning; returns (tokens of the tree, its request indices)."""
    ordered = sorted((list(group) for group in groups), key=lambda group: requests[group[0]].tokens)
    joint: list[tuple[int, list[int]]] = []
    for group in ordered:
        own = tree_size([requests[i].tokens[:-1] for i in group])
        if joint:
            size, members = joint[-1]
            together = tree_size([requests[i].tokens[:-1] for i in (*members, *group)])
            if together <= most and size + own - together >= MIN_SHARED * min(own, size):
                joint[-1] = together, [*members, *group]
                continue
        joint.append((own, group))
    return joint


def _packed(sized: Sequence[tuple[int, list[int]]], most: int) -> list[list[int]]:
    """Put short trees together into rows of up to ``PACK_TOKENS``: the longest first, each where it first fits."""
    room = min(PACK_TOKENS, most)
    rows: list[list[int]] = []
    free = np.zeros(len(sized), dtype=int)  # tokens left in each row; no row yet: none left
    for size, members in sorted(sized, key=lambda pair: -pair[0]):
        fitting = np.flatnonzero(free >= size)
        if len(fitting):
            place = int(fitting[0])
            rows[place].extend(members)
        else:
            place = len(rows)
            rows.append(list(members))
            free[place] = max(room, size)
        free[place] -= size
    return rows


def tree_size(sequences: Iterable[tuple[int, ...]]) -> int:
    """Return how many tokens the prefix tree of these sequences has."""
    size, last = 0, ()
    for sequence in sorted(sequences):
        size += len(sequence) - shared_length(sequence, last)
        last = sequence
    return size


def shared_length(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    """Return the length of the common beginning."""
    limit = min(len(a), len(b))
    if a[:limit] == b[:limit]:
        return limit
    low, high = 0, limit  # a[:low] equals b[:low]; a[:high] differs
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if a[low:middle] == b[low:middle] else (low, middle)
    return low


def _row(requests: Requests, members: Sequence[int]) -> Row:
    """Lay out the prefix tree of the members' inputs."""
    tree: dict[tuple[int, ...], None] = dict.fromkeys(sorted(requests[i].tokens[:-1] for i in members))
    tokens: list[int] = []
    positions: list[int] = []
    spans: list[tuple[int, int, int]] = []
    paths: dict[tuple[int, ...], list[int]] = {}
    path: list[int] = []  # row index of every token of the sequence laid out last
    last: tuple[int, ...] = ()
    for sequence in tree:
        shared = shared_length(sequence, last)
        start, parent = len(tokens), path[shared - 1] if shared else -1
        fresh = sequence[shared:]
        path = path[:shared] + list(range(start, start + len(fresh)))
        if fresh:
            tokens.extend(fresh)
            positions.extend(range(shared, len(sequence)))
            spans.append((start, start + len(fresh), parent))
        paths[sequence], last = path, sequence
    targets = []
    for index in members:
        request = requests[index]
        nodes = paths[request.tokens[:-1]][-request.scored :]
        targets.append(AnswerSpan(index, np.array(nodes), np.array(request.tokens[-request.scored :])))
    return Row(np.array(tokens), np.array(positions), tuple(spans), tuple(targets))


def batches(
    rows: Sequence[Row], budget: int, most: int | None = None, fits: Callable[[list[Row]], bool] = lambda batch: True
) -> Iterator[list[Row]]:
    """Yield rows in batches of like length: of ``most`` rows, or else of up to ``budget`` tokens, padding counted.

    A batch has one beginning; batches with the same one follow each other. A row that would keep its batch from fitting
    begins another.
    """
    batch: list[Row] = []
    for row in sorted(rows, key=lambda row: (row.beginning, -row.length)):
        full = len(batch) == most if most else bool(batch) and batch[0].length * (len(batch) + 1) > budget
        if batch and (full or row.beginning != batch[0].beginning or not fits([*batch, row])):
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


# The examples that stand before every question of a few-shot task: read once, and looked back at by all of them.
#
# What a layer computes of a shared beginning depends on the layers removed below it and on nothing that follows. So the
# keys and values of the beginning are kept for every layer and every set of removals that reaches it, and the questions
# then run without it, as if it had been read before.


Tensor = torch.Tensor


def _alone(part: Tensor) -> Tensor:
    """Return a tensor in memory of its own: a view of fused queries, keys and values would keep all of them."""
    return part if part.untyped_storage().nbytes() == part.nbytes else part.clone()


class SharedBeginning(Cache):  # type: ignore[misc]  # transformers carries no types
    """Keys and values of one beginning, by what is removed below a layer. First written by one row, then read by many.

    Layers see an ordinary transformers cache. ``key``, set by the walk before it runs a layer, says what is removed
    below it. Keys and values are (rows, heads, tokens, head size), one row while writing.
    """

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.key: frozenset[int] = frozenset()
        self.kept: dict[tuple[frozenset[int], int], tuple[Tensor, Tensor]] = {}
        self.tokens: tuple[int, ...] = ()  # none while it is being written

    @property
    def length(self) -> int:
        """How many tokens it has; 0 while it is being written."""
        return len(self.tokens)

    def sizes(self, depth: int) -> list[int]:
        """Return the bytes that are kept in each layer."""
        found = [0] * depth
        for (_, layer), pair in self.kept.items():
            found[layer] += sum(part.numel() * part.element_size() for part in pair)
        return found

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if not self.length:
            self.kept[self.key, layer_idx] = _alone(key_states), _alone(value_states)
            return key_states, value_states
        rows = key_states.shape[0]
        keys, values = (part.expand(rows, -1, -1, -1) for part in self.kept[self.key, layer_idx])
        return torch.cat([keys, key_states], dim=-2), torch.cat([values, value_states], dim=-2)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.length

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.length + query_length, 0
