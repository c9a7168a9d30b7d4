"""Angular distance: how far a whole block of neighbouring layers turns the hidden states."""

from __future__ import annotations

import math
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

    def score(self, subject: Subject, removals: Sequence[Removal], data: Data) -> list[Candidate]:
        """Read the texts once; the state after the last layer is taken before the final norm."""
        check_scope("angular", self.scope, removals)
        spans = [(removal.layers[0], removal.layers[-1]) for removal in removals]
        scores = compared_states(subject, data, spans, self.tokens, angle, "angular distance")
        return [Candidate(removal=removal.layers, score=score) for removal, score in zip(removals, scores, strict=True)]


def angle(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """Return the angle between each token's states as a share of pi; both (tokens, hidden), the result (tokens,).

    Computed from the unit vectors' sum and difference: arccos itself loses half the digits at small angles.
    """
    a, b = before / before.norm(dim=-1, keepdim=True), after / after.norm(dim=-1, keepdim=True)
    return 2 * torch.atan2((a - b).norm(dim=-1), (a + b).norm(dim=-1)) / math.pi
