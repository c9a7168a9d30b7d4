"""The two searches that build a removal layer by layer: one-shot scores once, greedy again after each removal."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from layerprune.documents import Candidate, Round
from layerprune.planners.base import Found, Judge, Watch, judged, order_moves, ranked, require_floors
from layerprune.planners.constraints import Constraints
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
        preference = [moves[position] for position in order_moves(moves, candidates)]
        removed, order = Removal(()), list[int | float]()
        while len(removed) < drop:
            move = constraints.first_open(preference, removed, drop)
            removed = removed.add(*move)
            order.extend(move)
        only_round = Round(removed=(), candidates=candidates)
        cost = next((c for c in candidates if c.removal == removed.units), None)
        if watch and cost:
            watch(removed, cost)
        return Found(tuple(order), (only_round,), ranked(moves, candidates), cost)


@dataclass(frozen=True)
class Greedy:
    """Remove the layer that harms least, score the others again without it, and so on. Source: arXiv:2605.14075."""

    nested: ClassVar[bool] = True

    def next_to_go(self, drop: int) -> int:
        """Return how many of a round's candidates matter: the judge may stop the others early."""
        return 1

    def __call__(
        self, judge: Judge, constraints: Constraints, drop: int, *, seed: int = 0, watch: Watch | None = None
    ) -> Found:
        constraints.require(drop)
        removed, order, rounds = Removal(()), list[int | float](), list[Round]()
        cost: Candidate | None = None
        ranking = None
        while len(removed) < drop:
            moves = constraints.open_moves(removed, drop)
            candidates = judged(judge, [removed.add(*move) for move in moves])
            require_floors(candidates, removed)
            rounds.append(Round(removed=removed.units, candidates=candidates))
            ranking = ranking or ranked(moves, candidates)
            best = order_moves(moves, candidates, cost.score if cost else 0.0)[0]
            removed, cost = removed.add(*moves[best]), candidates[best]
            order.extend(moves[best])
            if watch:
                watch(removed, cost)
        return Found(tuple(order), tuple(rounds), ranking or (), cost)


one_shot = OneShot()
greedy = Greedy()
