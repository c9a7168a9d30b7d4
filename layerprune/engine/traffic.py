"""Which states a walk carries through which layer: what the walk does, and what memory is counted by."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

Key = frozenset[int]  # sublayers that are removed below a layer
Way = Literal["through", "past", "attention", "mlp"]  # the last two: through the layer without that half


def wanted_after(index: int, drops: Sequence[Key]) -> frozenset[Key]:
    """Return what the removals (sublayers each) have lost after layer ``index``: one state is needed for each."""
    return frozenset(frozenset(part for part in drop if part < 2 * index + 2) for drop in drops)


def ways(key: Key, index: int, wanted: frozenset[Key]) -> Iterator[tuple[Way, Key]]:
    """Yield what becomes of one state at a layer: how it is carried, and what it has lost afterwards."""
    attention, mlp = frozenset({2 * index}), frozenset({2 * index + 1})
    if key in wanted:
        yield "through", key
    if key | attention | mlp in wanted:
        yield "past", key | attention | mlp
    if key | attention in wanted:
        yield "attention", key | attention
    if key | mlp in wanted:
        yield "mlp", key | mlp


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
                halved = way in ("attention", "mlp")  # zeros beside what the half has answered
                most = max(most, len({0, current, *held.values(), *fresh.values()}) + halved)
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
