"""Output distance: how far the model's predictions move when the layers are gone, whatever the right answer is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch

from layerprune.documents import Candidate
from layerprune.engine.engine import MEMORY
from layerprune.engine.exam import not_finite
from layerprune.judgement import failures_last
from layerprune.metrics.base import Data, Needs, Scope
from layerprune.metrics.reading import Tokens, candidate, read
from layerprune.removal import Removal
from layerprune.subject import Subject

Distance = Literal["kl", "cosine", "l2"]

# Logits of one batch may take this much in float32, and with --memory its part: so many tensors of their size are alive
# at once (the intact model's and the smaller one's as they come and in float32, both log-softmaxes and what is made of
# them).
LOGIT_BYTES = 256 * 1024**2
LOGIT_TENSORS = 8


@dataclass(frozen=True)
class Output:
    """Distance between the predictions of the intact and the smaller model, mean over tokens."""

    by: Distance = field(
        default="kl",
        metadata={"help": "KL(intact || smaller) in nats, 1 - cosine of the logits, or their Euclidean distance"},
    )
    tokens: Tokens = field(
        default="all", metadata={"help": "average over all tokens of each text, or take its last token only"}
    )

    unit: ClassVar[str] = "distance"
    scope: ClassVar[Scope] = "any set"
    needs: ClassVar[Needs] = "text"
    cost: ClassVar[str] = "one forward pass per removal"
    source: ClassVar[str] = "EvoPress, arXiv:2410.14649; FinerCut, arXiv:2405.18218"
    search: ClassVar[str] = "greedy"

    def score(self, subject: Subject, removals: Sequence[Removal], data: Data) -> list[Candidate]:
        """Run every batch intact and under each removal; logits are compared in float32."""
        most = min(LOGIT_BYTES, (data.memory or MEMORY) // LOGIT_TENSORS)
        budget = max(1, most // (4 * subject.vocabulary))
        sums, count = [0.0] * len(removals), 0
        for batch in read(subject, data, "output distance", budget):
            wanted = batch.places(self.tokens)
            count += int(wanted.sum())
            intact = _logits(subject, Removal(()), batch.ids, wanted)
            if not bool(intact.isfinite().all()):
                raise not_finite(subject, "logits")
            for number, removal in enumerate(removals):
                own = _logits(subject, removal, batch.ids, wanted)
                sums[number] += float(distance(self.by, intact, own).double().sum())
        return failures_last(
            [candidate(removal, total / count) for removal, total in zip(removals, sums, strict=True)]
        )


@torch.no_grad()
def _logits(subject: Subject, removal: Removal, ids: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Return the logits at the wanted places, (tokens, vocabulary), float32."""
    with subject.without(removal) as model:
        logits = model(input_ids=ids, use_cache=False).logits
    return logits[wanted.to(logits.device)].float()


def distance(by: Distance, intact: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """Return each token's distance; both (tokens, vocabulary) logits, the result (tokens,)."""
    if by == "l2":
        return (own - intact).norm(dim=-1)
    if by == "cosine":
        return 1 - torch.cosine_similarity(intact, own, dim=-1)
    p, q = intact.log_softmax(-1), own.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)
