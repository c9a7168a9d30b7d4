"""Constraints on which layers can be removed, and on the shape that the removed layers have together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise

from layerprune.errors import RefusedError, UsageError
from layerprune.removal import Removal

# What the removed layers may look like together: anything, no two adjacent, or one contiguous run.


Move = tuple[int, ...]  # what is removed in one stroke: one layer, or all layers that must go together


@dataclass(frozen=True)
class AnyShape:
    """A rule about the removal as a whole: none."""

    words = ""  # completes "at most 7 may go ..."

    def refusal(self, removal: Removal) -> str:
        """Return why ``removal`` breaks the rule, or an empty string."""
        return ""

    def reaches(self, removed: Removal, moves: Sequence[Move], missing: int) -> bool:
        """Return whether ``missing`` more layers could follow ``removed``; ``moves`` may overlap it."""
        return True


@dataclass(frozen=True)
class NoAdjacent(AnyShape):
    """No two adjacent layers: something of the model is left between any two that go."""

    words = "with no two adjacent"

    def refusal(self, removal: Removal) -> str:
        for layer, following in pairwise(removal):
            if following - layer == 1:
                return f"{layer} and {following} are adjacent, and no two adjacent ones may go"
        return ""

    def reaches(self, removed: Removal, moves: Sequence[Move], missing: int) -> bool:
        """Count how many fit beside what is gone: taking the leftmost that fits, again and again, is the most.

        Layers that go together are counted one by one, which can promise too much for them; the search then says so.
        """
        apart = [move for move in moves if all(b - a > 1 for a, b in pairwise(move))]
        count, free_from = 0, 0
        for layer in sorted(layer for move in apart for layer in move):
            if layer >= free_from and not {layer - 1, layer, layer + 1} & set(removed):
                count, free_from = count + 1, layer + 2
        return count >= missing


@dataclass(frozen=True)
class Contiguous(AnyShape):
    """One run of neighbours, nothing left in between."""

    words = "in one contiguous run"

    def refusal(self, removal: Removal) -> str:
        layers = removal.layers
        return f"{removal} is not one contiguous run" if layers and layers[-1] - layers[0] >= len(layers) else ""

    def reaches(self, removed: Removal, moves: Sequence[Move], missing: int) -> bool:
        # every run that is made up of whole moves and holds what is gone; not of moves that leave something in between
        parts = [part for part in (*moves, removed.layers) if part and part[-1] - part[0] == len(part) - 1]
        layers = {layer for part in parts for layer in part}
        stops = {part[-1] + 1 for part in parts}
        runs = [range(part[0], part[0] + len(removed) + missing) for part in parts]
        return any(run.stop in stops and layers.issuperset(run) and set(run).issuperset(removed) for run in runs)


# What a search may not do.


@dataclass(frozen=True)
class Constraints:
    """The stack's depth, what the user protects and wants it to look like, and what the architecture allows."""

    depth: int
    protect: frozenset[int] = frozenset()  # the user's: never removed
    must_keep: frozenset[int] = frozenset()  # the architecture's: never removed
    together: tuple[frozenset[int], ...] = ()  # layers that are removed together or not at all
    units: tuple[int, ...] | None = None  # what may be removed at all; None: every layer
    check: Callable[[Removal], None] | None = field(default=None, compare=False)  # Architecture.check: RefusedError
    shape: AnyShape = AnyShape()

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
        possible = sorted(_sums(len(move) for move in self.moves))
        return tuple(
            count for count in possible if 0 < count < self.depth and self.shape.reaches(Removal(()), self.moves, count)
        )

    @cached_property
    def removable(self) -> int:
        """How many layers could go at most."""
        return sum(map(len, self.moves))

    def open_moves(self, removed: Removal, drop: int) -> tuple[Move, ...]:
        """Return the moves that can follow ``removed`` and still end at exactly ``drop`` units.

        Raises ``RefusedError`` when there is none, with the architecture's reason where it gave one.
        """
        return tuple(self._open(self.moves, removed, drop))

    def first_open(self, preference: Sequence[Move], removed: Removal, drop: int) -> Move:
        """Return the first of ``preference`` that may follow; asks the architecture about no more than needed."""
        return next(self._open(preference, removed, drop))

    def _open(self, moves: Iterable[Move], removed: Removal, drop: int) -> Iterator[Move]:
        fitting = set(self._fitting(removed, drop))
        found, reason = False, ""
        for move in moves:
            if move in fitting:
                refusal = self.refusal(removed.add(*move))
                if not refusal:
                    found = True
                    yield move
                reason = reason or refusal
        if not found:
            raise RefusedError(
                f"cannot remove {drop} layers: after {len(removed)} ({removed}) none of the others may go"
                + (f"; {reason}" if reason else "")
            )

    def _fitting(self, removed: Removal, drop: int) -> list[Move]:
        """Return moves that overlap nothing removed, keep the shape, and leave a rest that can still be made up."""
        moves = [move for move in self.moves if not set(move) & set(removed)]
        missing, counts = drop - len(removed), Counter(len(move) for move in moves)
        rest = {size: _sums((counts - Counter([size])).elements()) for size in counts}
        fitting = []
        for move in moves:
            left, after = missing - len(move), removed.add(*move)
            if left in rest[len(move)] and not self.shape.refusal(after) and self.shape.reaches(after, moves, left):
                fitting.append(move)
        return fitting

    def refusal(self, removal: Removal) -> str:
        """Return why the shape or the architecture refuses ``removal``, or an empty string."""
        if self.check is None or self.shape.refusal(removal):
            return self.shape.refusal(removal)
        try:
            self.check(removal)
        except RefusedError as error:
            return str(error)
        return ""

    def require_allowed(self, search: str, removal: Removal, drop: int) -> None:
        """Raise ``RefusedError`` when the ``removal`` that a search found is not one of ``drop`` units that may go."""
        movable = {unit for move in self.moves if set(move) <= set(removal) for unit in move}
        if len(removal) != drop:
            reason = f"{drop} layers were to go, and these are {len(removal)}"
        elif stray := sorted(set(removal) - movable):
            reason = f"layer {stray[0]} does not exist, is to stay, or goes with others only"
        else:
            reason = self.refusal(removal)
        if reason:
            raise RefusedError(f"the search {search!r} found {removal}, which may not go: {reason}")

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
            most = max(self.counts(), default=0)
            raise UsageError(
                f"cannot remove {drop} of {self.depth} layers: at most {most} may go {self.shape.words}"
                f"{self._kept_in_words()}"
            )

    def _kept_in_words(self) -> str:
        parts = []
        if self.protect:
            parts.append(f"protected: {', '.join(map(str, sorted(self.protect)))}")
        if self.must_keep:
            parts.append(f"kept by the architecture: {', '.join(map(str, sorted(self.must_keep)))}")
        return f" ({'; '.join(parts)})" if parts else ""


def _sums(sizes: Iterable[int]) -> set[int]:
    """Return every total that some subset of ``sizes`` has, 0 among them."""
    totals = {0}
    for size in sizes:
        totals |= {total + size for total in totals}
    return totals
