"""A target of speed: the fewest units that make the model so many times as fast, as measured on this machine."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from layerprune.auditor.speed import REPEATS, time_both
from layerprune.documents import Speed, Target
from layerprune.errors import RefusedError, UsageError
from layerprune.exporter.sharing import sharing_weights
from layerprune.planners.blocks import allowed_runs
from layerprune.planning.desk import Desk
from layerprune.planning.goals import HELD_BACK, Look, Reached, counts_up_to
from layerprune.planning.slices import Shares
from layerprune.removal import Removal

STAND_IN_REPEATS = 3  # of stand-ins, which only say where to begin; the chosen removal is timed REPEATS times


@dataclass(frozen=True)
class Faster:
    """Prefill and decoding both at least ``wanted`` times as fast as the intact model, one sequence at a time.

    Layers of one kind take alike long, so stand-ins are timed first, to say what can be reached and where to begin;
    what the search then chooses is timed itself. Timings vary: the same command may end one layer further on.
    """

    wanted: float
    requested: str
    shares: Shares = field(default=Shares(HELD_BACK), init=False)

    def require(self, desk: Desk) -> None:
        most = self._stand_ins(desk)[-1]
        best = speedup(_timed(desk, most, STAND_IN_REPEATS))
        if best < self.wanted:
            raise UsageError(
                f"{self.requested} cannot be reached: with {len(most)} of {desk.constraints.depth} layers removed, "
                f"as many as may go, the model is {best:.2f} times as fast here"
            )

    def most(self, desk: Desk) -> int:
        """One layer more than if all the time were spent in the layers."""
        least = math.ceil(desk.constraints.depth * (1 - 1 / self.wanted)) + 1
        counts = desk.constraints.counts()
        return next((count for count in counts if count >= least), counts[-1])

    def pursue(self, desk: Desk, look: Look) -> Reached:
        beginning, reached = self._beginning(desk), 1.0
        refusal: RefusedError | None = None
        for count in (count for count in desk.constraints.counts() if count >= beginning):
            try:
                found = look(count)
            except RefusedError as error:  # whole periods only, say: the next number may do
                refusal = refusal or error
                continue
            speed = _timed(desk, found.removal, REPEATS)
            reached = speedup(speed)
            desk.progress.note(f"{count} removed: {reached:.2f} times as fast")
            if reached >= self.wanted:
                target = Target(what="speed-up", wanted=self.wanted, base=1.0, reached=round(reached, 4), speed=speed)
                return Reached(found, found.rounds, target=target)
        if refusal and reached == 1.0:
            raise refusal
        raise RefusedError(f"{self.requested} was not reached: the largest removal is {reached:.2f} times as fast here")

    def _beginning(self, desk: Desk) -> int:
        """Return the smallest number of units whose stand-in is fast enough, found by halving."""
        stand_ins = self._stand_ins(desk)
        low, high = 0, len(stand_ins) - 1
        while low < high:
            middle = (low + high) // 2
            fast = speedup(_timed(desk, stand_ins[middle], STAND_IN_REPEATS)) >= self.wanted
            low, high = (low, middle) if fast else (middle + 1, high)
        return len(stand_ins[low])

    def _stand_ins(self, desk: Desk) -> list[Removal]:
        """Return one allowed removal of each size that has one, smallest first; ``UsageError`` when none has."""
        found = [_stand_in(desk, count) for count in counts_up_to(desk, None, self.requested)]
        allowed = [removal for removal in found if removal is not None]
        if not allowed:
            raise UsageError(f"{self.requested} cannot begin: none of the layers may go")
        return allowed


def speedup(speed: Speed) -> float:
    """Return how many times as fast the pruned model is, in the lesser of prefill and decoding (medians)."""
    names = ("prefill_tokens_per_s", "decode_tokens_per_s")
    return min(speed.pruned[name].median / speed.base[name].median for name in names)


def _timed(desk: Desk, removal: Removal, repeats: int) -> Speed:
    """Time the intact model and the pruned one in turn, as export would write it."""
    trust = desk.request.trust_remote_code
    pruned = sharing_weights(desk.subject, desk.checkpoint, removal, trust_remote_code=trust)
    return time_both(desk.subject, pruned, repeats=repeats, progress=desk.progress)


def _stand_in(desk: Desk, count: int) -> Removal | None:
    """Return some removal of ``count`` units, from the end, else a run of neighbours; None where neither is allowed."""
    removed = Removal(())
    try:
        while len(removed) < count:
            removed = removed.add(*desk.constraints.first_open(desk.constraints.moves[::-1], removed, count))
        return removed
    except RefusedError:  # step by step there is no way, but whole periods may go
        pass
    try:
        return allowed_runs(desk.constraints, count)[-1]
    except RefusedError:
        return None
