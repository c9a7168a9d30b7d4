"""Baselines every comparison should show: no metric is worth its price that does not beat these."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from layerprune.documents import Candidate
from layerprune.metrics.base import Data, Needs, Scope, check_scope
from layerprune.removal import Removal
from layerprune.subject import Subject


@dataclass(frozen=True)
class Random:
    """A number drawn with the seed: what a ranking without any information gives."""

    unit: ClassVar[str] = "random"
    scope: ClassVar[Scope] = "any set"
    needs: ClassVar[Needs] = "nothing"
    cost: ClassVar[str] = "none"
    source: ClassVar[str] = "baseline"
    search: ClassVar[str] = "one-shot"

    def score(self, subject: Subject, removals: Sequence[Removal], data: Data) -> list[Candidate]:
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

    def score(self, subject: Subject, removals: Sequence[Removal], data: Data) -> list[Candidate]:
        """Score a layer by its distance from the end; the last layer, which shapes the output, scores highest."""
        check_scope("reverse-order", self.scope, removals)
        depth = len(subject.layers)
        return [
            Candidate(removal=removal.layers, score=float(depth if layer == depth - 1 else depth - 1 - layer))
            for removal in removals
            for layer in removal.layers
        ]
