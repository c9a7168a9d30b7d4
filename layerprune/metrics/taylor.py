"""Taylor scores: the first-order guess of what a layer's removal costs, for all layers from one backward pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch

from layerprune.documents import Candidate
from layerprune.engine.walk import replaced_forwards, split_hidden
from layerprune.errors import ModelError
from layerprune.metrics.base import Data, Needs, Scope
from layerprune.metrics.losses import predicted_tokens
from layerprune.metrics.reading import Batch, finite, read
from layerprune.removal import Removal
from layerprune.subject import Subject

# Tokens whose activations are kept for a backward pass; they take some 30 times the memory of a forward alone.
BATCH_TOKENS = 1024


@dataclass(frozen=True)
class Taylor:
    """What the loss on the text rises by, to first order, as the layers fade out; of a set: the sum over its layers."""

    of: Literal["update", "weights"] = field(
        default="update",
        metadata={
            "help": "fade the layer's update of the stream (signed), or each of its weights (sum of absolute values)"
        },
    )

    unit: ClassVar[str] = "nats/token, first order"
    scope: ClassVar[Scope] = "any set"
    needs: ClassVar[Needs] = "text"
    cost: ClassVar[str] = "one forward and one backward pass over the text for all layers"
    source: ClassVar[str] = "Shortened LLaMA, arXiv:2402.02834 (of=weights)"
    search: ClassVar[str] = "one-shot"

    def score(self, subject: Subject, removals: Sequence[Removal], data: Data) -> list[Candidate]:
        """Read the texts once, forward and backward, and add up the layers of each removal."""
        asked_about = [removal.layers for removal in removals]
        values = update_slopes(subject, data) if self.of == "update" else weight_slopes(subject, data)
        return [
            Candidate(
                removal=removal.layers,
                score=finite(sum(values[layer] for layer in layers), "the Taylor score of", removal),
            )
            for removal, layers in zip(removals, asked_about, strict=True)
        ]


def update_slopes(subject: Subject, data: Data) -> list[float]:
    """Return per layer -dL/da, nats/token, where the layer's update of the stream is scaled by 1 + a, at a = 0.

    L is the mean loss per predicted token. Taking a to -1 is skipping the layer: the slope is the guess of its cost.
    """
    depth = len(subject.layers)
    totals = torch.zeros(depth, dtype=torch.float64)
    scales = [torch.zeros((), device=subject.device, requires_grad=True) for _ in range(depth)]

    def make(index: int, original: Any) -> Any:
        def forward(*args: Any, **kwargs: Any) -> Any:
            before = split_hidden(args, kwargs)[0].clone()  # a layer may write to its input
            output = original(*args, **kwargs)
            after = output[0] if isinstance(output, tuple) else output
            scaled = after + scales[index].to(after) * (after - before.to(after))
            return (scaled, *output[1:]) if isinstance(output, tuple) else scaled

        return forward

    for batch in read(subject, data, "Taylor", BATCH_TOKENS):
        with torch.enable_grad(), replaced_forwards(subject.layers, make):
            slopes = torch.autograd.grad(summed_loss(subject, batch), scales)
        totals -= torch.stack([slope.double().cpu() for slope in slopes])
    return [float(value) for value in totals / predicted_tokens(data.texts)]


def weight_slopes(subject: Subject, data: Data) -> list[float]:
    """Return per layer the sum over its weights of |w dL/dw|, nats/token; L is the mean loss per predicted token."""
    weights = [[w for w in layer.parameters() if w.dim() >= 2] for layer in subject.layers]
    flat = [weight for own in weights for weight in own]
    if not flat or not all(weight.is_floating_point() for weight in flat):
        raise ModelError("the layers hold packed (quantised) weights: taylor:of=weights needs them as plain numbers")
    learned = [weight.requires_grad for weight in flat]
    sums = [torch.zeros_like(weight, dtype=torch.float32) for weight in flat]
    try:
        for weight in flat:
            weight.requires_grad_(True)
        for batch in read(subject, data, "Taylor", BATCH_TOKENS):
            with torch.enable_grad():  # weights that this text never reached (experts) have no slope
                slopes = torch.autograd.grad(summed_loss(subject, batch), flat, allow_unused=True)
            for total, slope in zip(sums, slopes, strict=True):
                if slope is not None:
                    total += slope
    finally:
        for weight, before in zip(flat, learned, strict=True):
            weight.requires_grad_(before)
    products = iter([float((w.detach().double() * s).abs().sum()) for w, s in zip(flat, sums, strict=True)])
    return [sum(next(products) for _ in own) / predicted_tokens(data.texts) for own in weights]


def summed_loss(subject: Subject, batch: Batch) -> torch.Tensor:
    """Return the loss of a batch in nats, summed over every token of the texts but their first."""
    logits = subject.model(input_ids=batch.ids, use_cache=False).logits[:, :-1]
    asked = batch.ids[:, 1:].to(logits.device)
    wanted = batch.places("all")[:, 1:].to(logits.device)
    return torch.nn.functional.cross_entropy(logits[wanted].float(), asked[wanted], reduction="sum")
