"""Constraints on which layers can be removed, and on the shape that the removed layers have together."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Protocol

from layerprune.errors import RefusedError, UsageError
from layerprune.removal import Removal

# What the removed layers may look like together: anything, no two adjacent, or one contiguous run.


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


# What a search may not do, and what "drop 25%" and "protect 0-3,-1" mean for a stack of a given depth.


@dataclass(frozen=True)
class Constraints:
    """The stack's depth, what the user protects and wants it to look like, and what the architecture allows."""

    depth: int
    protect: frozenset[int] = frozenset()  # the user's: never removed
    must_keep: frozenset[int] = frozenset()  # the architecture's: never removed
    together: tuple[frozenset[int], ...] = ()  # layers that are removed together or not at all
    units: tuple[int, ...] | None = None  # what may be removed at all; None: every layer
    check: Callable[[Removal], None] | None = field(default=None, compare=False)  # Anatomy.check: raises RefusedError
    shape: Shape = field(default_factory=Anything)

    @cached_property
    def moves(self) -> tuple[Move, ...]:
        """Every stroke that is allowed on the intact model, ordered by first layer."""
        kept = self.protect | self.must_keep
        grouped = frozenset[int]().union(*self.together)
        units = range(self.depth) if self.units is None else self.units
        single = [(unit,) for unit in units if unit not in kept | grouped]
        groups = [tuple(sorted(group)) for group in self.together if not group & kept]
        return tuple(sorted([*single, *groups]))

    def counts(self) -> tuple[int, ...]:
        """Return every number of units that may go, ascending; what the architecture says of sets is not asked."""
        most = min(self.shape.most(self.moves), self.removable, self.depth - 1)
        return tuple(count for count in sorted(_sums(len(move) for move in self.moves)) if 0 < count <= most)

    @cached_property
    def removable(self) -> int:
        """How many layers could go at most."""
        return sum(map(len, self.moves))

    def open_moves(self, removed: Removal, drop: int) -> tuple[Move, ...]:
        """Return the moves that can follow ``removed`` and still end at exactly ``drop`` units.

        Raises ``RefusedError`` when there is none, with the architecture's reason where it gave one.
        """
        fitting = self._fitting(removed, drop)
        refusals = {move: self.refusal(removed.add(*move)) for move in fitting}
        allowed = tuple(move for move in fitting if not refusals[move])
        if not allowed:
            raise self._dead_end(removed, drop, refusals)
        return allowed

    def first_open(self, preference: Sequence[Move], removed: Removal, drop: int) -> Move:
        """Return the first of ``preference`` that may follow; asks the architecture about no more than needed."""
        fitting = set(self._fitting(removed, drop))
        refusals: dict[Move, str] = {}
        for move in preference:
            if move in fitting:
                refusals[move] = self.refusal(removed.add(*move))
                if not refusals[move]:
                    return move
        raise self._dead_end(removed, drop, refusals)

    def _fitting(self, removed: Removal, drop: int) -> list[Move]:
        """Return moves that overlap nothing removed, keep the shape, and leave a rest that can still be made up."""
        moves = [move for move in self.moves if not set(move) & set(removed)]
        missing, counts = drop - len(removed), Counter(len(move) for move in moves)
        rest = {size: _sums((counts - Counter([size])).elements()) for size in counts}
        adding_up = [move for move in moves if missing - len(move) in rest[len(move)]]
        return [move for move in adding_up if self._keeps_shape(removed.add(*move), moves, missing - len(move))]

    def _keeps_shape(self, removed: Removal, moves: Sequence[Move], missing: int) -> bool:
        """Return whether ``removed`` keeps the shape and ``missing`` more layers can go beside it and keep it, too."""
        return not self.shape.refusal(removed) and self.shape.reaches(removed, moves, missing)

    def _dead_end(self, removed: Removal, drop: int, refusals: Mapping[Move, str]) -> RefusedError:
        reason = next((text for text in refusals.values() if text), "")
        return RefusedError(
            f"cannot remove {drop} layers: after {len(removed)} ({removed}) none of the others may go"
            + (f"; {reason}" if reason else "")
        )

    def refusal(self, removal: Removal) -> str:
        """Return why the shape or the architecture refuses ``removal``, or an empty string."""
        if self.check is None or self.shape.refusal(removal):
            return self.shape.refusal(removal)
        try:
            self.check(removal)
        except RefusedError as error:
            return str(error)
        return ""

    def misfit(self, removal: Removal, drop: int) -> str:
        """Return why ``removal`` is not one of ``drop`` units that may go, or an empty string."""
        if len(removal) != drop:
            return f"{drop} layers were to go, and these are {len(removal)}"
        movable = {unit for move in self.moves if set(move) <= set(removal) for unit in move}
        if stray := sorted(set(removal) - movable):
            return f"layer {stray[0]} does not exist, is to stay, or goes with others only"
        return self.refusal(removal)

    def require(self, drop: int) -> None:
        """Raise ``UsageError`` when no removal of ``drop`` units exists, before anything slow starts."""
        if drop < 1 or drop >= self.depth:
            raise UsageError(f"cannot remove {drop} of {self.depth} layers; at least one goes and at least one stays")
        if drop > self.removable:
            raise UsageError(
                f"cannot remove {drop} layers: of {self.depth} layers {self.removable} may go{self._kept_in_words()}"
            )
        possible = _sums(len(move) for move in self.moves)
        if drop not in possible:
            counts = [count for count in possible if 0 < count < self.depth]
            near = sorted(counts, key=lambda count: (abs(count - drop), count))[:2]
            raise UsageError(
                f"cannot remove exactly {drop} layers: some go only together; "
                f"possible nearby: {' or '.join(map(str, sorted(near))) or 'none'}"
            )
        if not self._fitting(Removal(()), drop):
            raise UsageError(
                f"cannot remove {drop} of {self.depth} layers: at most {self.shape.most(self.moves)} may go "
                f"{self.shape.words}{self._kept_in_words()}"
            )

    def _kept_in_words(self) -> str:
        parts = []
        if self.protect:
            parts.append(f"protected: {', '.join(map(str, sorted(self.protect)))}")
        if self.must_keep:
            parts.append(f"kept by the architecture: {', '.join(map(str, sorted(self.must_keep)))}")
        return f" ({'; '.join(parts)})" if parts else ""


