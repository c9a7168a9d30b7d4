"""As far as a path goes: the goal behind a front, whose steps are the path's beginnings."""

from __future__ import annotations

from dataclasses import dataclass

from layerprune.errors import UsageError
from layerprune.planning.desk import Desk
from layerprune.planning.goals import HELD_BACK, Look, Reached, counts_up_to
from layerprune.planning.slices import Shares

FAR = "75%"  # of the layers, when --up-to does not say otherwise: beyond, nothing is left to trade


@dataclass(frozen=True)
class Farthest:
    """The removal of ``up_to`` layers, or of as many as may go where that is fewer."""

    up_to: str = FAR

    @property
    def requested(self) -> str:
        return f"--front --up-to {self.up_to}"

    @property
    def shares(self) -> Shares:
        return Shares(HELD_BACK, examined=True)

    def require(self, desk: Desk) -> None:
        if not desk.request.tasks:
            raise UsageError("a front shows accuracy: give tasks, such as --tasks arc_easy")
        counts_up_to(desk, self.up_to, self.requested)

    def pursue(self, desk: Desk, look: Look) -> Reached:
        found = look(self.most(desk))
        return Reached(found, found.rounds)

    def most(self, desk: Desk) -> int:
        return counts_up_to(desk, self.up_to, self.requested)[-1]
