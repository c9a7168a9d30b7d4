"""Exchange: whole removals that several metrics propose, and one layer exchanged for another while that helps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from layerprune.documents import Candidate, Round
from layerprune.errors import RefusedError, UsageError
from layerprune.planners.base import (
    NOTHING,
    Asking,
    Found,
    Judge,
    Others,
    Watch,
    by_harm,
    judged,
    order_moves,
)
from layerprune.planners.constraints import Constraints
from layerprune.planners.shapes import Move
from layerprune.planners.stepwise import OneShot
from layerprune.removal import Removal


@dataclass(frozen=True)
class Exchange(Asking):
    """Judge whole removals that other metrics and the own one-shot ranking propose, and better the best by exchanges.

    An exchange puts one layer back and judges whatever could go in its place; the layer whose return helps most is
    tried first. It ends where no exchange of one layer does less harm, or after ``most`` exchanges: the oscillating
    search of feature selection (Somol and Pudil, ICPR 2000) with swings of one, from given starts.
    """

    nested: ClassVar[bool] = False
    by: str = field(default="cosine", metadata={"help": "specs of the metrics that propose, joined by +"})
    most: int = field(default=20, metadata={"help": "exchanges made at most"})

    def __post_init__(self) -> None:
        if self.most < 0:
            raise ValueError(f"most must be at least 0, got {self.most}")
        if not all(self.asks):
            raise ValueError(f"by names metrics joined by +, got {self.by!r}")

    def next_to_go(self, drop: int) -> int:
        """Return how many of a round's candidates matter: whatever the round, its best."""
        return 1

    def look(
        self, others: Others, judge: Judge, constraints: Constraints, drop: int, *, seed: int, watch: Watch | None
    ) -> Found:
        """Search with what the others propose."""
        constraints.require(drop)
        proposed = [self._proposed(others, metric, constraints, drop) for metric in self.asks]  # cheap: refused first
        own = OneShot()(others.own(drop), constraints, drop, seed=seed)
        walk = _Walk(judge, constraints, drop, list(own.rounds))
        best: Candidate | None = walk.start(list(dict.fromkeys([own.removal, *proposed])))
        for _ in range(self.most):
            if watch and best:
                watch(walk.here, best)
            best = walk.exchange()
            if best is None:
                break
        cost = walk.settle(others.own(len(walk.stood)))
        if watch:
            watch(walk.here, cost)
        place = {entry.unit: number for number, entry in enumerate(own.ranking)}
        order = tuple(sorted(walk.here.layers, key=place.__getitem__))
        return Found(order, tuple(walk.rounds), own.ranking, cost, nested=False)

    def _proposed(self, others: Others, metric: str, constraints: Constraints, drop: int) -> Removal:
        try:
            return others.choose(metric, constraints, drop).removal
        except (RefusedError, UsageError) as error:
            what = f"the metric {metric!r} proposes nothing here: {error}"
            raise UsageError(f"{what}; name others with --search exchange:by=") from error


@dataclass
class _Walk:
    """Where the search stands, and what it has looked at."""

    judge: Judge
    constraints: Constraints
    drop: int
    rounds: list[Round]
    stood: list[Removal] = field(default_factory=list)  # the last is where it stands

    @property
    def here(self) -> Removal:
        return self.stood[-1]

    def start(self, removals: Sequence[Removal]) -> Candidate:
        """Stand at the least harmful of whole removals."""
        return self._stand(min(self._round(NOTHING, removals), key=by_harm))

    def exchange(self) -> Candidate | None:
        """Exchange one stroke of what is removed for a better one; None where every exchange does more harm."""
        for out in self._outs():
            rest = Removal.from_layers(unit for unit in self.here if unit not in out)
            moves = [move for move in self.constraints.open_moves(rest, self.drop) if len(move) == len(out)]
            if moves == [out]:
                continue
            # what is here runs along: in a race nobody's score can be held against another round's
            candidates = self._round(rest, [rest.add(*move) for move in moves])
            best = candidates[order_moves(moves, candidates)[0]]
            if Removal(best.removal) not in self.stood:  # a race may err: nowhere twice, so that the walk ends
                return self._stand(best)
        return None

    def settle(self, judge: Judge) -> Candidate:
        """Judge on all items wherever it stood, as races may have erred, and stand where harm is least."""
        candidates = judged(judge, self.stood)
        self.rounds.append(Round(removed=(), candidates=candidates))
        return self._stand(min(candidates, key=by_harm))

    def _outs(self) -> Iterator[Move]:
        """Yield what may be put back, the one whose return helps most first; a race says little of the order behind."""
        moves = [move for move in self.constraints.moves if set(move) <= set(self.here)]
        fewer = [Removal.from_layers(unit for unit in self.here if unit not in move) for move in moves]
        if len(self.here) == len(moves[0]):  # nothing would be left to judge
            yield from moves
            return
        candidates = self._round(NOTHING, fewer)
        yield from (moves[place] for place in sorted(range(len(moves)), key=lambda place: by_harm(candidates[place])))

    def _round(self, removed: Removal, removals: Sequence[Removal]) -> tuple[Candidate, ...]:
        candidates = judged(self.judge, removals)
        self.rounds.append(Round(removed=removed.layers, candidates=candidates))
        return candidates

    def _stand(self, candidate: Candidate) -> Candidate:
        self.stood.append(Removal(candidate.removal))
        return candidate
