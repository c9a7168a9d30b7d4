"""What goes into the exported folder: its config, the byte ranges of its weights, and the files beside them.

The process that copies weights reads this module, so nothing here needs torch: what does runs apart, in ``proof``.
"""

from __future__ import annotations

import fnmatch
import json
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from layerprune import parsing
from layerprune.artifacts import Change, DroppedHeads
from layerprune.checkpoint import Checkpoint, contained
from layerprune.checkpoint.companions import companions
from layerprune.checkpoint.writer import TensorPart
from layerprune.errors import CheckpointError, RefusedError, one_line
from layerprune.files import listed
from layerprune.removal import LayerMap, Removal, layer_of, packed_axis
from layerprune.util import apart

# What the pruned model will be, read off the base's config and validated on the meta device; no weight is read.


QUANTISATION_FIELDS = ("quantization_config", "compression_config", "quantization")  # of config.json; last: MLX's


@dataclass(frozen=True)
class PrunedConfig:
    """The result before its weights."""

    model_type: str
    stack: str  # module path in memory, e.g. "model.layers"
    sizes: Sequence[int]  # elements of each layer of the base in memory
    parameters: Sequence[int]  # of the base and of the result
    config: dict[str, Any]  # the new content of config.json
    weights: Sequence[str]  # names of the base's in memory
    sources: LayerMap

    def plan_weights(self, checkpoint: Checkpoint) -> WeightPlan:
        """Return which byte ranges of the base's checkpoint are written, and under which names."""
        return plan_weights(checkpoint, find_disk_stack(checkpoint, self.stack, self.sizes), self.sources)

    def rewritten(self, content: Any, checkpoint: Checkpoint | None) -> Any:
        """Rewrite the rules in a quantisation config, by the module names in memory and in the checkpoint."""
        from layerprune.exporter import quantisation

        pairs = [(name, self.sources.renamed(name, self.stack)) for name in self.weights]
        if checkpoint is not None:
            pairs += self.plan_weights(checkpoint).names.items()
        names = quantisation.module_names(pairs)
        return quantisation.RuleRewriter(self.stack, self.sources, names).rewritten(content)


def pruned_config(
    folder: Path,
    removal: Removal,
    *,
    checkpoint: Checkpoint | None = None,
    name: str = "",
    trust_remote_code: bool = False,
) -> PrunedConfig:
    """Return the blueprint of what a removal leaves of the model in ``folder``, of which only the config is read.

    ``checkpoint``: its weights, whose names and shapes are held against the config, and whose modules quantisation
    rules may name beside those in memory; ``name`` is what messages call it. Raises ``RefusedError`` for a removal
    that cannot be represented exactly, ``ModelError`` for a config that transformers cannot build.
    """
    with TemporaryDirectory() as place:  # names of 50,000 tensors do not fit among a process's arguments
        shapes = Path(place) / "shapes.json"
        shapes.write_text(json.dumps({} if checkpoint is None else checkpoint.shapes), encoding="utf-8")
        drawn = apart(
            "layerprune.exporter.proof:draw", folder=str(folder), layers=list(removal.layers),
            trust_remote_code=trust_remote_code, shapes=str(shapes), name=name or str(folder),
        )  # fmt: skip
    found = PrunedConfig(sources=LayerMap.after(removal, drawn.pop("depth")), **drawn)
    for part in (found.config, *(value for value in found.config.values() if isinstance(value, dict))):
        for key in QUANTISATION_FIELDS:
            if removal and isinstance(part.get(key), dict):
                part[key] = found.rewritten(part[key], checkpoint)
    return found


def dry_run(folder: Path, removal: Removal, *, trust_remote_code: bool = False) -> None:
    """Raise ``RefusedError`` where ``export`` would refuse the removal before writing; seconds, no weights are read.

    Beyond ``Architecture.check`` this builds base and result on the meta device and compares their layers.
    """
    checkpoint = Checkpoint.open(folder) if any(folder.glob("*.safetensors")) else None
    pruned_config(folder, removal, checkpoint=checkpoint, trust_remote_code=trust_remote_code)


# Which byte ranges of the base make up the pruned checkpoint, and under which names. Works on the names on disk.
#
# The names on disk differ from those in memory for a third of all types (experts fused on loading, other prefixes), so
# the stack is looked for in the file's own names.


# Top-level names of multi-token-prediction heads that stand outside the stack (Qwen3-Next, MiMo, Nemotron-H).
MTP_HEAD = re.compile(r"^(model\.)?mtp(\.|_)")
NUMBERED = re.compile(r"(?<![^.])(\d+)(?=\.)")


@dataclass(frozen=True)
class WeightPlan:
    """What to write, in the order of the base's files, and what is left out."""

    parts: tuple[TensorPart, ...]
    names: Mapping[str, str | None]  # base name -> new name, None where the tensor is left out
    heads: DroppedHeads | None = None  # multi-token-prediction heads among what is left out


@dataclass(frozen=True)
class Weight:
    """The size of a checkpoint."""

    parameters: int  # of the model in memory, each counted once: see ``Architecture.parameters``
    nbytes: int  # of tensor data in the files
    heads: DroppedHeads | None = None  # multi-token-prediction heads that export leaves out


