"""What the pruned model will be, read off the base's config and validated on the meta device; no weight is read."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Set
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from layerprune.architecture import (
    Architecture,
    LayerMap,
    build_on_meta,
    check_weights,
    layer_patterns,
    load_config,
    read_architecture,
)
from layerprune.architecture.config_fields import PACKED
from layerprune.architecture.stack import find_stack
from layerprune.checkpoint import Checkpoint, contained
from layerprune.errors import RefusedError
from layerprune.exporter import quantisation
from layerprune.exporter.contents import find_disk_stack, layer_renumberer, plan_weights, read_json, rebuilt
from layerprune.removal import Removal
from layerprune.util import apart

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig


@dataclass(frozen=True)
class PrunedConfig:
    """The result before its weights."""

    model_type: str
    depth: int  # of the base
    stack: str  # module path in memory, e.g. "model.layers"
    sizes: tuple[int, ...]  # elements of each layer of the base in memory
    parameters: tuple[int, int]  # of the base and of the result
    config: dict[str, Any]  # the new content of config.json
    weights: tuple[str, ...]  # names of the base's in memory

    def rules(self, sources: LayerMap, checkpoint: Checkpoint | None = None) -> Callable[[Any], Any]:
        """Return a function that rewrites quantisation rules, by the module names in memory and in the checkpoint."""
        pairs = [*quantisation.in_memory(self.weights, self.stack, sources)]
        if checkpoint is not None:
            stack = find_disk_stack(checkpoint, self.stack, self.sizes)
            plan = plan_weights(checkpoint, stack, sources)
            pairs += [(old, new) for new, old in plan.origin.items()]
            pairs += [(old, None) for old in plan.dropped]
        textual = layer_renumberer(self.stack, sources)
        return quantisation.rewriter(textual, sources, quantisation.module_names(pairs))


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
            draw, folder=str(folder), layers=list(removal.layers), trust_remote_code=trust_remote_code,
            shapes=str(shapes), name=name or str(folder),
        )  # fmt: skip
    found = PrunedConfig(**{**drawn, **{key: tuple(drawn[key]) for key in ("sizes", "parameters", "weights")}})
    sources = LayerMap.after(removal, found.depth)
    for part in (found.config, *(value for value in found.config.values() if isinstance(value, dict))):
        for key in quantisation.FIELDS:
            if removal and isinstance(part.get(key), dict):
                part[key] = found.rules(sources, checkpoint)(part[key])
    return found


def dry_run(folder: Path, removal: Removal, *, trust_remote_code: bool = False) -> None:
    """Raise ``RefusedError`` where ``export`` would refuse the removal before writing; seconds, no weights are read.

    Beyond ``Architecture.check`` this builds base and result on the meta device and compares their layers.
    """
    checkpoint = Checkpoint.open(folder) if any(folder.glob("*.safetensors")) else None
    pruned_config(folder, removal, checkpoint=checkpoint, trust_remote_code=trust_remote_code)


def draw(folder: str, layers: list[int], trust_remote_code: bool, shapes: str, name: str) -> dict[str, Any]:
    """Read, change and check; arguments and result as JSON has them, so that it can run in another process."""
    removal = Removal.from_layers(layers)
    old = read_json(contained(Path(folder), "config.json"))
    config = load_config(folder, trust_remote_code=trust_remote_code)
    architecture = read_architecture(config, trust_remote_code=trust_remote_code)
    laid = {key: tuple(shape) for key, shape in read_json(Path(shapes)).items()}
    if laid:
        check_weights(name, laid, config, architecture, trust_remote_code=trust_remote_code)
    sources = LayerMap.after(removal, architecture.depth)
    new = architecture.prune_config(old, removal)
    check_signature(architecture, config, rebuilt(config, new), sources, trust_remote_code=trust_remote_code)
    model = build_on_meta(config, trust_remote_code=trust_remote_code)
    parameters = [architecture.parameters(), architecture.parameters(removal)]
    return {"model_type": architecture.model_type, "depth": architecture.depth, "stack": architecture.stack,
            "sizes": _sizes(model, architecture.stack), "parameters": parameters, "config": new,
            "weights": list(model.state_dict())}  # fmt: skip


def layer_sizes(config: PretrainedConfig, stack: str, trust_remote_code: bool) -> list[int]:
    """Return the elements of each decoder layer as it is in memory."""
    return _sizes(build_on_meta(config, trust_remote_code=trust_remote_code), stack)


def _sizes(model: nn.Module, stack: str) -> list[int]:
    layers = model.get_submodule(stack).children()
    return [sum(value.numel() for value in layer.state_dict().values()) for layer in layers]


# Base and result compared on the meta device, before anything is written: layer by layer, without a weight.


# Where a layer stands and among how many; it must differ. Everything else a layer has must not.
POSITION = {"layer_idx", "layer_id", "layer_index", "layer_number", "block_idx", "num_hidden_layers"}
PLAIN = (bool, int, float, str, type(None))


def check_signature(
    architecture: Architecture,
    base: PretrainedConfig,
    result: PretrainedConfig,
    sources: LayerMap,
    *,
    trust_remote_code: bool,
) -> None:
    """Raise ``RefusedError`` unless each layer of the result is built like the base layer it comes from.

    Compared are class names, parameter shapes and plain attributes of every module in a layer, and the shapes of all
    parameters outside the stack.
    """
    before = build_on_meta(base, trust_remote_code=trust_remote_code)
    after = build_on_meta(result, trust_remote_code=trust_remote_code)
    if find_stack(after, result) != architecture.stack:
        raise RefusedError(f"the pruned config builds another stack than {architecture.stack!r}")
    old, new = _layers(before, architecture.stack), _layers(after, architecture.stack)
    signature = partial(signed, ignored=POSITION | _patterns(base, result))
    if len(new) != len(sources):
        raise RefusedError(f"the pruned config builds {len(new)} layers where {len(sources)} are left")
    for index, layer in enumerate(sources.layers):
        _compare(signature(old[layer]), signature(new[index]), f"layer {layer} as the new layer {index}")
    outside = _outside(before, architecture.stack, sources.depth, len(sources))
    _compare(outside, _outside(after, architecture.stack, 1, 1), "what stands outside the stack")


def _patterns(base: PretrainedConfig, result: PretrainedConfig) -> set[str]:
    """Return the fields by which a config names a pattern, and that a removal has changed; layers may keep a copy."""
    before, after = (vars(config.get_text_config(decoder=True)) for config in (base, result))
    changed = {key for key in before if isinstance(before[key], int | str) and before[key] != after.get(key)}
    return changed - layer_patterns.NO_PATTERN


def _layers(model: nn.Module, stack: str) -> list[nn.Module]:
    return list(model.get_submodule(stack).children())


def signed(layer: nn.Module, ignored: Set[str]) -> dict[str, Any]:
    """Return what a layer is made of: class, parameter shapes and plain attributes of every module in it."""
    found: dict[str, Any] = {}
    for path, module in layer.named_modules():
        found[f"{path}:class"] = type(module).__name__
        for name, value in vars(module).items():
            if isinstance(value, PLAIN) and name not in ignored and not name.startswith("_"):
                found[f"{path}:{name}"] = value
    for name, parameter in layer.state_dict().items():
        found[f"{name}:shape"] = tuple(parameter.shape)
    return found


def _outside(model: nn.Module, stack: str, layers: int, left: int) -> dict[str, Any]:
    """Return the shapes outside the stack; those packed with a slice per layer as they are with ``left`` layers."""
    found: dict[str, Any] = {}
    for name, value in model.state_dict().items():
        if not name.startswith(f"{stack}."):
            shape = list(value.shape)
            for end, axis in PACKED.items():
                if name.endswith(end):
                    shape[axis] = shape[axis] // layers * left
            found[f"{name}:shape"] = tuple(shape)
    return found


def _compare(before: dict[str, Any], after: dict[str, Any], where: str) -> None:
    for key in sorted(before.keys() | after.keys()):
        old, new = before.get(key, "nothing"), after.get(key, "nothing")
        both_floats = isinstance(old, float) and isinstance(new, float)
        if not (math.isclose(old, new, rel_tol=1e-9) if both_floats else old == new):
            path, _, what = key.partition(":")
            raise RefusedError(
                f"{where} would change: {what} of {path or 'the layer'} is {old!r} in the base and {new!r} in the "
                "result; the config cannot say otherwise"
            )
