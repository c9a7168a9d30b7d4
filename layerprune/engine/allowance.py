"""Batches and portions of removals that stay within ``--memory``: what may be held beside the weights at any time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property

from layerprune.engine.memory import Estimate, Shape
from layerprune.engine.paths import Path
from layerprune.engine.traffic import Traffic, traffic
from layerprune.engine.trees import ROW_TOKENS, Row
from layerprune.errors import UsageError
from layerprune.removal import Removal
from layerprune.sizes import in_words, rounded_up

# A batch of up to this many tokens need not leave room for the removals of all layers at once: those are then measured
# in portions, which costs less than batches of a few tokens do.
LEAST_TOKENS = 512
LOGITS_SHARE = 0.25  # of what a batch may hold; a piece of logits takes no more


class Allowance:
    """What one batch may hold on one path, and what fits into that."""

    def __init__(self, path: Path, memory: int, kept_share: float, longest: int, *, own: bool = True) -> None:
        """``memory`` is in bytes; ``kept_share`` of it is for states of earlier batches.

        ``longest``: tokens of the longest request. ``own``: the weights of the path's model are not counted.
        """
        self.path, self.memory, self.kept_share, self.longest = path, memory, kept_share, longest
        self.weights = 0 if own else sum(p.numel() * p.element_size() for p in path.subject.model.parameters())
        depth = len(path.subject.layers)
        self.each = self._traffic([Removal.of(layer) for layer in range(depth)])
        self.alone = self._traffic([Removal(())])
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
            count = self._most(section, [removals[number] for number in numbers])
            parts.append(numbers[:count])
            numbers = numbers[count:]
        return parts

    def longest_row(self, before: int) -> int:
        """Return how long a row may become by joining questions, behind a beginning of so many tokens."""
        low, high = 1, ROW_TOKENS
        while low < high:
            middle = high if low == 1 and high == ROW_TOKENS else (low + high + 1) // 2
            fits = self._bytes(Shape(1, middle, before, middle), self.alone, self.path.piece) <= self.room
            low, high = (middle, high) if fits else (low, middle - 1)
        return low

    def check(self, rows: Sequence[Row]) -> None:
        """Raise ``UsageError``, with the least memory that works, where one row under one removal takes too much."""
        trials = max((self._behind if row.beginning else self._plain).peak for row in rows)
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
            return self._bytes(Shape.of(batch), states, piece)
        return max(self._bytes(Shape.of([row]), states, piece) for row in batch)

    def _bytes(self, shape: Shape, states: Traffic, piece: int) -> int:
        estimate = self._behind if shape.before else self._plain
        return estimate.of_batch(shape, states, piece)

    @cached_property
    def _plain(self) -> Estimate:
        return Estimate.of(self.path, self.longest)

    @cached_property
    def _behind(self) -> Estimate:
        return Estimate.of(self.path, self.longest, beginning=True)

    def _traffic(self, removals: Sequence[Removal]) -> Traffic:
        subject = self.path.subject
        drops = tuple(frozenset(removal) for removal in removals)
        return traffic(len(subject.layers), drops)

    def _piece(self, room: int) -> int:
        """Return for how many places logits are computed at once."""
        most = int(LOGITS_SHARE * room / self._plain.logits) if self._plain.logits else self.usual_piece
        return max(1, min(self.usual_piece, most))

    def _most(self, section: Sequence[list[Row]], removals: Sequence[Removal]) -> int:
        """Return how many of the removals fit, from the first on; one does, as every row was checked."""
        low, high = 1, len(removals)
        while low < high:
            middle = high if low == 1 and high == len(removals) else (low + high + 1) // 2
            states = self._traffic(removals[:middle])
            fits = all(self.need(batch, states) <= self.room for batch in section)
            low, high = (middle, high) if fits else (low, middle - 1)
        return low