def find_disk_stack(checkpoint: Checkpoint, stack: str, sizes: Sequence[int]) -> str:
    """Find the stack among the names on disk and return its path, which may be empty.

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
    return ranked[0][1]


def _likeness(prefix: str, layers: Mapping[int, int], stack: str, sizes: Sequence[int]) -> tuple[int, int, int]:
    right = sum(layers[index] == size for index, size in enumerate(sizes))
    ours, theirs = prefix.split("."), stack.split(".")
    pairs = zip(reversed(ours), reversed(theirs), strict=False)
    common = list(takewhile(lambda pair: pair[0] == pair[1], pairs))  # names that both paths end with
    return right, len(common), -abs(len(ours) - len(theirs))


def plan_weights(checkpoint: Checkpoint, stack: str, sources: LayerMap) -> WeightPlan:
    """Return the tensors to write: kept layers renumbered, removed ones and MTP heads left out, the rest as it is."""
    parts: list[TensorPart] = []
    names: dict[str, str | None] = {}
    heads: list[int] = []  # bytes of each tensor
    for tensor in checkpoint.tensors.values():
        if len(sources) < sources.depth and _is_mtp_head(tensor.name, stack, sources.depth):
            names[tensor.name] = None
            heads.append(tensor.nbytes)
            continue
        new = names[tensor.name] = sources.renamed(tensor.name, stack)
        axis = packed_axis(tensor.name)
        if new is not None and axis is not None:
            parts.append(TensorPart.slices(tensor, new, axis, sources.depth, sources.layers))
        elif new is not None:
            parts.append(TensorPart.of(tensor, new))
    return WeightPlan(tuple(parts), names, DroppedHeads(tensors=len(heads), bytes=sum(heads)) if heads else None)


def _is_mtp_head(name: str, stack: str, depth: int) -> bool:
    """Whether a tensor is of a multi-token-prediction head, beside the stack or behind it: it reads all layers."""
    place = layer_of(name, stack)
    return bool(MTP_HEAD.match(name)) if place is None else place[0] >= depth


# config.json and generation_config.json: read with suspicion, pruned, compared field by field.


GENERATION = "generation_config.json"
EARLY_EXIT = "assistant_early_exit"  # how many of the first layers draft tokens (transformers' GenerationConfig)
DOLA = "dola_layers"  # after how many layers the contrasted logits are read; "low" and "high" follow the depth
# Whatever else names layers has no meaning that is known here. "alignment_heads" are Whisper's [layer, head] pairs.
LAYER_FIELD = re.compile(r"layer|early_exit|alignment_heads")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; raises ``CheckpointError`` naming the file."""
    try:
        content = parsing.read_json(path, finite=False)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {one_line(error)}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not an object")
    return content


def prune_generation(content: dict[str, Any], sources: LayerMap) -> dict[str, Any]:
    """Return the generation config of the pruned model: layer counts mapped, and left out where that is not possible.

    A count of the first layers becomes the count of those that are left of them. Left out are counts that become none
    or all layers, and fields about layers that are not known here.
    """
    new: dict[str, Any] = {}
    for key, value in content.items():
        if key == EARLY_EXIT and _is_count(value):
            count = _left_of(value, sources)
            new |= {key: count} if 0 < count < len(sources) else {}
        elif key == DOLA and isinstance(value, list) and all(map(_is_count, value)):
            counts = {_left_of(entry, sources) for entry in value} - {len(sources)}
            new |= {key: sorted(counts)} if counts else {}
        elif isinstance(value, dict):
            new[key] = prune_generation(value, sources)
        elif not (LAYER_FIELD.search(key) and _counts(value)):
            new[key] = value
    return new if len(sources) < sources.depth else content


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _counts(value: Any) -> bool:
    return _is_count(value) or (isinstance(value, list) and any(map(_counts, value)))


def _left_of(count: int, sources: LayerMap) -> int:
    """Return how many layers of the result come from the first ``count`` of the base."""
    return sum(layer < count for layer in sources.layers)


def config_changes(before: dict[str, Any], after: dict[str, Any], path: str = "") -> dict[str, Change]:
    """Return the fields that differ, nested ones by dotted path."""
    changes: dict[str, Change] = {}
    for key in sorted(before.keys() | after.keys()):
        old, new = before.get(key), after.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            changes.update(config_changes(old, new, f"{path}{key}."))
        elif old != new:
            changes[f"{path}{key}"] = Change(before=old, after=new)
    return changes


# The files of a model folder beside its weights and config: which are carried along, which are left behind.


QUANTISATION_FILES = "*quant*config*.json"


@dataclass(frozen=True)
class Extras:
    """What happens to each file beside the weights."""

    copied: tuple[str, ...]
    rewritten: dict[str, bytes]  # files that speak of layers, with their new content
    dropped: tuple[str, ...]
    changes: dict[str, Change]  # fields of the generation config that differ
    notes: tuple[str, ...]  # what is left behind though it belongs to the model, and why


def plan_extras(folder: Path, checkpoint: Checkpoint, pruned: PrunedConfig) -> Extras:
    """Sort the folder's files that are not the checkpoint's weights; ``pruned`` is the new config.

    Raises ``CheckpointError`` for a file to carry that is a link or no regular file, or cannot be read.
    """
    names = [name for name, _ in listed(folder)]
    found = companions(folder, names, checkpoint.names)
    rewritten, changes = {"config.json": _as_file(pruned.config)}, dict[str, Change]()
    for name in found.carried:
        if fnmatch.fnmatchcase(name, QUANTISATION_FILES):
            rewritten[name] = _as_file(pruned.rewritten(read_json(contained(folder, name)), checkpoint))
    if GENERATION in found.carried:
        old = read_json(contained(folder, GENERATION))
        new = prune_generation(old, pruned.sources)
        changes = {f"{GENERATION}: {field}": change for field, change in config_changes(old, new).items()}
        rewritten |= {GENERATION: _as_file(new)} if changes else {}
    copied = tuple(name for name in found.carried if name not in rewritten)
    return Extras(copied, rewritten, found.left, changes, found.notes)


def _as_file(content: Any) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
