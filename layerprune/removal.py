"""A set of decoder layers to remove, in the base model's own 0-based numbering, and the layers that are left."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from numbers import Integral

from layerprune.errors import UsageError

# What is taken out of a model: a set of layers of the decoder stack, in the base model's own 0-based numbering.


@dataclass(frozen=True)
class Removal:
    """A frozen set of layers, sorted; ``Removal(())`` is the intact model."""

    layers: tuple[int, ...]

    @classmethod
    def of(cls, *layers: int) -> Removal:
        """Build a removal from layers in any order; one that is named twice raises ``UsageError``."""
        return cls.from_layers(layers)

    @classmethod
    def from_layers(cls, layers: Iterable[int]) -> Removal:
        given = list(layers)
        for layer in given:
            if not isinstance(layer, Integral) or layer < 0:
                raise UsageError(f"{layer!r} is not a layer; layers are whole numbers, the first is 0")
        tidy = sorted(map(int, given))
        for layer, following in pairwise(tidy):
            if layer == following:
                raise UsageError(f"layer {layer} is named twice in {tidy}")
        return cls(tuple(tidy))

    def kept(self, depth: int) -> tuple[int, ...]:
        """Base indices of the layers that stay, of a stack of ``depth`` layers."""
        gone = set(self.layers)
        if gone and max(gone) >= depth:
            raise UsageError(f"layer {max(gone)} does not exist: the model has layers 0 to {depth - 1}")
        return tuple(layer for layer in range(depth) if layer not in gone)

    def add(self, *layers: int) -> Removal:
        """Return this removal with more layers in it."""
        return Removal.from_layers((*self.layers, *layers))

    def __len__(self) -> int:
        return len(self.layers)

    def __iter__(self) -> Iterator[int]:
        return iter(self.layers)

    def __contains__(self, layer: object) -> bool:
        return layer in self.layers

    def __str__(self) -> str:
        return "{" + ", ".join(str(layer) for layer in self.layers) + "}"


# Which base layer each layer of the pruned model comes from, and what that makes of the names of weights.


# Weights outside the stack that hold one slice per layer along an axis (Gemma 3n, Gemma 4): last names, axis.
PACKED = {"embed_tokens_per_layer.weight": 1, "per_layer_model_projection.weight": 0}


def packed_axis(name: str) -> int | None:
    """Return the axis along which a weight outside the stack holds one slice per layer; None for any other weight."""
    return next((axis for end, axis in PACKED.items() if name.endswith(end)), None)


def layer_of(name: str, stack: str) -> tuple[int, str] | None:
    """Return layer and rest of a weight ``<stack>.<layer>.<rest>``, None for any other; ``stack`` may be empty."""
    head = f"{stack}." if stack else ""
    index, _, rest = name.removeprefix(head).partition(".")
    return (int(index), rest) if name.startswith(head) and index.isdigit() and rest else None


@dataclass(frozen=True)
class LayerMap:
    """Layer j of the result is layer ``layers[j]`` of the base."""

    depth: int  # of the base
    layers: tuple[int, ...]

    @classmethod
    def after(cls, removal: Removal, depth: int) -> LayerMap:
        """Return what is left; raises ``UsageError`` for a layer that the stack does not have."""
        return cls(depth, removal.kept(depth))

    def __len__(self) -> int:
        return len(self.layers)

    def renamed(self, name: str, stack: str) -> str | None:
        """Return what a weight of the base is called in the result; None for one of a removed layer.

        What stands beside the stack, or behind its last layer, keeps its name.
        """
        place = layer_of(name, stack)
        if place is None or place[0] >= self.depth:
            return name
        layer, rest = place
        if layer not in self.layers:
            return None
        new = f"{self.layers.index(layer)}.{rest}"
        return f"{stack}.{new}" if stack else new
