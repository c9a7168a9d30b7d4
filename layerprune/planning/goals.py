"""How far a removal goes: a number of layers, a size, a speed, or as far as a loss can be ruled out."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from layerprune.documents import Certificate, Round, Target
from layerprune.errors import UsageError
from layerprune.planners import Found, parse_drop
from layerprune.planning.desk import Desk
from layerprune.planning.slices import Shares

# Share of the selection items that no search sees: the chosen removal is judged on them once, for the prediction.
HELD_BACK = 0.2


class Look(Protocol):
    """Searches for the removal of so many units that harms least; asked for more, it goes on from what it knows."""

    def __call__(self, drop: int) -> Found: ...


@dataclass(frozen=True)
class Reached:
    """Where a goal led."""

    found: Found
    rounds: tuple[Round, ...]  # everything that was judged on the way
    target: Target | None = None
    certificate: Certificate | None = None


class Goal(Protocol):
    """How far to go, as it was asked."""

    @property
    def requested(self) -> str:
        """What was asked, as the plan records it."""
        ...

    @property
    def shares(self) -> Shares:
        """How the selection items are divided."""
        ...

    def require(self, desk: Desk) -> None:
        """Raise ``UsageError`` when the model cannot get there, before anything slow; the items are not there yet."""
        ...

    def most(self, desk: Desk) -> int:
        """Return the most layers that may have to go, for what the search costs at most."""
        ...

    def pursue(self, desk: Desk, look: Look) -> Reached:
        """Search until it is reached."""
        ...


def counts_up_to(desk: Desk, up_to: str | None, requested: str) -> list[int]:
    """Return every number of units that may go, up to ``--up-to``; raises ``UsageError`` when there is none."""
    depth = desk.constraints.depth
    most = depth if up_to is None else parse_drop(up_to, depth, "--up-to")
    within = [count for count in desk.constraints.counts() if count <= most]
    if not within:
        what = f"no {most} layers or fewer" if up_to is not None else f"none of the {depth} layers"
        raise UsageError(f"{requested} cannot begin: {what} may go")
    return within


@dataclass(frozen=True)
class Drop:
    """A count or a share of the layers."""

    requested: str
    shares: Shares = field(default=Shares(HELD_BACK), init=False)

    def require(self, desk: Desk) -> None:
        desk.constraints.require(self.most(desk))

    def pursue(self, desk: Desk, look: Look) -> Reached:
        found = look(self.most(desk))
        return Reached(found, found.rounds)

    def most(self, desk: Desk) -> int:
        return parse_drop(self.requested, desk.constraints.depth)