def check_drop(text: str, option: str = "--drop") -> None:
    """Raise ``UsageError`` for what would make no sense on any model; the rest is seen when its depth is known."""
    share = text.strip().removesuffix("%") if text.strip().endswith("%") else None
    try:
        possible = int(text) >= 1 if share is None else 0 < float(share) < 100
    except ValueError:
        raise UsageError(f"{option} {text!r} is neither a count nor a share; write 6 or 25%") from None
    if not possible:
        raise UsageError(f"{option} {text}: at least one layer goes and one stays; write 6 or 25%")


def parse_drop(text: str, depth: int, option: str = "--drop") -> int:
    """Return how many of ``depth`` layers ``"6"`` or ``"25%"`` means; a share is rounded to the nearest, at least 1."""
    given = text.strip()
    try:
        if given.endswith("%"):
            share = float(given[:-1])
            if not math.isfinite(share) or share <= 0:
                raise ValueError
            count = max(1, math.floor(depth * share / 100 + 0.5))
        else:
            count = int(given)
    except ValueError:
        raise UsageError(f"{option} {text!r} is neither a count nor a share; write 6 or 25%") from None
    if count < 1 or count >= depth:
        what = f" ({count} layers)" if given.endswith("%") else ""
        allowed = f"the model has {depth} layers; between 1 and {depth - 1} can be removed"
        raise UsageError(f"{option} {text}{what}: {allowed}")
    return count


def parse_protect(text: str | None, depth: int, option: str = "--protect") -> frozenset[int]:
    """Return the layers that ``"0-3,-1"`` names: numbers, from the end where negative, and ranges with both ends."""
    layers: set[int] = set()
    for part in (text or "").split(","):
        if not part.strip():
            continue
        found = re.fullmatch(r"\s*(-?\d+)\s*(?:-\s*(\d+)\s*)?", part)
        if found is None:
            raise UsageError(f"{option} {text!r}: {part.strip()!r} is not a layer number or a range; write 0-3,-1")
        first, last = int(found[1]), int(found[2] or found[1])
        for layer in (first, last):
            if not -depth <= layer < depth:
                raise UsageError(
                    f"{option} {text!r}: layer {layer} does not exist; the model has layers 0 to {depth - 1}"
                )
        if first > last or (first < 0 and found[2]):
            raise UsageError(f"{option} {text!r}: a range goes up and counts from the start, such as 0-3")
        layers.update(layer % depth for layer in range(first, last + 1))
    return frozenset(layers)


def _sums(sizes: Iterable[int]) -> set[int]:
    """Return every total that some subset of ``sizes`` has, 0 among them."""
    totals = {0}
    for size in sizes:
        totals |= {total + size for total in totals}
    return totals
