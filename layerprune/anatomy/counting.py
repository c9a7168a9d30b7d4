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

from layerprune.anatomy import halves
from layerprune.anatomy.fields import PACKED
from layerprune.anatomy.sources import Sources

if TYPE_CHECKING:
    from torch import nn

Place = tuple[int, str]  # a layer and its half


@dataclass(frozen=True)
class Counts:
    """Elements of the tensors of a model, by where they are used."""

    outside: int  # of the stack
    packed: int  # outside the stack, with one slice per layer
    inside: Mapping[frozenset[Place], int]  # by the halves of layers that share them

    def after(self, sources: Sources) -> int:
        """Return the parameters of what is left."""
        left = {*((layer, "attention") for layer in sources.attention), *((layer, "mlp") for layer in sources.mlp)}
        inside = sum(size for places, size in self.inside.items() if places & left)
        return self.outside + self.packed // sources.depth * len(sources) + inside


def count(model: nn.Module, stack: str, *, by_half: bool) -> Counts:
    """Count the parameters of a model, on any device; ``by_half``: layers can be halved."""
    layers = list(model.get_submodule(stack).children())
    half = [halves.split(halves.weighted(layer)).half if by_half else {} for layer in layers]
    sizes, places, packed = {}, defaultdict(set), set()
    for name, weight in model.state_dict(keep_vars=True).items():
        sizes[id(weight)] = weight.numel()
        places[id(weight)].add(_place(name, stack, half))
        if name.endswith(tuple(PACKED)):
            packed.add(id(weight))
    inside: Counter[frozenset[Place]] = Counter()
    outside = 0
    for key, size in sizes.items():
        used = {place for place in places[key] if place is not None}
        if len(used) == len(places[key]):
            inside[frozenset(used)] += size
        elif key not in packed:
            outside += size
    return Counts(outside, sum(sizes[key] for key in packed), dict(inside))


def _place(name: str, stack: str, half: list[Mapping[str, str]]) -> Place | None:
    if not name.startswith(f"{stack}."):
        return None
    layer, _, rest = name[len(stack) + 1 :].partition(".")
    return int(layer), half[int(layer)].get(rest.partition(".")[0], "attention")
