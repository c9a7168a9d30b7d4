"""The examples that stand before every question of a few-shot task: read once, and looked back at by all of them.

What a layer computes of a shared beginning depends on the layers removed below it and on nothing that follows. So the
keys and values of the beginning are kept for every layer and every set of removals that reaches it, and the questions
then run without it, as if it had been read before.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import Cache

Tensor = torch.Tensor


class SharedBeginning(Cache):  # type: ignore[misc]  # transformers carries no types
    """Keys and values of one beginning, by what is removed below a layer. First written by one row, then read by many.

    Layers see an ordinary transformers cache. ``key``, set by the walk before it runs a layer, says what is removed
    below it. Keys and values are (rows, heads, tokens, head size), one row while writing.
    """

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.key: frozenset[int] = frozenset()
        self.kept: dict[tuple[frozenset[int], int], tuple[Tensor, Tensor]] = {}
        self.tokens: tuple[int, ...] = ()  # none while it is being written

    @property
    def length(self) -> int:
        """How many tokens it has; 0 while it is being written."""
        return len(self.tokens)

    def sizes(self, depth: int) -> list[int]:
        """Return the bytes that are kept in each layer."""
        found = [0] * depth
        for (_, layer), pair in self.kept.items():
            found[layer] += sum(part.numel() * part.element_size() for part in pair)
        return found

    def close(self, tokens: tuple[int, ...]) -> None:
        """Let the beginning, now complete, be read."""
        self.tokens = tokens

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if not self.length:
            self.kept[self.key, layer_idx] = key_states, value_states
            return key_states, value_states
        rows = key_states.shape[0]
        keys, values = (part.expand(rows, -1, -1, -1) for part in self.kept[self.key, layer_idx])
        return torch.cat([keys, key_states], dim=-2), torch.cat([values, value_states], dim=-2)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.length

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.length + query_length, 0
