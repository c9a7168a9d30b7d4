"""What the removed layers may look like together: anything, no two adjacent, or one contiguous run."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

from layerprune.removal import Removal

Move = tuple[int, ...]  # what is removed in one stroke: one layer, or all layers that must go together


class Shape(Protocol):
    """A rule about the removal as a whole."""

    words: str  # completes "at most 7 may go ..."

    def refusal(self, removal: Removal) -> str:
        """Return why ``removal`` breaks the rule, or an empty string."""
        ...

    def reaches(self, removed: Removal, moves: Sequence[Move], missing: int) -> bool:
        """Return whether ``missing`` more layers could follow ``removed``; ``moves`` may overlap it."""
        ...

    def most(self, moves: Sequence[Move]) -> int:
        """Return how many layers could go at most, starting from the intact model."""
        ...


@dataclass(frozen=True)
class Anything:
    """No rule."""

    words = ""

    def refusal(self, removal: Removal) -> str:
        return ""

    def reaches(self, removed: Removal, moves: Sequence[Move], missing: int) -> bool:
        return True

    def most(self, moves: Sequence[Move]) -> int:
        return sum(map(len, moves))


@dataclass(frozen=True)
class NoAdjacent:
    """No two adjacent layers: something of the model is left between any two that go."""

    words = "with no two adjacent"

    def refusal(self, removal: Removal) -> str:
        for layer, following in pairwise(removal):
            if following - layer == 1:
                return f"{layer} and {following} are adjacent, and no two adjacent ones may go"
        return ""

    def reaches(self, removed: Removal, moves: Sequence[Move], missing: int) -> bool:
        return self._room(removed.layers, moves) >= missing

    def most(self, moves: Sequence[Move]) -> int:
        return self._room((), moves)

    def _room(self, gone: Collection[int], moves: Sequence[Move]) -> int:
        """Return how many layers fit beside what is gone: taking the leftmost that fits, again and again, is the most.

        Layers that go together are counted one by one, which can promise too much for them; the search then says so.
        """
        apart = [move for move in moves if all(b - a > 1 for a, b in pairwise(move))]
        count, free_from = 0, 0
        for layer in sorted(layer for move in apart for layer in move):
            if layer >= free_from and not {layer - 1, layer, layer + 1} & set(gone):
                count, free_from = count + 1, layer + 2
        return count


@dataclass(frozen=True)
class Contiguous:
    """One run of neighbours, nothing left in between."""

    words = "in one contiguous run"

    def refusal(self, removal: Removal) -> str:
        layers = removal.layers
        return f"{removal} is not one contiguous run" if layers and layers[-1] - layers[0] >= len(layers) else ""

    def reaches(self, removed: Removal, moves: Sequence[Move], missing: int) -> bool:
        return missing in _extensions(_spans(moves), removed.layers[0], removed.layers[-1] + 1)

    def most(self, moves: Sequence[Move]) -> int:
        spans = _spans(moves)
        runs = (stop - start + max(_extensions(spans, start, stop)) for start, stop in spans)
        return max(runs, default=0)


Span = tuple[int, int]  # first layer of a run, and the one behind its last


def _spans(moves: Sequence[Move]) -> list[Span]:
    """Return the runs that moves take, without moves that leave something in between."""
    return [(move[0], move[-1] + 1) for move in moves if move[-1] - move[0] == len(move) - 1]


def _extensions(spans: Sequence[Span], start: int, stop: int) -> set[int]:
    """Return every number of layers by which the run from ``start`` to ``stop`` can be extended at its ends."""
    up = _chain(dict(spans), stop)
    down = _chain({last: first for first, last in spans}, start)
    return {top - stop + start - bottom for top in up for bottom in down}


def _chain(following: Mapping[int, int], place: int) -> list[int]:
    """Return the places reached by following runs from ``place``, itself first."""
    places = [place]
    while places[-1] in following:
        places.append(following[places[-1]])
    return places
