"""Which byte ranges of the base make up the pruned checkpoint, and under which names. Works on the names on disk.

The names on disk differ from those in memory for a third of all types (experts fused on loading, other prefixes), so
the stack is looked for in the file's own names.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from layerprune.anatomy import Sources
from layerprune.anatomy.fields import PACKED
from layerprune.checkpoint import Checkpoint, Tensor
from layerprune.checkpoint.writer import Part
from layerprune.documents import DroppedHeads
from layerprune.errors import RefusedError

# Top-level names of multi-token-prediction heads that stand outside the stack (Qwen3-Next, MiMo, Nemotron-H).
MTP_HEAD = re.compile(r"^(model\.)?mtp(\.|_)")
NUMBERED = re.compile(r"(?<![^.])(\d+)(?=\.)")


@dataclass(frozen=True)
class DiskStack:
    """The decoder stack as the files name it: ``<prefix>.<layer>.<rest>``; the prefix may be empty."""

    prefix: str
    depth: int

    def split(self, name: str) -> tuple[int, str] | None:
        """Return layer and rest of a tensor of the stack, None for any other tensor."""
        head = f"{self.prefix}." if self.prefix else ""
        if not name.startswith(head):
            return None
        index, _, rest = name[len(head) :].partition(".")
        return (int(index), rest) if index.isdigit() and rest else None

    def name(self, layer: int, rest: str) -> str:
        return f"{self.prefix}.{layer}.{rest}" if self.prefix else f"{layer}.{rest}"


@dataclass(frozen=True)
class WeightPlan:
    """What to write, in the order of the base's files, and what is left out."""

    parts: tuple[Part, ...]
    dropped: tuple[str, ...]
    origin: Mapping[str, str]  # new name -> base name
    heads: DroppedHeads | None = None  # multi-token-prediction heads among what is dropped


@dataclass(frozen=True)
class Weight:
    """The size of a checkpoint."""

    parameters: int  # of the model in memory, see anatomy.counting
    nbytes: int  # of tensor data in the files
    heads: DroppedHeads | None = None  # multi-token-prediction heads that export leaves out


def find_disk_stack(checkpoint: Checkpoint, stack: str, sizes: Sequence[int]) -> DiskStack:
    """Find the stack among the names on disk.

    ``stack`` is its path in memory and ``sizes`` the elements of each layer in memory. Candidates are all prefixes
    followed by the numbers 0 to depth - 1; the one whose layers have the right sizes and whose path ends like the one
    in memory is taken. Raises ``RefusedError`` when there is none, or two are equally likely.
    """
    depth = len(sizes)
    found: dict[str, dict[int, int]] = defaultdict(lambda: defaultdict(int))
    for tensor in checkpoint.tensors.values():
        for match in NUMBERED.finditer(tensor.name):
            found[tensor.name[: match.start()].removesuffix(".")][int(match[1])] += tensor.elements
    complete = {prefix: layers for prefix, layers in found.items() if set(range(depth)) <= set(layers)}
    ranked = sorted(((_likeness(prefix, complete[prefix], stack, sizes), prefix) for prefix in complete), reverse=True)
    if not ranked:
        raise RefusedError(f"no tensor names in {checkpoint.path} count the {depth} layers of {stack!r}")
    if len(ranked) > 1 and ranked[0][0] == ranked[1][0]:
        raise RefusedError(f"the layers of {stack!r} may be {ranked[0][1]!r} or {ranked[1][1]!r} in {checkpoint.path}")
    return DiskStack(ranked[0][1], depth)


def _likeness(prefix: str, layers: Mapping[int, int], stack: str, sizes: Sequence[int]) -> tuple[int, int, int]:
    right = sum(layers[index] == size for index, size in enumerate(sizes))
    ours, theirs = prefix.split("."), stack.split(".")
    common = 0
    while common < min(len(ours), len(theirs)) and ours[-1 - common] == theirs[-1 - common]:
        common += 1
    return right, common, -abs(len(ours) - len(theirs))


def plan_weights(checkpoint: Checkpoint, stack: DiskStack, sources: Sources) -> WeightPlan:
    """Return the tensors to write: kept layers renumbered, removed ones and MTP heads left out, the rest as it is."""
    parts: list[Part] = []
    dropped: list[str] = []
    origin: dict[str, str] = {}
    for tensor in checkpoint.tensors.values():
        name = _new_name(tensor, stack, sources)
        axis = next((axis for end, axis in PACKED.items() if tensor.name.endswith(end)), None)
        if name is None:
            dropped.append(tensor.name)
        elif axis is not None:
            parts.append(Part.slices(tensor, name, axis, sources.depth, sources.layers))
            origin[name] = tensor.name
        else:
            parts.append(Part.of(tensor, name))
            origin[name] = tensor.name
    return WeightPlan(tuple(parts), tuple(dropped), origin, _heads(checkpoint, stack, dropped))


def _heads(checkpoint: Checkpoint, stack: DiskStack, dropped: Sequence[str]) -> DroppedHeads | None:
    """Count what is dropped and is of no decoder layer: the heads beside the stack and behind it."""
    places = {name: stack.split(name) for name in dropped}
    heads = [name for name, place in places.items() if place is None or place[0] >= stack.depth]
    size = sum(checkpoint.tensors[name].nbytes for name in heads)
    return DroppedHeads(tensors=len(heads), bytes=size) if heads else None


def _new_name(tensor: Tensor, stack: DiskStack, sources: Sources) -> str | None:
    place = stack.split(tensor.name)
    if place is None:
        return None if MTP_HEAD.match(tensor.name) and len(sources) < sources.depth else tensor.name
    layer, rest = place
    if layer >= stack.depth:  # an MTP head behind the stack: it goes when anything is removed
        return tensor.name if len(sources) == sources.depth else None
    return stack.name(sources.layers.index(layer), rest) if layer in sources.layers else None
