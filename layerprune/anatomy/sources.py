"""Which base layer each layer of the pruned model comes from, attention and MLP told apart."""

from __future__ import annotations

from dataclasses import dataclass

from layerprune.errors import UsageError
from layerprune.removal import Removal


@dataclass(frozen=True)
class Sources:
    """Layer j of the result has the attention of base layer ``attention[j]`` and the MLP of base layer ``mlp[j]``."""

    depth: int  # of the base
    attention: tuple[int, ...]
    mlp: tuple[int, ...]

    @classmethod
    def after(cls, removal: Removal, depth: int) -> Sources:
        """Return what is left of A0 M0 A1 M1 ...; raises ``UsageError`` for a unit that the stack does not have."""
        gone = removal.sublayers
        if gone and max(gone) >= 2 * depth:
            last = max(removal.units)
            raise UsageError(f"layer {last} does not exist: the model has layers 0 to {depth - 1}")
        left = [sublayer for sublayer in range(2 * depth) if sublayer not in gone]
        return cls(depth, tuple(s // 2 for s in left[0::2]), tuple(s // 2 for s in left[1::2]))

    @property
    def whole(self) -> bool:
        """Whether every layer of the result is one layer of the base."""
        return self.attention == self.mlp

    def __len__(self) -> int:
        return len(self.attention)

    def of(self, half: str) -> tuple[int, ...]:
        """Return the sources of one half: ``"attention"`` or ``"mlp"``."""
        return self.attention if half == "attention" else self.mlp
