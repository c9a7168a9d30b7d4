"""Perplexity: how much worse the model predicts the text itself, not the answers, when the layers are gone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from layerprune.documents import Candidate
from layerprune.engine.exam import not_finite
from layerprune.judgement import failures_last
from layerprune.metrics.base import Data, Needs, Scope
from layerprune.metrics.losses import INTACT, predicted_tokens, text_losses
from layerprune.metrics.reading import candidate
from layerprune.removal import Removal
from layerprune.stats import bootstrap_interval
from layerprune.subject import Subject


@dataclass(frozen=True)
class Perplexity:
    """Rise of the mean loss over all tokens of the text; e to its power is the factor by which perplexity grows."""

    unit: ClassVar[str] = "nats/token"
    scope: ClassVar[Scope] = "any set"
    needs: ClassVar[Needs] = "text"
    cost: ClassVar[str] = "one forward pass per removal, shared work computed once"
    source: ClassVar[str] = "SLEB, arXiv:2402.09025; Shortened LLaMA, arXiv:2402.02834"
    search: ClassVar[str] = "greedy"

    def score(self, subject: Subject, removals: Sequence[Removal], data: Data) -> list[Candidate]:
        """Read the texts intact and under each removal; the 95 % interval is a paired bootstrap over the texts."""
        texts = data.texts
        losses = text_losses(subject, texts, [INTACT, *removals], data, "perplexity")
        # Scaled so that the plain mean over the texts is the mean over the tokens.
        if not np.isfinite(losses[0]).all():
            raise not_finite(subject, "losses")
        rises = (losses[1:] - losses[0]) * (len(texts) / predicted_tokens(texts))  # (removals, texts)
        found = []
        for removal, own in zip(removals, rises, strict=True):
            interval = None  # a single text says nothing about others
            if len(own) > 1 and np.isfinite(own).all():
                low, high = bootstrap_interval([own], seed=data.seed)
                interval = (round(low, 6), round(high, 6))
            found.append(candidate(removal, float(own.mean()), interval))
        return failures_last(found)
