"""Which base layer each layer of the pruned model comes from."""

from __future__ import annotations

from dataclasses import dataclass

from layerprune.removal import Removal


@dataclass(frozen=True)
class Sources:
    """Layer j of the result is layer ``layers[j]`` of the base."""

    depth: int  # of the base
    layers: tuple[int, ...]

    @classmethod
    def after(cls, removal: Removal, depth: int) -> Sources:
        """Return what is left; raises ``UsageError`` for a layer that the stack does not have."""
        return cls(depth, removal.kept(depth))

    def __len__(self) -> int:
        return len(self.layers)
