"""Which states a walk carries through which layer: what the walk does, and what memory is counted by."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

Key = frozenset[int]  # layers that are removed below a layer
Way = Literal["through", "past"]


def wanted_after(index: int, drops: Sequence[Key]) -> frozenset[Key]:
    """Return what the removals have lost after layer ``index``: one state is needed for each."""
    return frozenset(frozenset(layer for layer in drop if layer <= index) for drop in drops)


def ways(key: Key, index: int, wanted: frozenset[Key]) -> Iterator[tuple[Way, Key]]:
    """Yield what becomes of one state at a layer: how it is carried, and what it has lost afterwards."""
    if key in wanted:
        yield "through", key
    if key | {index} in wanted:
        yield "past", key | {index}


@dataclass(frozen=True)
class Traffic:
    """The states of a walk for one set of removals."""

    alive: tuple[int, ...]  # (depth + 1,) most states alive while a layer runs, embeddings included; last: at the end
    runs: tuple[int, ...]  # (depth,) how many states are carried through a layer
    removals: int


@lru_cache(maxsize=256)
def traffic(depth: int, drops: tuple[Key, ...]) -> Traffic:
    """Follow the states of a walk."""
    held = {frozenset[int](): 0}  # which tensor each state is; 0 are the embeddings, which the model's forward keeps
    made, alive, runs = 0, [], []
    for index in range(depth):
        wanted, fresh, most, ran = wanted_after(index, drops), dict[Key, int](), 0, 0
        for key in list(held):
            current = held.pop(key)
            for way, new in ways(key, index, wanted):
                most = max(most, len({0, current, *held.values(), *fresh.values()}))
                if way == "past":
                    fresh[new] = current
                    continue
                ran += 1
                made += 1
                fresh[new] = made
        held = fresh
        alive.append(most)
        runs.append(ran)
    return Traffic((*alive, len({0, *held.values()})), tuple(runs), len(drops))
