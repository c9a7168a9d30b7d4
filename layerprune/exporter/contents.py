"""What goes into the exported folder: the byte ranges of its weights, and the files beside them."""

from __future__ import annotations

import fnmatch
import json
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from layerprune.architecture import LayerMap
from layerprune.architecture.config_fields import PACKED
from layerprune.artifacts import Change, DroppedHeads
from layerprune.checkpoint import Checkpoint, Tensor, contained
from layerprune.checkpoint.companions import companions
from layerprune.checkpoint.writer import TensorPart
from layerprune.errors import CheckpointError, RefusedError, one_line
from layerprune.files import listed

if TYPE_CHECKING:
    from transformers import PretrainedConfig


# Which byte ranges of the base make up the pruned checkpoint, and under which names. Works on the names on disk.
#
# The names on disk differ from those in memory for a third of all types (experts fused on loading, other prefixes), so
# the stack is looked for in the file's own names.


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

    parts: tuple[TensorPart, ...]
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


def plan_weights(checkpoint: Checkpoint, stack: DiskStack, sources: LayerMap) -> WeightPlan:
    """Return the tensors to write: kept layers renumbered, removed ones and MTP heads left out, the rest as it is."""
    parts: list[TensorPart] = []
    dropped: list[str] = []
    origin: dict[str, str] = {}
    for tensor in checkpoint.tensors.values():
        name = _new_name(tensor, stack, sources)
        axis = next((axis for end, axis in PACKED.items() if tensor.name.endswith(end)), None)
        if name is None:
            dropped.append(tensor.name)
        elif axis is not None:
            parts.append(TensorPart.slices(tensor, name, axis, sources.depth, sources.layers))
            origin[name] = tensor.name
        else:
            parts.append(TensorPart.of(tensor, name))
            origin[name] = tensor.name
    return WeightPlan(tuple(parts), tuple(dropped), origin, _heads(checkpoint, stack, dropped))


def _heads(checkpoint: Checkpoint, stack: DiskStack, dropped: Sequence[str]) -> DroppedHeads | None:
    """Count what is dropped and is of no decoder layer: the heads beside the stack and behind it."""
    places = {name: stack.split(name) for name in dropped}
    heads = [name for name, place in places.items() if place is None or place[0] >= stack.depth]
    size = sum(checkpoint.tensors[name].nbytes for name in heads)
    return DroppedHeads(tensors=len(heads), bytes=size) if heads else None


def _new_name(tensor: Tensor, stack: DiskStack, sources: LayerMap) -> str | None:
    place = stack.split(tensor.name)
    if place is None:
        return None if MTP_HEAD.match(tensor.name) and len(sources) < sources.depth else tensor.name
    layer, rest = place
    if layer >= stack.depth:  # an MTP head behind the stack: it goes when anything is removed
        return tensor.name if len(sources) == sources.depth else None
    return stack.name(sources.layers.index(layer), rest) if layer in sources.layers else None


# config.json: read with suspicion, rebuilt as transformers will read it, compared field by field.


GENERATION = "generation_config.json"
EARLY_EXIT = "assistant_early_exit"  # how many of the first layers draft tokens (transformers' GenerationConfig)
DOLA = "dola_layers"  # after how many layers the contrasted logits are read; "low" and "high" follow the depth
# Whatever else names layers has no meaning that is known here. "alignment_heads" are Whisper's [layer, head] pairs.
LAYER_FIELD = re.compile(r"layer|early_exit|alignment_heads")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; raises ``CheckpointError`` naming the file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not an object")
    return content


def rebuilt(config: PretrainedConfig, content: dict[str, Any]) -> PretrainedConfig:
    """Return a config of the same class from new content of config.json; ``RefusedError`` when it is not accepted."""
    try:
        with TemporaryDirectory() as folder:  # read as a file, as everyone will: JSON has no infinity, config.json does
            (Path(folder) / "config.json").write_text(json.dumps(content), encoding="utf-8")
            return type(config).from_pretrained(folder)
    except Exception as error:  # strict config classes raise their own errors
        name = type(config).__name__
        raise RefusedError(f"the pruned config is not one that {name} accepts: {one_line(error)}") from error


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
    """What happens to each file beside weights and config."""

    copied: tuple[str, ...]
    rewritten: dict[str, bytes]  # files that speak of layers, with their new content
    dropped: tuple[str, ...]
    changes: dict[str, Change]  # fields of the generation config that differ
    notes: tuple[str, ...]  # what is left behind though it belongs to the model, and why


def plan_extras(folder: Path, weights: set[str], renumber: Callable[[Any], Any], sources: LayerMap) -> Extras:
    """Sort the folder's files; ``weights`` are the weight files, ``renumber`` rewrites layer paths in JSON content.

    Raises ``CheckpointError`` for a file to carry that is a link or no regular file, or cannot be read.
    """
    names = [name for name, _ in listed(folder)]
    found = companions(folder, names, weights)
    rewritten, changes = dict[str, bytes](), dict[str, Change]()
    for name in found.carried:
        if fnmatch.fnmatchcase(name, QUANTISATION_FILES):
            rewritten[name] = _as_file(renumber(read_json(contained(folder, name))))
    if GENERATION in found.carried:
        old = read_json(contained(folder, GENERATION))
        new = prune_generation(old, sources)
        changes = {f"{GENERATION}: {field}": change for field, change in config_changes(old, new).items()}
        rewritten |= {GENERATION: _as_file(new)} if changes else {}
    copied = tuple(name for name in found.carried if name not in rewritten)
    return Extras(copied, rewritten, found.left, changes, found.notes)


def _as_file(content: Any) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


def layer_renumberer(stack: str, sources: LayerMap) -> Callable[[Any], Any]:
    """Return a function that renumbers layer paths in JSON content, keys and values, and drops those of removed layers.

    Understood are paths such as ``model.layers.3.mlp`` and the same as a pattern (``re:model\\.layers\\.3\\..*``). A
    pattern over layer numbers (``layers.[0-3]``) raises ``RefusedError`` naming it.
    """
    last = re.escape(stack.rpartition(".")[2])
    one = re.compile(rf"(?P<head>(?:^|.*?[.:^(*])?{last}\\?\.)(?P<layer>\d+)(?P<tail>(?:\\?\.|$|\$).*)", re.DOTALL)
    many = re.compile(rf"(?:^|[.:^(*]){last}\\?\.(?:[\[(]|\\d|\d+[-|\[\\(?*+](?!\.))")

    def text(value: str) -> str | None:
        if many.search(value):
            if _any_number(value):
                return value
            raise RefusedError(f"the quantisation config names layers by the pattern {value!r}; list them one by one")
        match = one.fullmatch(value)
        if match is None:
            return value
        layer = int(match["layer"])
        return f"{match['head']}{sources.layers.index(layer)}{match['tail']}" if layer in sources.layers else None

    def renumber(value: Any) -> Any:
        if isinstance(value, str):
            return text(value)
        if isinstance(value, list):
            entries = [(entry, renumber(entry)) for entry in value]
            return [new for old, new in entries if new is not None or old is None]
        if isinstance(value, dict):
            pairs = [(text(key), renumber(entry)) for key, entry in value.items()]
            return {key: entry for key, entry in pairs if key is not None}
        return value

    return renumber


def _any_number(pattern: str) -> bool:
    """Whether a pattern's layer number is "any", so that it holds for the pruned stack as it did for the base."""
    return bool(re.search(r"\\\.?(\\d|\[0-9\])[+*]", pattern) or re.search(r"\.(\\d|\[0-9\]|\()[+*d.]", pattern))
