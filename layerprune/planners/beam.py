"""Beam search: several promising removals are followed at once, so that one early choice does not decide."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from layerprune.documents import Candidate, Ranked, Round
from layerprune.errors import RefusedError
from layerprune.planners.base import Found, Judge, Watch, by_harm, judged, ranked
from layerprune.planners.constraints import Constraints
from layerprune.planners.shapes import Move
from layerprune.removal import Removal, Unit

Path = tuple[Unit, ...]  # units in the order of choosing


@dataclass(frozen=True)
class Beam:
    """Keep the ``width`` least harmful removals of every size and extend each; a width of 1 is greedy."""

    nested: ClassVar[bool] = True
    width: int = field(default=4, metadata={"help": "removals followed at once"})

    def __post_init__(self) -> None:
        if self.width < 1:
            raise ValueError(f"width must be at least 1, got {self.width}")

    def __call__(
        self, judge: Judge, constraints: Constraints, drop: int, *, seed: int = 0, watch: Watch | None = None
    ) -> Found:
        constraints.require(drop)
        rounds: list[Round] = []
        ranking: tuple[Ranked, ...] = ()
        levels: dict[int, dict[Path, Candidate]] = {}  # removals judged so far, by size; the key is sorted
        orders: dict[Path, Path] = {(): ()}
        dead_end: RefusedError | None = None
        for size in range(drop):
            level = levels.get(size, {})
            kept = sorted(level, key=lambda units: by_harm(level[units]))[: self.width] if size else [()]
            for units in kept:
                removed = Removal(units)
                try:
                    moves = constraints.open_moves(removed, drop)
                except RefusedError as error:
                    dead_end = error
                    continue
                fresh = [move for move in moves if not _known(levels, removed.add(*move))]
                if not fresh:  # other paths led to all of them
                    continue
                candidates = judged(judge, [removed.add(*move) for move in fresh])
                _take(levels, orders, removed, fresh, candidates)
                rounds.append(Round(removed=units, candidates=candidates))
                ranking = ranking or ranked(fresh, candidates)
            if watch and (best := _best(levels.get(size + 1, {}))):
                watch(Removal(best.removal), best)
        winner = _best(levels.get(drop, {}))
        if winner is None:
            raise dead_end or RefusedError(f"no removal of {drop} layers was found")
        return Found(orders[winner.removal], tuple(rounds), ranking, winner)


def _known(levels: dict[int, dict[Path, Candidate]], removal: Removal) -> bool:
    return removal.units in levels.get(len(removal), {})


def _take(
    levels: dict[int, dict[Path, Candidate]],
    orders: dict[Path, Path],
    removed: Removal,
    moves: list[Move],
    candidates: tuple[Candidate, ...],
) -> None:
    for move, candidate in zip(moves, candidates, strict=True):
        levels.setdefault(len(candidate.removal), {})[candidate.removal] = candidate
        orders[candidate.removal] = (*orders[removed.units], *move)


def _best(level: dict[Path, Candidate]) -> Candidate | None:
    return min(level.values(), key=by_harm, default=None)
