"""How many parameters a model has, and would have without some of its layers: those of the model in memory.

Counted are the tensors that the model reads from its files, buffers such as a router's correction among them, each once
however often it is used or stored (a tied head that is on disk, too, an expert that layers share), a quantised one as
what it stands for.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from layerprune.anatomy.fields import PACKED
from layerprune.anatomy.sources import Sources

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Counts:
    """Elements of the tensors of a model, by where they are used."""

    outside: int  # of the stack
    packed: int  # outside the stack, with one slice per layer
    inside: Mapping[frozenset[int], int]  # by the layers that share them

    def after(self, sources: Sources) -> int:
        """Return the parameters of what is left."""
        left = set(sources.layers)
        inside = sum(size for layers, size in self.inside.items() if layers & left)
        return self.outside + self.packed // sources.depth * len(sources) + inside


def count(model: nn.Module, stack: str) -> Counts:
    """Count the parameters of a model, on any device."""
    sizes, places, packed = {}, defaultdict(set), set()
    for name, weight in model.state_dict(keep_vars=True).items():
        sizes[id(weight)] = weight.numel()
        places[id(weight)].add(_layer(name, stack))
        if name.endswith(tuple(PACKED)):
            packed.add(id(weight))
    inside: Counter[frozenset[int]] = Counter()
    outside = 0
    for key, size in sizes.items():
        used = {place for place in places[key] if place is not None}
        if len(used) == len(places[key]):
            inside[frozenset(used)] += size
        elif key not in packed:
            outside += size
    return Counts(outside, sum(sizes[key] for key in packed), dict(inside))


def _layer(name: str, stack: str) -> int | None:
    return int(name[len(stack) + 1 :].partition(".")[0]) if name.startswith(f"{stack}.") else None
