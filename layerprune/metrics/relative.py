"""Relative update: how much a layer adds to the stream, measured against the stream."""

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

    def score(self, subject: Subject, removals: Sequence[Removal], data: Data) -> list[Candidate]:
        """Read the texts once; states are taken before the final norm, padding is not counted."""
        check_scope("relative", self.scope, removals)
        spans = [(removal.layers[0], removal.layers[0]) for removal in removals]
        scores = compared_states(subject, data, spans, self.tokens, moved, "relative update")
        return [Candidate(removal=removal.layers, score=score) for removal, score in zip(removals, scores, strict=True)]


def moved(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """Return the norm of each token's update over that of its state; both (tokens, hidden), the result (tokens,)."""
    return (after - before).norm(dim=-1) / before.norm(dim=-1)
