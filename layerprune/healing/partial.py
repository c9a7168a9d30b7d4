"""Fine-tuning of a part of the weights: the head and the last layers, or the layers on either side of the cuts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from layerprune.healing.base import Case, Changed
from layerprune.healing.goals import NextToken
from layerprune.healing.places import head_weights, last_layers, layer_weights, seams
from layerprune.healing.trained import Trained, heal_weights, option
from layerprune.subject import Subject


@dataclass(frozen=True)
class Partial(Trained):
    """Fine-tune the last layers, the final norm and the head on the text; everything before them is only read."""

    layers: int = option(3, "how many of the last layers")
    head: bool = option(True, "the output embeddings too, where tied the input's with them, and the final norm")

    needs_base: ClassVar[bool] = False
    cost: ClassVar[str] = "a forward pass of everything and a backward pass of the part, over the text"
    source: ClassVar[str] = "Reassessing Layer Pruning in LLMs, arXiv:2411.15558"

    def heal(self, case: Case) -> Iterator[Changed]:
        def chosen(subject: Subject) -> set[str]:
            names = layer_weights(subject, last_layers(subject, self.layers))
            return names | head_weights(subject) if self.head else names

        yield from heal_weights(case, self, chosen, lambda subject: NextToken())


@dataclass(frozen=True)
class Seams(Trained):
    """Fine-tune, on the text, the layers on either side of every cut."""

    width: int = option(1, "how many layers on each side")

    needs_base: ClassVar[bool] = False
    cost: ClassVar[str] = "a forward pass of everything and a backward pass down to the first cut, over the text"
    source: ClassVar[str] = "layerprune"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.width < 1:
            raise ValueError(f"width is {self.width} and has to be at least 1")

    def heal(self, case: Case) -> Iterator[Changed]:
        def chosen(subject: Subject) -> set[str]:
            return layer_weights(subject, seams(case.removal, case.receipt.base.layers, self.width))

        yield from heal_weights(case, self, chosen, lambda subject: NextToken())
