"""Contiguous blocks: the run of neighbouring layers that harms least when it is taken out in one piece."""

from __future__ import annotations

from dataclasses import dataclass

from layerprune.documents import Candidate, Round
from layerprune.errors import RefusedError
from layerprune.planners.base import Found, Judge, Watch, by_harm, judged
from layerprune.planners.constraints import Constraints
from layerprune.removal import Removal


@dataclass(frozen=True)
class Blocks:
    """Judge every run of ``drop`` neighbouring layers and remove the best. Source: arXiv:2403.17887."""

    def __call__(
        self, judge: Judge, constraints: Constraints, drop: int, *, seed: int = 0, watch: Watch | None = None
    ) -> Found:
        constraints.require(drop)
        runs = allowed_runs(constraints, drop)
        candidates = judged(judge, runs)
        best: Candidate = min(candidates, key=by_harm)
        if watch:
            watch(Removal(best.removal), best)
        return Found(best.removal, (Round(removed=(), candidates=candidates),), (), best, nested=False)


def allowed_runs(constraints: Constraints, drop: int) -> list[Removal]:
    """Return every contiguous run of ``drop`` units that may go; raises ``RefusedError`` when there is none."""
    movable = {unit for move in constraints.moves for unit in move}
    reason, runs = "", list[Removal]()
    for start in sorted(movable):
        units = {start + step for step in range(drop)}
        split = any(set(move) & units and not set(move) <= units for move in constraints.moves)
        if not units <= movable or split:
            continue
        run = Removal.from_layers(units)
        refusal = constraints.refusal(run)
        reason = reason or refusal
        if not refusal:
            runs.append(run)
    if not runs:
        why = f"; {reason}" if reason else ": layers that have to stay interrupt every run"
        raise RefusedError(f"no {drop} neighbouring layers may go together{why}")
    return runs
