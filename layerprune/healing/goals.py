"""What a student is trained towards: the text itself, here; what the intact base says of it, in ``teacher``."""

from __future__ import annotations

from typing import Protocol

import torch

from layerprune.healing.grading import cross_entropy
from layerprune.healing.head import Grade

Tensor = torch.Tensor


class Goal(Protocol):
    """Grades the student's logits, window batch by window batch."""

    @property
    def key(self) -> str:
        """Its settings in words; runs with different ones are different runs."""
        ...

    def prepare(self, rows: Tensor, ids: Tensor, wanted: Tensor, labels: Tensor) -> Grade:
        """Get ready for a batch and return what grades its logits.

        ``rows`` (windows,) are the windows' numbers, ``ids`` (windows, tokens), ``wanted`` (windows, tokens - 1) says
        at which places the next token counts, ``labels`` (places,) are those next tokens.
        """
        ...

    def beside(self, wanted: Tensor) -> Tensor:
        """Return what is added to the loss once the student has read the batch, summed over its places."""
        ...


class NextToken:
    """Plain language modelling: minus the log-probability of the text."""

    key = "next token"

    def prepare(self, rows: Tensor, ids: Tensor, wanted: Tensor, labels: Tensor) -> Grade:
        return lambda logits, piece: cross_entropy(own(logits), labels[piece])

    def beside(self, wanted: Tensor) -> Tensor:
        return torch.zeros((), device=wanted.device)


def own(logits: Tensor) -> Tensor:
    """Return float32 logits that may be overwritten."""
    return logits.clone() if logits.dtype == torch.float32 else logits.float()
