"""Targets of size: the fewest units that bring the weights down to so many parameters or bytes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from layerprune.documents import Target
from layerprune.errors import RefusedError, UsageError
from layerprune.exporter.weights import Weight
from layerprune.planning.desk import Desk
from layerprune.planning.goals import HELD_BACK, Look, Reached
from layerprune.planning.slices import Shares
from layerprune.removal import Removal
from layerprune.sizes import in_words


@dataclass(frozen=True)
class Smaller:
    """At most ``wanted`` parameters, or bytes of weights, are left."""

    what: Literal["parameters", "bytes"]
    wanted: int
    requested: str
    shares: Shares = field(default=Shares(HELD_BACK), init=False)

    def require(self, desk: Desk) -> None:
        self._plausible(desk)

    def most(self, desk: Desk) -> int:
        """One layer more than if the largest ones went: layers are much alike."""
        return self._plausible(desk)[:2][-1]

    def pursue(self, desk: Desk, look: Look) -> Reached:
        (intact,) = desk.weigh(Removal(()))
        left = self._size(intact)
        refusal: RefusedError | None = None
        reached = False
        for count in self._plausible(desk):
            try:
                found = look(count)
            except RefusedError as error:  # whole periods only, say: the next number may do
                refusal = refusal or error
                continue
            left, reached = self._size(desk.weigh(found.removal)[0]), True
            if left <= self.wanted:
                target = Target(what=self.what, wanted=self.wanted, base=self._size(intact), reached=left)
                return Reached(found, found.rounds, target=target)
        if refusal and not reached:
            raise refusal
        raise RefusedError(f"{self.requested} was not reached: the search's largest removal leaves {self._words(left)}")

    def _plausible(self, desk: Desk) -> list[int]:
        """Return the numbers of units that can reach it if the largest go; raises ``UsageError`` when none can."""
        moves, counts = desk.constraints.moves, desk.constraints.counts()
        intact, *without = desk.weigh(Removal(()), *[Removal.of(*move) for move in moves])
        base = self._size(intact)
        if base <= self.wanted:
            raise UsageError(f"{self.requested}: the model has {self._words(base)} as it is; ask for less")
        saved = [(base - self._size(own)) / len(move) for move, own in zip(moves, without, strict=True) for _ in move]
        saved.sort(reverse=True)
        enough = [count for count in counts if base - sum(saved[:count]) <= self.wanted]
        if not enough:
            most = counts[-1] if counts else 0
            least = self._words(base - sum(saved[:most]))
            raise UsageError(
                f"{self.requested} cannot be reached: {most} of {desk.constraints.depth} layers may go, "
                f"which leaves {least} of {self._words(base)}"
            )
        return enough

    def _size(self, weight: Weight) -> int:
        return weight.parameters if self.what == "parameters" else weight.nbytes

    def _words(self, size: float) -> str:
        return f"{size:,.0f} parameters" if self.what == "parameters" else in_words(size)
