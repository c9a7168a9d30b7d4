"""Metrics that read no text: weight magnitude, and the baselines every comparison should show."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import nn

from layerprune.artifacts import Candidate
from layerprune.errors import ModelError
from layerprune.models.model import LoadedModel
from layerprune.removal import Removal
from layerprune.scoring.metrics.base import Data, Needs, Scope, check_scope, finite

# Weight magnitude: layers with small weights go first. Needs no data and knows nothing about them.


@dataclass(frozen=True)
class Magnitude:
    """Norm of all weight matrices of the removed layers together (biases and norm weights left out)."""

    norm: Literal["l1", "l2"] = field(
        default="l1", metadata={"help": "sum of absolute values, or root of the sum of squares"}
    )

    unit: ClassVar[str] = "weight norm"
    scope: ClassVar[Scope] = "any set"
    needs: ClassVar[Needs] = "nothing"
    cost: ClassVar[str] = "none"
    source: ClassVar[str] = "Shortened LLaMA, arXiv:2402.02834"
    search: ClassVar[str] = "one-shot"

    def score(self, loaded: LoadedModel, removals: Sequence[Removal], data: Data) -> list[Candidate]:
        """Add up the weights of every layer asked about once; raises ``ModelError`` where they are not numbers."""
        power = 1 if self.norm == "l1" else 2
        sums = {i: power_sum(loaded.layers[i], power) for i in {i for removal in removals for i in removal.layers}}
        scores = [sum(sums[i] for i in removal.layers) ** (1 / power) for removal in removals]
        return [
            Candidate(removal=removal.layers, score=finite(score, "magnitude", removal))
            for removal, score in zip(removals, scores, strict=True)
        ]


@torch.no_grad()
def power_sum(layer: nn.Module, power: int) -> float:
    """Return the sum over all entries of a layer's weight matrices of |entry| ** power, in float64."""
    matrices = [weight for weight in layer.parameters() if weight.dim() >= 2]
    if not matrices or not all(weight.is_floating_point() for weight in matrices):
        raise ModelError("the layers hold packed (quantised) weights: magnitude needs them as plain numbers")
    return sum(float(weight.double().abs().pow(power).sum()) for weight in matrices)


# Baselines every comparison should show: no metric is worth its price that does not beat these.


@dataclass(frozen=True)
class Random:
    """A number drawn with the seed: what a ranking without any information gives."""

    unit: ClassVar[str] = "random"
    scope: ClassVar[Scope] = "any set"
    needs: ClassVar[Needs] = "nothing"
    cost: ClassVar[str] = "none"
    source: ClassVar[str] = "baseline"
    search: ClassVar[str] = "one-shot"

    def score(self, loaded: LoadedModel, removals: Sequence[Removal], data: Data) -> list[Candidate]:
        """Draw one number for each removal; it depends on the seed and the removal only."""
        return [
            Candidate(removal=removal.layers, score=round(random.Random(f"{data.seed}:{removal}").random(), 6))
            for removal in removals
        ]


@dataclass(frozen=True)
class ReverseOrder:
    """Layers from the end first, the last one kept: how deep the layer lies, counted from the end."""

    unit: ClassVar[str] = "layers from the end"
    scope: ClassVar[Scope] = "single layers"
    needs: ClassVar[Needs] = "nothing"
    cost: ClassVar[str] = "none"
    source: ClassVar[str] = "baseline"
    search: ClassVar[str] = "one-shot"

    def score(self, loaded: LoadedModel, removals: Sequence[Removal], data: Data) -> list[Candidate]:
        """Score a layer by its distance from the end; the last layer, which shapes the output, scores highest."""
        check_scope("reverse-order", self.scope, removals)
        depth = len(loaded.layers)
        return [
            Candidate(removal=removal.layers, score=float(depth if layer == depth - 1 else depth - 1 - layer))
            for removal in removals
            for layer in removal.layers
        ]
