"""A set of decoder layers to remove, in the base model's own 0-based numbering: what is left, and how it is written."""

from __future__ import annotations

import math
import re
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
    return (int(index), rest) if name.startswith(head) and index.isdecimal() and rest else None


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


# What "drop 25%" and "protect 0-3,-1" mean for a stack of a given depth.


def check_drop(text: str, option: str = "--drop") -> None:
    """Raise ``UsageError`` for what would make no sense on any model; the rest is seen when its depth is known."""
    number, is_share = _count_or_share(text, option)
    if not (0 < number < 100 if is_share else number >= 1):
        raise UsageError(f"{option} {text}: at least one layer goes and one stays; write 6 or 25%")


def parse_drop(text: str, depth: int, option: str = "--drop") -> int:
    """Return how many of ``depth`` layers ``"6"`` or ``"25%"`` means; a share is rounded to the nearest, at least 1."""
    number, is_share = _count_or_share(text, option)
    if is_share and not 0 < number < math.inf:
        raise _neither(text, option)
    count = max(1, math.floor(depth * number / 100 + 0.5)) if is_share else int(number)
    if count < 1 or count >= depth:
        what = f" ({count} layers)" if is_share else ""
        allowed = f"the model has {depth} layers; between 1 and {depth - 1} can be removed"
        raise UsageError(f"{option} {text}{what}: {allowed}")
    return count


def _count_or_share(text: str, option: str) -> tuple[int | float, bool]:
    """Return the number that is written, and whether it is one of per cent."""
    given = text.strip()
    try:
        return (float(given[:-1]), True) if given.endswith("%") else (int(given), False)
    except ValueError:
        raise _neither(text, option) from None


def _neither(text: str, option: str) -> UsageError:
    return UsageError(f"{option} {text!r} is neither a count nor a share; write 6 or 25%")


def parse_layers(text: str | None, depth: int, option: str = "--protect") -> frozenset[int]:
    """Return the layers that ``"0-3,-1"`` names: numbers, from the end where negative, and ranges with both ends."""
    layers: set[int] = set()
    for part in (text or "").split(","):
        if not part.strip():
            continue
        found = re.fullmatch(r"\s*(-?\d{1,9})\s*(?:-\s*(\d{1,9})\s*)?", part)
        if found is None:
            raise UsageError(f"{option} {text!r}: {part.strip()!r} is not a layer number or a range; write 0-3,-1")
        first, last = int(found[1]), int(found[2] or found[1])
        for layer in (first, last):
            if not -depth <= layer < depth:
                raise UsageError(
                    f"{option} {text!r}: layer {layer} does not exist; the model has layers 0 to {depth - 1}"
                )
        if first > last or (first < 0 and found[2]):
            raise UsageError(f"{option} {text!r}: a range goes up and counts from the start, such as 0-3")
        layers.update(layer % depth for layer in range(first, last + 1))
    return frozenset(layers)
