"""A removal in the forms of other tools: written for mergekit, Minitron and llama-quantize, and read from mergekit.

What each tool does with a removal was read in its source, and is said where it is used here. None of them adapts what
a config says of single layers, so a removal is only written for a tool whose result would be the right model.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from layerprune.checkpoint import Checkpoint, Folder
from layerprune.errors import RefusedError, UsageError, one_line
from layerprune.formatting import short
from layerprune.parsing import MOST_YAML_BYTES, parse_yaml, read_text
from layerprune.removal import LayerMap, Removal

if TYPE_CHECKING:
    from layerprune.architecture import Architecture

# Writing: what each tool makes of a removal, and the text that it takes.


LLAMA_CPP = "llama.cpp"
# What a tool does beside leaving the layers out, by form.
HABITS = {
    "mergekit": "mergekit sets the depth in the config, and changes no other field",
    "minitron": "ModelOpt numbers the layers that are left anew, and changes no other setting than their number",
    "llama-quantize": "llama-quantize renumbers the blocks of the GGUF, and changes no other metadata than their count",
}
# Part of the names of experts' weights. mergekit 0.1.5 left them out of deepseek_v3, mixtral and qwen2_moe models, and
# reported no error.
EXPERTS = ".experts."
# It stops where a class of transformers 5 wants lists as long as the depth (tried on qwen3 and gemma2).
STOPS = "mergekit 0.1.5 stops there with transformers 5"
DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}  # that mergekit knows, as safetensors spells them
INSTEAD = "layerprune export PLAN -o DIR writes it exactly"


def write(form: str, removal: Removal, depth: int) -> str:
    """Return a removal of layers of a stack of ``depth`` as ``form`` takes it, where that needs no model.

    Layers are 0-based in all forms but ``minitron``, whose layers count from 1.
    """
    LayerMap.after(removal, depth)  # raises UsageError for a layer that the stack does not have
    match form:
        case "list":
            return ",".join(map(str, removal))
        case "minitron":  # NeMo's and ModelOpt's pruning scripts; ModelOpt's function takes the same numbers
            return " ".join(["--drop_layers", *(str(layer + 1) for layer in removal)])
        case "llama-quantize":
            return f"--prune-layers {','.join(map(str, removal))}"
    raise UsageError(f"{form!r} is no form of a removal alone")


def write_mergekit(removal: Removal, depth: int, folder: Folder, checkpoint: Checkpoint) -> str:
    """Return the mergekit config of a passthrough merge that keeps what ``removal`` leaves of the model in ``folder``.

    ``dtype`` stands there when all weights have one: mergekit casts what it copies, and without it copies as it is.
    """
    lines = ["slices:"]
    for start, end in _runs(LayerMap.after(removal, depth).layers):
        lines += ["  - sources:", f"      - model: {_reference(folder)}", f"        layer_range: [{start}, {end}]"]
    lines.append("merge_method: passthrough")
    dtypes = {tensor.dtype for tensor in checkpoint.tensors.values()}
    if len(dtypes) == 1 and (dtype := DTYPES.get(*dtypes)):
        lines.append(f"dtype: {dtype}")
    return "\n".join(lines)


def _runs(layers: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """Yield first layer and end, which is not in it, of each run of neighbours."""
    breaks = [number for number, (one, following) in enumerate(pairwise(layers), 1) if following != one + 1]
    for start, stop in pairwise([0, *breaks, len(layers)]):
        yield layers[start], layers[stop - 1] + 1


def _reference(folder: Folder) -> str:
    """Return a model as mergekit takes it; it splits a plain name at ``@`` (revision) and ``+`` (LoRA)."""
    if folder.revision is not None:
        return _quoted(f"{folder.id}@{folder.revision}")
    path = str(folder.path)
    return f"{{model: {{path: {_quoted(path)}}}}}" if {"@", "+"} & set(path) else _quoted(path)


def _quoted(text: str) -> str:
    return yaml.safe_dump([text], default_flow_style=True, allow_unicode=True, width=10**6).strip()[1:-1]


def check_form(form: str, architecture: Architecture, removal: Removal, names: Iterable[str]) -> Iterator[str]:
    """Yield what to know of the tool's result; raises ``RefusedError`` where it would be another model.

    ``names`` are those of the base's weights.
    """
    name, habit = architecture.model_type, HABITS[form]
    architecture.check(removal)
    if form == "mergekit" and any(EXPERTS in each for each in names):
        raise RefusedError(
            f"--as {form}: mergekit was seen to leave out the experts' weights of such models as this {name} one, with "
            f"no error; {INSTEAD}"
        )
    if architecture.counts.packed:
        raise RefusedError(
            f"--as {form}: weights outside the layers of a {name} model hold a slice for each layer, which {form} "
            f"does not cut; {INSTEAD}"
        )
    kept = architecture.left_behind(removal)
    if wrong := [field for field, right in kept.items() if not right]:
        raise RefusedError(
            f"--as {form}: {habit}, and without layers {removal} {' and '.join(wrong)} of this {name} model would be "
            f"another; {INSTEAD}"
        )
    if form == "llama-quantize":
        for text, reads_base in architecture.misreadings(removal):
            if text.startswith(f"{LLAMA_CPP} ") and reads_base:
                raise RefusedError(f"--as {form}: {text}")
    if form == "mergekit" and kept:
        left = architecture.depth - len(removal)
        yield (
            f"{habit}: {', '.join(kept)} will still be of {architecture.depth} layers, of which the first {left} "
            f"entries hold ({STOPS})"
        )
    for head in architecture.heads():
        yield f"{head}; {form} keeps it"


# Reading: the removal that a mergekit config of a passthrough merge asks for.


ENDINGS = (".yaml", ".yml")
MOST_LAYERS = 10_000  # of a stack: more than any model has, and few enough to be listed
ALLOWED = {"slices", "merge_method", "dtype", "out_dtype", "base_model", "tokenizer_source"}
WHAT_WOULD_DO = "a removal is a passthrough of slices of one model, in its order, and nothing else"


@dataclass(frozen=True)
class Passthrough:
    """What a mergekit config keeps of one model; where the model ends, it does not say."""

    path: Path
    model: str  # as the file names it: a Hub id or a folder
    revision: str | None
    kept: tuple[int, ...]
    dtype: str | None  # that mergekit casts to

    def removal(self, depth: int) -> Removal:
        """Return what goes of a stack of ``depth`` layers; raises ``UsageError`` where that is none, or beyond it."""
        if self.kept[-1] >= depth:
            raise _fault(self.path, f"layer_range goes to {self.kept[-1] + 1}, and the model has {depth} layers")
        gone = Removal.from_layers(set(range(depth)) - set(self.kept))
        if not gone:
            raise _fault(self.path, f"all {depth} layers of the model are kept: nothing goes")
        return gone

    def revision_of(self, model: str, given: str | None) -> str | None:
        """Return the revision to read of ``model``: the one ``given``, or where the file is of that model, its own."""
        if self.revision is None or self.model != model or Path(model).is_dir():
            return given
        if given not in (None, self.revision):
            raise UsageError(f"--revision {given}: {self.path} is of {model}@{self.revision}; leave one of them out")
        return self.revision

    def remarks(self, model: str, dtypes: set[str]) -> Iterator[str]:
        """Yield what of the file is not followed for ``model``, whose weights are of ``dtypes``."""
        there = Path(self.model)
        if self.model != model and not (there.is_dir() and Path(model).is_dir() and there.samefile(model)):
            yield f"{self.path} names the model {self.model}: what it leaves out is removed from {model}"
        if self.dtype and {DTYPES.get(each, each) for each in dtypes} != {self.dtype.removeprefix("torch.")}:
            yield f"{self.path}: dtype {self.dtype} is not applied: weights are copied as they are in the base"


def is_file(text: str) -> bool:
    """Return whether what was given for ``--remove`` names a file."""
    return text.lower().endswith(ENDINGS)


def read_mergekit(path: Path) -> Passthrough:
    """Read a mergekit config; raises ``UsageError``, of one line, for what is not the removal of layers of one model.

    So it is for everything that would make mergekit write other weights than the model's: other methods, several
    models, layers twice or in another order, ``parameters``, LoRAs, another tokenizer.
    """
    config = _read(path)
    if (method := config.get("merge_method")) != "passthrough":
        raise _fault(path, f"merge_method is {short(method)}")
    if other := sorted(map(str, config.keys() - ALLOWED)):
        raise _fault(path, f"{other[0]} is given")
    if (tokenizer := config.get("tokenizer_source")) not in (None, "base", "union"):  # of one model: its own
        raise _fault(path, f"tokenizer_source is {short(tokenizer)}")
    slices = config.get("slices")
    if not isinstance(slices, list) or not slices:
        raise _fault(path, "slices is not a list of layers to keep")
    found = [_slice(path, number, one) for number, one in enumerate(slices)]
    models = dict.fromkeys(model for model, _ in found)
    if (base := config.get("base_model")) is not None:
        models[_model(path, base)] = None
    if len(models) > 1:
        raise _fault(path, f"it joins {len(models)} models: {', '.join(name for name, _ in models)}")
    for (_, before), (_, after) in pairwise(found):
        if after.start < before.stop:
            twice = [layer for layer in after if any(layer in layers for _, layers in found if layers is not after)]
            how = f"layer {twice[0]} twice" if twice else f"layer {after.start} behind {before.stop - 1}"
            raise _fault(path, f"slices has {how}")
    (model, revision), dtype = next(iter(models)), config.get("out_dtype") or config.get("dtype")
    if dtype is not None and not isinstance(dtype, str):
        raise _fault(path, f"dtype is {short(dtype)}")
    kept = tuple(layer for _, layers in found for layer in layers)
    return Passthrough(path, model, revision, kept, dtype)


def _read(path: Path) -> Mapping[str, Any]:
    try:
        node, config = parse_yaml(read_text(path, MOST_YAML_BYTES))
    except OSError as error:
        raise UsageError(f"--remove {path} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, ValueError) as error:
        raise UsageError(f"--remove {path} is no YAML that can be read: {one_line(error)}") from error
    if not isinstance(config, dict):
        raise _fault(path, "it is not a mapping")
    for key in _keys(node):
        raise _fault(path, f"the key {short(key)} occurs twice")
    return config


def _keys(node: Any) -> Iterator[str]:
    """Yield keys that stand twice in one mapping: YAML readers take the last of them in silence."""
    if isinstance(node, yaml.MappingNode):
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        yield from (name for number, name in enumerate(names) if name in names[:number])
        for _, value in node.value:
            yield from _keys(value)
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            yield from _keys(value)


def _slice(path: Path, number: int, given: Any) -> tuple[tuple[str, str | None], range]:
    """Return the model and the layers of one entry of ``slices``."""
    where = f"slices[{number}]"
    if not isinstance(given, dict) or not isinstance(sources := given.get("sources"), list):
        raise _fault(path, f"{where} has no list of sources")
    if other := sorted(map(str, given.keys() - {"sources"})):
        raise _fault(path, f"{where} has {other[0]}")
    if len(sources) != 1 or not isinstance(source := sources[0], dict):
        raise _fault(path, f"{where} has {len(sources)} sources, each of which should name one model")
    if other := sorted(map(str, source.keys() - {"model", "layer_range"})):
        raise _fault(path, f"{where} has {other[0]}")
    match source.get("layer_range"):
        case [int(start), int(end)] if 0 <= start < end <= MOST_LAYERS and bool not in (type(start), type(end)):
            return _model(path, source.get("model")), range(start, end)
        case other_range:
            raise _fault(
                path, f"layer_range of {where} is {short(other_range)}, not a first layer and an end behind it"
            )


def _model(path: Path, given: Any) -> tuple[str, str | None]:
    """Return name and revision of a model as mergekit reads it: ``name@revision``, or mappings that say the same."""
    while isinstance(given, dict) and given.keys() == {"model"}:
        given = given["model"]
    match given:
        case {"path": str(name), **more} if more.keys() <= {"revision"}:
            revision = more.get("revision")
            if revision is None or isinstance(revision, str):
                return name, revision
        case str(name) if name and "+" not in name and name.count("@") < 2:
            name, _, revision = name.partition("@")
            return name, revision or None
    raise _fault(path, f"model is {short(given)}, and a Hub id or a folder is read, without a LoRA")


def _fault(path: Path, what: str) -> UsageError:
    return UsageError(f"--remove {path}: {what}; {WHAT_WOULD_DO}")
