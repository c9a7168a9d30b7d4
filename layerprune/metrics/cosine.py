"""Cosine score: how little a layer turns its input. The cheap baseline that everyone uses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from layerprune.documents import Candidate
from layerprune.metrics.base import Data, Needs, Scope, check_scope
from layerprune.metrics.reading import Tokens, compared_states
from layerprune.removal import Removal
from layerprune.subject import Subject


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

    def score(self, subject: Subject, removals: Sequence[Removal], data: Data) -> list[Candidate]:
        """Read the texts once; states are taken before the final norm, padding is not counted."""
        check_scope("cosine", self.scope, removals)
        spans = [(removal.layers[0], removal.layers[0]) for removal in removals]
        scores = compared_states(subject, data, spans, self.tokens, turned, "cosine")
        return [Candidate(removal=removal.layers, score=score) for removal, score in zip(removals, scores, strict=True)]


def turned(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """Return 1 - cos of each token's states; both (tokens, hidden), the result (tokens,)."""
    return 1 - torch.cosine_similarity(before, after, dim=-1)
