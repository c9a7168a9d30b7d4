"""The two searches that build a removal layer by layer: one-shot scores once, greedy again after each removal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from layerprune.documents import Candidate, Round
from layerprune.planners.base import (
    Found,
    Judge,
    Watch,
    judged,
    order_moves,
    ranked,
    require_floors,
    require_one_finite,
)
from layerprune.planners.constraints import Constraints
from layerprune.planners.shapes import Move
from layerprune.removal import Removal


@dataclass(frozen=True)
class OneShot:
    """Score every layer once, alone, and remove the lowest. Source: ShortGPT (arXiv:2403.03853)."""

    nested: ClassVar[bool] = True

    def next_to_go(self, drop: int) -> int:
        """Return how many of a round's candidates matter: the judge may stop the others early."""
        return drop

    def __call__(
        self, judge: Judge, constraints: Constraints, drop: int, *, seed: int = 0, watch: Watch | None = None
    ) -> Found:
        constraints.require(drop)
        moves = constraints.moves
        candidates = judged(judge, [Removal.of(*move) for move in moves])
        require_one_finite(candidates)
        preference = [moves[position] for position in order_moves(moves, candidates)]
        removed, order = Removal(()), list[int]()
        while len(removed) < drop:
            move = constraints.first_open(preference, removed, drop)
            removed = removed.add(*move)
            order.extend(move)
        only_round = Round(removed=(), candidates=candidates)
        cost = next((c for c in candidates if c.removal == removed.layers), None)
        if watch and cost:
            watch(removed, cost)
        return Found(tuple(order), (only_round,), ranked(moves, candidates), cost)


# Moves that a lazy round judges at a time: they share the walk up to where they differ, so one alone is dear.
LAZY_BATCH = 4


@dataclass(frozen=True)
class Greedy:
    """Remove the layer that harms least, score the others again without it, and so on. Source: arXiv:2605.14075.

    Lazily, a round asks about the layers that promised least harm when they were judged last, and ends once the best of
    them does less harm than any other had promised: right where the harm of removing a layer never falls as others go
    (Minoux 1978, the accelerated greedy algorithm), and an approximation where it does. In a race a layer promises by
    the lower end of its interval, or by what the one did that it was behind, and the best of a round sees all items.
    """

    nested: ClassVar[bool] = True

    lazy: bool = field(
        default=False, metadata={"help": "judge a layer again only while its last harm could make it the next to go"}
    )

    def next_to_go(self, drop: int) -> int:
        """Return how many of a round's candidates matter: the judge may stop the others early."""
        return 1

    def __call__(
        self, judge: Judge, constraints: Constraints, drop: int, *, seed: int = 0, watch: Watch | None = None
    ) -> Found:
        constraints.require(drop)
        removed, order, rounds = Removal(()), list[int](), list[Round]()
        cost: Candidate | None = None
        ranking = None
        promised: dict[Move, float] = {}
        while len(removed) < drop:
            moves = constraints.open_moves(removed, drop)
            before = cost.score if cost else 0.0
            seen = self._round(judge, removed, moves, promised, before)
            require_floors(list(seen.values()), removed)
            rounds.append(Round(removed=removed.layers, candidates=tuple(seen.values())))
            ranking = ranking or ranked(list(seen), list(seen.values()))
            best = _best(seen, before)
            least = _harm(seen[best], best, before)
            promised |= {move: _promise(one, move, before, least, promised) for move, one in seen.items()}
            removed, cost = removed.add(*best), seen[best]
            order.extend(best)
            if watch:
                watch(removed, cost)
        return Found(tuple(order), tuple(rounds), ranking or (), cost)

    def _round(
        self, judge: Judge, removed: Removal, moves: Sequence[Move], promised: dict[Move, float], before: float
    ) -> dict[Move, Candidate]:
        """Judge the moves of one round, all of them or as many as may hold the best."""

        def ask(moves: Sequence[Move]) -> dict[Move, Candidate]:
            return dict(zip(moves, judged(judge, [removed.add(*move) for move in moves]), strict=True))

        if not self.lazy:
            return ask(moves)
        seen: dict[Move, Candidate] = {}
        best: Move | None = None
        settled = set[Move]()
        for batch in self._batches(moves, promised):
            if best and not seen[best].below_floor and _harm(seen[best], best, before) <= promised[batch[0]]:
                break
            # The best so far runs along, for the race to be against it; its verdict on all the items stands.
            answers = ask([*([best] if best else []), *batch])
            seen |= {move: one for move, one in answers.items() if move != best}
            best = _best(seen, before)
            while seen[best].stopped and best not in settled:  # let in early: how it does on all items is to be seen
                settled.add(best)
                seen |= ask([best])
                best = _best(seen, before)
        return {move: seen[move] for move in moves if move in seen}

    def _batches(self, moves: Sequence[Move], promised: dict[Move, float]) -> Iterator[Sequence[Move]]:
        """Yield the moves in the order of asking: what was never judged first, then the least harm promised."""
        if not promised:
            yield moves
            return
        fresh = [move for move in moves if move not in promised]
        known = sorted((move for move in moves if move in promised), key=lambda move: (promised[move], move))
        if fresh:
            yield fresh
        for start in range(0, len(known), LAZY_BATCH):
            yield known[start : start + LAZY_BATCH]


def _harm(candidate: Candidate, move: Move, before: float) -> float:
    return (candidate.score - before) / len(move)


def _promise(one: Candidate, move: Move, before: float, least: float, promised: dict[Move, float]) -> float:
    """Return the least harm that a candidate may do in a later round, where harm never falls.

    What a race stopped early was clearly behind another, and so does more harm than ``least``, the best of its round.
    """
    if not one.stopped:
        return _harm(one, move, before)
    low = least if one.interval is None else (one.interval[0] - before) / len(move)
    return max(least, low, promised.get(move, least))


def _best(seen: dict[Move, Candidate], before: float) -> Move:
    moves = list(seen)
    return moves[order_moves(moves, list(seen.values()), before)[0]]


one_shot = OneShot()
greedy = Greedy()
