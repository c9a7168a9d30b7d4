"""Perplexity: how much worse the model predicts the text itself, not the answers, when the layers are gone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from layerprune.documents import Candidate
from layerprune.metrics.base import Data, Needs, Scope
from layerprune.metrics.losses import INTACT, predicted_tokens, text_losses
from layerprune.metrics.reading import finite
from layerprune.removal import Removal
from layerprune.stats import bootstrap_interval
from layerprune.subject import Subject


@dataclass(frozen=True)
class Perplexity:
    """Rise of the mean loss over all tokens of the text; e to its power is the factor by which perplexity grows."""

    unit: ClassVar[str] = "nats/token"
    scope: ClassVar[Scope] = "any set"
    runs_without: ClassVar[bool] = True
    needs: ClassVar[Needs] = "text"
    cost: ClassVar[str] = "one forward pass per removal, shared work computed once"
    source: ClassVar[str] = "SLEB, arXiv:2402.09025; Shortened LLaMA, arXiv:2402.02834"
    search: ClassVar[str] = "greedy"

    def score(self, subject: Subject, removals: Sequence[Removal], data: Data) -> list[Candidate]:
        """Read the texts intact and under each removal; the 95 % interval is a paired bootstrap over the texts."""
        texts = data.texts
        losses = text_losses(subject, texts, [INTACT, *removals], data, "perplexity")
        # Scaled so that the plain mean over the texts is the mean over the tokens.
        rises = (losses[1:] - losses[0]) * (len(texts) / predicted_tokens(texts))  # (removals, texts)
        found = []
        for removal, own in zip(removals, rises, strict=True):
            score = finite(float(own.mean()), "the loss without", removal)
            interval = None  # a single text says nothing about others
            if len(own) > 1:
                low, high = bootstrap_interval([own], seed=data.seed)
                interval = (round(low, 6), round(high, 6))
            found.append(Candidate(removal=removal.units, score=score, interval=interval))
        return found
