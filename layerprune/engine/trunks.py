"""The intact model's hidden states of batches seen before: what later rounds of a search need not compute again.

A greedy search asks about the same items round after round, and below its first removed layer every removal still has
the intact model's states. They are kept, batch by batch and layer by layer from the bottom, as far as the memory goes.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from layerprune.engine.walk import State


@dataclass
class Trunk:
    """One batch's states: ``states[j]`` leaves layer j."""

    owner: Trunks
    states: list[State] = field(default_factory=list)

    def at(self, layer: int) -> State | None:
        """Return what leaves ``layer``, where it is known."""
        return self.states[layer] if layer < len(self.states) else None

    def keep(self, layer: int, state: State) -> None:
        """Remember what leaves ``layer``; no gaps are left, and nothing is kept beyond the memory."""
        if layer != len(self.states):
            return
        own, known = state.storages(), self.states[-1].storages() if self.states else {}
        if self.owner.take(sum(size for place, size in own.items() if place not in known)):
            self.states.append(state)


@dataclass
class Trunks:
    """All batches' states, up to ``most`` bytes."""

    most: int
    used: int = 0
    by_batch: dict[str, Trunk] = field(default_factory=dict)

    def of(self, inputs: dict[str, Any], beginning: tuple[int, ...]) -> Trunk:
        """Return the trunk of a batch; ``inputs`` and the tokens before them tell batches apart."""
        digest = hashlib.sha256(repr(beginning).encode())
        for name in sorted(inputs):
            digest.update(_bytes(inputs[name]))
        return self.by_batch.setdefault(digest.hexdigest(), Trunk(self))

    def take(self, size: int) -> bool:
        """Make room for so many bytes, if there is any."""
        if self.used + size > self.most:
            return False
        self.used += size
        return True


def _bytes(value: Any) -> bytes:
    if isinstance(value, dict):
        return b"".join(_bytes(value[name]) for name in sorted(value))
    return repr(tuple(value.shape)).encode() + value.cpu().contiguous().view(torch.uint8).numpy().tobytes()
