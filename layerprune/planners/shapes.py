"""What the removed units may look like together: anything, no two adjacent, or one contiguous run.

Units are compared as the sublayers they take from A0 M0 A1 M1 ...: two units are adjacent when nothing of the model is
left between them. Layers 3 and 4 are; layer 3 and the half-layer run 4.5 are not, the attention of layer 4 stays.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

from layerprune.removal import Removal, Unit, first_sublayer

Move = tuple[Unit, ...]  # what is removed in one stroke: one unit, or all layers that must go together
SUBLAYERS = 2  # of a unit


class Shape(Protocol):
    """A rule about the removal as a whole."""

    words: str  # completes "at most 7 may go ..."

    def refusal(self, removal: Removal) -> str:
        """Return why ``removal`` breaks the rule, or an empty string."""
        ...

    def reaches(self, removed: Removal, moves: Sequence[Move], missing: int) -> bool:
        """Return whether ``missing`` more units could follow ``removed``; ``moves`` may overlap it."""
        ...

    def most(self, moves: Sequence[Move]) -> int:
        """Return how many units could go at most, starting from the intact model."""
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
    """No two adjacent units: something of the model is left between any two that go."""

    words = "with no two adjacent"

    def refusal(self, removal: Removal) -> str:
        for unit, following in pairwise(removal):
            if first_sublayer(following) - first_sublayer(unit) == SUBLAYERS:
                return f"{unit} and {following} are adjacent, and no two adjacent ones may go"
        return ""

    def reaches(self, removed: Removal, moves: Sequence[Move], missing: int) -> bool:
        return self._room(removed.sublayers, moves) >= missing

    def most(self, moves: Sequence[Move]) -> int:
        return self._room(frozenset(), moves)

    def _room(self, gone: frozenset[int], moves: Sequence[Move]) -> int:
        """Return how many units fit beside what is gone: taking the leftmost that fits, again and again, is the most.

        Layers that go together are counted one by one, which can promise too much for them; the search then says so.
        """
        starts = [[first_sublayer(unit) for unit in move] for move in moves]
        apart = [own for own in starts if all(b - a > SUBLAYERS for a, b in pairwise(own))]
        count, free_from = 0, 0
        for start in sorted(start for own in apart for start in own):
            around = range(start - 1, start + SUBLAYERS + 1)
            if start >= free_from and gone.isdisjoint(around):
                count, free_from = count + 1, start + SUBLAYERS + 1
        return count


@dataclass(frozen=True)
class Contiguous:
    """One run of neighbours, nothing left in between."""

    words = "in one contiguous run"

    def refusal(self, removal: Removal) -> str:
        sublayers = removal.sublayers
        if sublayers and max(sublayers) - min(sublayers) + 1 != len(sublayers):
            return f"{removal} is not one contiguous run"
        return ""

    def reaches(self, removed: Removal, moves: Sequence[Move], missing: int) -> bool:
        spans = _spans(moves)
        return missing in _extensions(spans, min(removed.sublayers), max(removed.sublayers) + 1)

    def most(self, moves: Sequence[Move]) -> int:
        spans = _spans(moves)
        runs = ((stop - start) // SUBLAYERS + max(_extensions(spans, start, stop)) for start, stop in spans)
        return max(runs, default=0)


Span = tuple[int, int]  # first sublayer of a run, and the one behind its last


def _spans(moves: Sequence[Move]) -> list[Span]:
    """Return the runs that moves take, without moves that leave something in between."""
    starts = [[first_sublayer(unit) for unit in move] for move in moves]
    return [(own[0], own[-1] + SUBLAYERS) for own in starts if own[-1] - own[0] == SUBLAYERS * (len(own) - 1)]


def _extensions(spans: Sequence[Span], start: int, stop: int) -> set[int]:
    """Return every number of units by which the run from ``start`` to ``stop`` can be extended at its ends."""
    up = _chain(dict(spans), stop)
    down = _chain({last: first for first, last in spans}, start)
    return {(abs(top - stop) + abs(start - bottom)) // SUBLAYERS for top in up for bottom in down}


def _chain(following: Mapping[int, int], place: int) -> list[int]:
    """Return the places reached by following runs from ``place``, itself first."""
    places = [place]
    while places[-1] in following:
        places.append(following[places[-1]])
    return places
