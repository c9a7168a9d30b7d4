"""Cascade: a cheap metric proposes, the judge decides; greedy at a share of its price."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from layerprune.documents import Candidate, Ranked, Round
from layerprune.planners.base import (
    Asking,
    Found,
    Judge,
    Others,
    Watch,
    judged,
    order_moves,
    ranked,
    require_floors,
)
from layerprune.planners.constraints import Constraints
from layerprune.removal import Removal, Unit


@dataclass(frozen=True)
class Cascade(Asking):
    """Each round, judge only the ``keep`` layers that a cheap metric would remove first, and remove the best of them.

    The cheap metric is asked once, about single layers of the intact model.
    """

    nested: ClassVar[bool] = True
    by: str = field(default="cosine", metadata={"help": "spec of the metric that proposes, without its own options"})
    keep: int = field(default=8, metadata={"help": "layers judged in a round"})

    def __post_init__(self) -> None:
        if self.keep < 1:
            raise ValueError(f"keep must be at least 1, got {self.keep}")
        if len(self.asks) > 1:
            raise ValueError(f"by names one metric, got {self.by!r}; exchange takes several")

    def look(
        self, others: Others, judge: Judge, constraints: Constraints, drop: int, *, seed: int, watch: Watch | None
    ) -> Found:
        """Search with the cheap metric at hand."""
        constraints.require(drop)
        moves = constraints.moves
        proposals = judged(others.judge(self.by), [Removal.of(*move) for move in moves])
        turn = {moves[position]: turn for turn, position in enumerate(order_moves(moves, proposals))}
        removed, order, rounds = Removal(()), list[Unit](), list[Round]()
        cost: Candidate | None = None
        ranking: tuple[Ranked, ...] = ()
        while len(removed) < drop:
            allowed = constraints.open_moves(removed, drop)
            proposed = sorted(sorted(allowed, key=turn.__getitem__)[: self.keep])
            candidates = judged(judge, [removed.add(*move) for move in proposed])
            require_floors(candidates, removed)
            rounds.append(Round(removed=removed.units, candidates=candidates))
            ranking = ranking or ranked(proposed, candidates)
            best = order_moves(proposed, candidates, cost.score if cost else 0.0)[0]
            removed, cost = removed.add(*proposed[best]), candidates[best]
            order.extend(proposed[best])
            if watch:
                watch(removed, cost)
        return Found(tuple(order), tuple(rounds), ranking, cost)
