"""Base and result compared on the meta device, before anything is written: layer by layer, without a weight."""

from __future__ import annotations

import math
from collections.abc import Set
from functools import partial
from typing import TYPE_CHECKING, Any

from layerprune.anatomy import Anatomy, Sources, build_on_meta, patterns
from layerprune.anatomy.fields import PACKED
from layerprune.anatomy.stack import find_stack, text_config
from layerprune.errors import RefusedError

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig

# Where a layer stands and among how many; it must differ. Everything else a layer has must not.
POSITION = {"layer_idx", "layer_id", "layer_index", "layer_number", "block_idx", "num_hidden_layers"}
PLAIN = (bool, int, float, str, type(None))


def check_signature(
    anatomy: Anatomy, base: PretrainedConfig, result: PretrainedConfig, sources: Sources, *, trust_remote_code: bool
) -> None:
    """Raise ``RefusedError`` unless each layer of the result is built like the base layer it comes from.

    Compared are class names, parameter shapes and plain attributes of every module in a layer, and the shapes of all
    parameters outside the stack.
    """
    before = build_on_meta(base, trust_remote_code=trust_remote_code)
    after = build_on_meta(result, trust_remote_code=trust_remote_code)
    if find_stack(after, result) != anatomy.stack:
        raise RefusedError(f"the pruned config builds another stack than {anatomy.stack!r}")
    old, new = _layers(before, anatomy.stack), _layers(after, anatomy.stack)
    signature = partial(signed, ignored=POSITION | _patterns(base, result))
    if len(new) != len(sources):
        raise RefusedError(f"the pruned config builds {len(new)} layers where {len(sources)} are left")
    for index, layer in enumerate(sources.layers):
        _compare(signature(old[layer]), signature(new[index]), f"layer {layer} as the new layer {index}")
    outside = _outside(before, anatomy.stack, sources.depth, len(sources))
    _compare(outside, _outside(after, anatomy.stack, 1, 1), "what stands outside the stack")


def _patterns(base: PretrainedConfig, result: PretrainedConfig) -> set[str]:
    """Return the fields by which a config names a pattern, and that a removal has changed; layers may keep a copy."""
    before, after = (vars(text_config(config)) for config in (base, result))
    changed = {key for key in before if isinstance(before[key], int | str) and before[key] != after.get(key)}
    return changed - patterns.NO_PATTERN


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
