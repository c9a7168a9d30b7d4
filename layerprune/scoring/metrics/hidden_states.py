"""Metrics from hidden states: cosine score, angular distance, relative update."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from layerprune.artifacts import Candidate
from layerprune.models.model import LoadedModel
from layerprune.removal import Removal
from layerprune.scoring.metrics.base import Data, Needs, Scope, Tokens, check_scope, compared_states

# Cosine score: how little a layer turns its input. The cheap baseline that everyone uses.


@dataclass(frozen=True)
class Cosine:
    """1 - cos(layer input, layer output), mean over tokens: how much the layer turns the hidden states."""

    tokens: Tokens = field(
        default="all", metadata={"help": "average over all tokens of each text, or take its last token only"}
    )

    unit: ClassVar[str] = "1-cos"
    scope: ClassVar[Scope] = "single layers"
    needs: ClassVar[Needs] = "text"
    cost: ClassVar[str] = "one forward pass over the text for all layers"
    source: ClassVar[str] = "ShortGPT, arXiv:2403.03853"
    search: ClassVar[str] = "one-shot"

    def score(self, loaded: LoadedModel, removals: Sequence[Removal], data: Data) -> list[Candidate]:
        """Read the texts once; states are taken before the final norm, padding is not counted."""
        check_scope("cosine", self.scope, removals)
        spans = [(removal.layers[0], removal.layers[0]) for removal in removals]
        scores = compared_states(loaded, data, spans, self.tokens, turned, "cosine")
        return [Candidate(removal=removal.layers, score=score) for removal, score in zip(removals, scores, strict=True)]


def turned(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """Return 1 - cos of each token's states; both (tokens, hidden), the result (tokens,)."""
    return 1 - torch.cosine_similarity(before, after, dim=-1)


# Angular distance: how far a whole block of neighbouring layers turns the hidden states.


@dataclass(frozen=True)
class Angular:
    """arccos(cos(block input, block output)) / pi, mean over texts: 0 the same direction, 1 the opposite one."""

    tokens: Tokens = field(
        default="last", metadata={"help": "take the last token of each text, as the paper does, or average over all"}
    )

    unit: ClassVar[str] = "angle/pi"
    scope: ClassVar[Scope] = "contiguous blocks"
    needs: ClassVar[Needs] = "text"
    cost: ClassVar[str] = "one forward pass over the text for all blocks"
    source: ClassVar[str] = "arXiv:2403.17887"
    search: ClassVar[str] = "blocks"

    def score(self, loaded: LoadedModel, removals: Sequence[Removal], data: Data) -> list[Candidate]:
        """Read the texts once; the state after the last layer is taken before the final norm."""
        check_scope("angular", self.scope, removals)
        spans = [(removal.layers[0], removal.layers[-1]) for removal in removals]
        scores = compared_states(loaded, data, spans, self.tokens, angle, "angular distance")
        return [Candidate(removal=removal.layers, score=score) for removal, score in zip(removals, scores, strict=True)]


def angle(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """Return the angle between each token's states as a share of pi; both (tokens, hidden), the result (tokens,).

    Computed from the unit vectors' sum and difference: arccos itself loses half the digits at small angles.
    """
    a, b = before / before.norm(dim=-1, keepdim=True), after / after.norm(dim=-1, keepdim=True)
    return 2 * torch.atan2((a - b).norm(dim=-1), (a + b).norm(dim=-1)) / math.pi


# Relative update: how much a layer adds to the stream, measured against the stream.


@dataclass(frozen=True)
class Relative:
    """|layer output - layer input| / |layer input|, mean over tokens: the size of the layer's update of the stream."""

    tokens: Tokens = field(
        default="all", metadata={"help": "average over all tokens of each text, or take its last token only"}
    )

    unit: ClassVar[str] = "update/stream"
    scope: ClassVar[Scope] = "single layers"
    needs: ClassVar[Needs] = "text"
    cost: ClassVar[str] = "one forward pass over the text for all layers"
    source: ClassVar[str] = "arXiv:2505.13898"
    search: ClassVar[str] = "one-shot"

    def score(self, loaded: LoadedModel, removals: Sequence[Removal], data: Data) -> list[Candidate]:
        """Read the texts once; states are taken before the final norm, padding is not counted."""
        check_scope("relative", self.scope, removals)
        spans = [(removal.layers[0], removal.layers[0]) for removal in removals]
        scores = compared_states(loaded, data, spans, self.tokens, moved, "relative update")
        return [Candidate(removal=removal.layers, score=score) for removal, score in zip(removals, scores, strict=True)]


def moved(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """Return the norm of each token's update over that of its state; both (tokens, hidden), the result (tokens,)."""
    return (after - before).norm(dim=-1) / before.norm(dim=-1)
