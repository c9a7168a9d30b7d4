"""Which layer of the base each layer of a checkpoint is, by its weights, and how far it has moved from it.

The nearest layer is looked for by samples of the matrices, at most 16 a layer; the one found is then compared whole.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from layerprune.architecture.config_fields import MTP_KEYS, depth_key
from layerprune.architecture.stack import LAYER, OTHER
from layerprune.checkpoint import Checkpoint, Folder, Tensor
from layerprune.checkpoint.safetensors import read_json
from layerprune.checkpoint.values import (
    CHANGED,
    EQUAL,
    FLOATS,
    PACKED,
    RESHAPED,
    ROUNDED,
    Array,
    Difference,
    difference,
    distance,
    first_rows,
    relative,
    sample,
    squares,
)  # fmt: skip
from layerprune.errors import CheckpointError
from layerprune.lineage.lineage import (
    ADDED,
    EMBEDDINGS,
    HEAD,
    MISSING,
    QUANTISED,
    RANDOM,
    UNCOMPARED,
    UNMATCHED,
    LayerMatch,
    Lineage,
    OutsideMatch,
)  # fmt: skip
from layerprune.util import SILENT, Progress

SAMPLED = 16  # matrices of a layer that are sampled
# Mean distance of the samples, none counted as more than 1, from which on a layer is not the base's. Unrelated matrices
# are at 1 each; a layer of which one matrix of seven is the base's, as it was, is at 0.86.
FAR = 0.9
# A matrix that is nearly the same in most layers of the base (A_log of Mamba, masks) does not tell them apart.
ALIKE = 0.5
BASE_PACKED = f"{QUANTISED} base"
NEIGHBOURS = 4  # layers of the base between which that is measured

ROLES = {
    EMBEDDINGS: re.compile(r"(^|\.)(embed_tokens|wte|embed_in|word_embeddings?|tok_embeddings|embeddings?)\.weight$"),
    HEAD: re.compile(r"(^|\.)(lm_head|embed_out|output|head)\.weight$"),
}
Samples = dict[tuple[str, tuple[int, ...], bool], "Array | bytes"]  # by name in the layer, shape, whether of floats


@dataclass(frozen=True)
class CheckpointParts:
    """The tensors of a checkpoint, by layer of the decoder stack and name in the layer, and those outside of it."""

    model_type: str
    layers: Mapping[int, Mapping[str, Tensor]]
    outside: Mapping[str, Tensor]  # without what leads to the stack: "embed_tokens.weight"

    @classmethod
    def of(cls, folder: Path, checkpoint: Checkpoint) -> CheckpointParts:
        """Find the decoder stack by the names on disk: the numbered prefix under which most elements are."""
        config: Any = read_json(folder / "config.json")
        if not isinstance(config, dict):
            raise CheckpointError(f"the config of {folder} is a {type(config).__name__}, not an object")
        inner = config.get("text_config")
        fields = inner if isinstance(inner, dict) else config
        heads = any(fields.get(key) for key in MTP_KEYS)  # layers behind the last one are not of the stack
        depth = fields.get(depth_key(fields) or "") if heads else None
        sizes: dict[str, int] = defaultdict(int)
        for name, tensor in checkpoint.tensors.items():
            if (found := LAYER.match(name)) and not OTHER.search(found[1]):
                sizes[found[1]] += tensor.elements
        stack = max(sizes, key=lambda prefix: sizes[prefix], default="")
        root = stack.rpartition(".")[0]
        layers: dict[int, dict[str, Tensor]] = defaultdict(dict)
        outside = {}
        for name, tensor in checkpoint.tensors.items():
            found = LAYER.match(name)
            if stack and found and found[1] == stack and not (isinstance(depth, int) and int(found[2]) >= depth):
                layers[int(found[2])][name[found.end() :]] = tensor
            else:
                outside[name.removeprefix(f"{root}.") if root else name] = tensor
        return cls(str(config.get("model_type", "?")), dict(sorted(layers.items())), outside)

    def part(self, role: str) -> str | None:
        """Return the name of the embeddings or the head; None where it has none of its own."""
        pattern = ROLES[role]
        return next((name for name, it in self.outside.items() if pattern.search(name) and len(it.shape) == 2), None)

    @property
    def tied(self) -> bool:
        """Whether the head is the embeddings: not on disk, or stored a second time."""
        head, table = self.part(HEAD), self.part(EMBEDDINGS)
        if head is None or table is None:
            return head is None
        one, other = self.outside[head], self.outside[table]
        return (one.shape, one.dtype) == (other.shape, other.dtype) and difference(one, other).kind == EQUAL


def trace(model: Folder, base: Folder, *, progress: Progress = SILENT) -> Lineage:
    """Match the layers of ``model`` to those of ``base``; raises ``CheckpointError`` for one that cannot be read."""
    ours, theirs = (CheckpointParts.of(folder.path, folder.open()) for folder in (model, base))
    tied, base_tied = ours.tied, theirs.tied
    return Lineage(
        base=base.id,
        model_type=ours.model_type,
        base_type=theirs.model_type,
        base_layers=tuple(theirs.layers),
        layers=match_layers(ours, theirs, progress),
        outside=tuple(_outside(ours, theirs, tied, base_tied)),
        tied=tied,
        base_tied=base_tied,
        tokenizer=_tokenizer(model.path, base.path),
    )


def match_layers(ours: CheckpointParts, theirs: CheckpointParts, progress: Progress = SILENT) -> tuple[LayerMatch, ...]:
    """Find the base layer of each layer, and compare the two whole."""
    origins = _nearest(ours.layers, theirs.layers)
    found = []
    with progress.task("comparing layers", len(ours.layers), "layers") as advance:
        for layer, tensors in ours.layers.items():
            found.append(_layer(layer, tensors, origins[layer], theirs.layers))
            advance(1)
    return tuple(found)


# The nearest base layer, by samples.


@dataclass(frozen=True)
class Origin:
    """The base layer that a layer is nearest to, and why it has none."""

    base: int | None
    note: str = ""
    kind: str = UNCOMPARED


def _nearest(ours: Mapping[int, Mapping[str, Tensor]], theirs: Mapping[int, Mapping[str, Tensor]]) -> dict[int, Origin]:
    """Return the origin of each layer; of base layers that are equally near, one that follows and is not taken yet."""
    bases = {layer: _samples(tensors) for layer, tensors in theirs.items()}
    alike = _alike(list(bases.values()))
    origins, taken, last = {}, set(), -1
    for layer, tensors in ours.items():
        found = _samples(tensors)
        distances = {at: score for at, other in bases.items() if (score := _score(found, other, alike)) is not None}
        if not distances:
            origins[layer] = Origin(None, _why_not(tensors, theirs))
            continue
        best = min(distances, key=lambda at: (round(distances[at], 9), at in taken, at <= last, at))
        if distances[best] >= FAR and any(_packed(theirs[at]) for at in theirs.keys() - distances.keys()):
            origins[layer] = Origin(None, BASE_PACKED)  # it may be one of those
            continue
        if distances[best] >= FAR:
            origins[layer] = Origin(None, _filling(found), UNMATCHED)
            continue
        origins[layer] = Origin(best)
        taken.add(best)
        last = best
    return origins


def _samples(tensors: Mapping[str, Tensor]) -> Samples:
    matrices = sorted(name for name, tensor in tensors.items() if len(tensor.shape) > 1)
    few = min(SAMPLED, len(matrices))
    chosen = [matrices[i * len(matrices) // few] for i in range(few)]
    return {(name, tensors[name].shape, tensors[name].dtype in FLOATS): sample(tensors[name]) for name in chosen}


def _score(one: Samples, other: Samples, alike: set[Any]) -> float | None:
    """Return how far two layers are apart, from 0 to 1; None where they have no matrix of the same name and shape."""
    common = one.keys() & other.keys()
    if not common:
        return None
    kept = common - alike or common
    return sum(min(distance(one[key], other[key]), 1.0) for key in kept) / len(kept)


def _alike(bases: Sequence[Samples]) -> set[Any]:
    """Return the matrices that do not tell the base's layers apart."""
    apart: dict[Any, list[float]] = defaultdict(list)
    for i, j in combinations(range(len(bases)), 2):
        if j - i <= NEIGHBOURS:
            for key in bases[i].keys() & bases[j].keys():
                apart[key].append(distance(bases[i][key], bases[j][key]))
    return {key for key, found in apart.items() if sorted(found)[3 * len(found) // 4] < ALIKE}


def _why_not(tensors: Mapping[str, Tensor], theirs: Mapping[int, Mapping[str, Tensor]]) -> str:
    """Return why a layer has nothing to be compared by."""
    if packed := _packed(tensors):
        return f"{QUANTISED} ({', '.join(packed)})"
    for base in theirs.values():
        for name, tensor in tensors.items():
            if name in base and base[name].shape != tensor.shape:
                return f"other shapes ({name} {list(tensor.shape)}, the base's {list(base[name].shape)})"
        if _packed(base):
            return BASE_PACKED
    return "other tensors"


def _packed(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the dtypes of matrices that hold no plain values; masks aside."""
    return sorted({tensor.dtype for tensor in tensors.values() if len(tensor.shape) > 1} - FLOATS.keys() - {"BOOL"})


def _filling(samples: Samples) -> str:
    values = [value for value in samples.values() if not isinstance(value, bytes)]
    if values and not any(value.any() for value in values):
        return "all zeros"
    if not all(math.isfinite(float(value.sum(dtype="f8"))) for value in values):
        return "holds NaN or infinity"
    return RANDOM


# The layer found, compared whole.


def _layer(
    layer: int, tensors: Mapping[str, Tensor], origin: Origin, bases: Mapping[int, Mapping[str, Tensor]]
) -> LayerMatch:
    if origin.base is None:
        return LayerMatch(layer, None, origin.kind, note=origin.note)
    base = bases[origin.base]
    found = {name: difference(tensors[name], base[name]) for name in sorted(tensors.keys() & base.keys())}
    kinds = {name: one.kind for name, one in found.items()}
    packed = [name for name, one in found.items() if one.kind == PACKED]
    if any(len(base[name].shape) > 1 for name in base.keys() - tensors.keys()):  # others stand in its place
        packed += [name for name in tensors.keys() - base.keys() if tensors[name].dtype not in FLOATS]
    for name in tensors.keys() ^ base.keys():
        kinds[name] = ADDED if name in tensors else MISSING
    kind, note = EQUAL, ""
    if packed:
        kind, note = UNCOMPARED, f"{QUANTISED} ({', '.join(sorted({tensors[name].dtype for name in packed}))})"
    elif {RESHAPED, ADDED, MISSING} & {*kinds.values()}:
        kind = RESHAPED
        note = _reshaped(kinds, tensors, base)
    elif CHANGED in kinds.values():
        kind, note = CHANGED, _dtypes([(tensors[name], base[name]) for name in found])
    elif ROUNDED in kinds.values():
        kind, note = ROUNDED, _dtypes([(tensors[name], base[name]) for name in found])
    differing = [name for name in sorted(kinds) if kinds[name] not in (EQUAL, ROUNDED)]
    whole = 2 * len(differing) > len(kinds) or kind == ROUNDED
    return LayerMatch(layer, origin.base, kind, _change(found, base), () if whole else tuple(differing), note)


def _change(found: Mapping[str, Difference], base: Mapping[str, Tensor]) -> float:
    """Return ||W - W'|| / ||W|| over tensors; the norms of those that are equal are asked for where others are not."""
    if all(one.kind not in (ROUNDED, CHANGED) for one in found.values()):
        return 0.0
    moved = sum(one.moved for one in found.values())
    return relative(moved, sum(squares(base[name]) if one.kind == EQUAL else one.norm for name, one in found.items()))


def _reshaped(kinds: Mapping[str, str], tensors: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> str:
    name = next(name for name in sorted(kinds) if kinds[name] in (RESHAPED, ADDED, MISSING))
    if kinds[name] == RESHAPED:
        return f"{name} is {list(tensors[name].shape)}, the base's {list(base[name].shape)}"
    return f"{name} is {'not in the base' if kinds[name] == ADDED else 'not there'}"


def _dtypes(pairs: Sequence[tuple[Tensor, Tensor]]) -> str:
    other = sorted({(ours.dtype, theirs.dtype) for ours, theirs in pairs if ours.dtype != theirs.dtype})
    return " ".join(other[0]) if other else ""


# What stands outside the stack.


def _outside(ours: CheckpointParts, theirs: CheckpointParts, tied: bool, base_tied: bool) -> list[OutsideMatch]:
    """Compare the tensors of one name; a head that is the embeddings is compared with the base's head all the same."""
    mine, its = dict(ours.outside), dict(theirs.outside)
    for parts, tensors, shared in ((ours, mine, tied), (theirs, its, base_tied)):
        if shared and tied and base_tied and (head := parts.part(HEAD)) is not None:
            del tensors[head]  # stored a second time
    roles = {parts.part(role): role for parts in (ours, theirs) for role in ROLES}
    found = []
    for name in sorted(mine.keys() | its.keys()):
        role = roles.get(name, "")
        if name not in its or name not in mine:
            tensor = mine.get(name) or its[name]
            kind = ADDED if name in mine else MISSING
            if not (role == HEAD and tied != base_tied):
                found.append(OutsideMatch(name, role, kind, shape=tensor.shape))
            continue
        found.append(_resized(name, role, mine[name], its[name]))
    return found


def _resized(name: str, role: str, tensor: Tensor, base: Tensor) -> OutsideMatch:
    one, kind = difference(tensor, base), ""
    if one.kind == RESHAPED and role and tensor.shape[1:] == base.shape[1:] and min(tensor.shape[0], base.shape[0]):
        rows = min(tensor.shape[0], base.shape[0])  # of the tokens that both have
        one, kind = difference(first_rows(tensor, rows), first_rows(base, rows)), RESHAPED
    note = _dtypes([(tensor, base)])
    change = one.change if one.kind in (ROUNDED, CHANGED) else 0.0
    return OutsideMatch(name, role, kind or one.kind, change, tensor.shape, base.shape, note)


# The tokenizer, by its files.


TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "merges.txt", "spiece.model")


def _tokenizer(model: Path, base: Path) -> tuple[str, ...]:
    """Return the tokenizer files that both have and that differ: in content, where they are JSON."""
    both = [name for name in TOKENIZERS if (model / name).is_file() and (base / name).is_file()]
    found = []
    for name in both:
        if (model / name).read_bytes() == (base / name).read_bytes():
            continue
        if not name.endswith(".json") or read_json(model / name) != read_json(base / name):
            found.append(name)
    return tuple(found)
