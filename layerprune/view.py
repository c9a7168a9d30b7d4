"""A pruned model in memory: fewer layers, the base model's own tensors, and a key-value cache that works.

``bypassed`` leaves the removed layers in place, and their cache entries stay empty: it cannot generate with a cache. A
view is the module tree copied without the removed layers, its tensors shared with the base model, so it takes no memory
to speak of and ``generate`` runs on it at full speed.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from layerprune.bypass import bypassed
from layerprune.errors import RefusedError, one_line
from layerprune.removal import Removal

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from layerprune.anatomy import Anatomy

PROBE = (3, 1, 4, 1, 5, 9, 2, 6)  # token ids that the view and the bypassed model are compared on
# Largest difference of a logit, as a share of the largest logit. Reading a whole text takes the same operations on the
# same tensors in both; a step with a cache takes other shapes, so other roundings (bfloat16 keeps 8 bits of a number).
SAME = {torch.float64: 1e-12, torch.float32: 1e-5}
SAME_HALF, CACHED_HALF = 1e-3, 0.05


def pruned_view(model: PreTrainedModel, anatomy: Anatomy, removal: Removal) -> PreTrainedModel:
    """Return ``model`` without the layers of ``removal``; parameters and buffers are shared, not copied.

    Raises ``RefusedError`` where the view's logits are not those of the model run with the layers bypassed, where it
    does not generate with a cache, and where ``anatomy`` refuses the removal.
    """
    what = f"a {anatomy.model_type} model without {removal} does not generate with a cache in memory"
    try:
        view = _without(model, anatomy, removal)
        read, cached = _differences(model, view, anatomy, removal)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, RuntimeError) as error:  # models raise any
        raise RefusedError(f"{what}: {one_line(error)}") from error
    if not (read <= SAME.get(model.dtype, SAME_HALF) and cached <= SAME.get(model.dtype, CACHED_HALF)):
        raise RefusedError(f"{what}: its logits differ by {max(read, cached):.1e} of the largest")
    return view


def _without(model: PreTrainedModel, anatomy: Anatomy, removal: Removal) -> PreTrainedModel:
    kept = removal.kept(anatomy.depth)
    content = model.config.to_dict()
    before, after = (
        type(model.config).from_dict(copy.deepcopy(each)) for each in (content, anatomy.prune_config(content, removal))
    )
    memo: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    view = copy.deepcopy(model, memo)
    for part in (*_nested(view.config), ()):
        _adopt(*(_at(config, part) for config in (view.config, before, after)))
    parent, _, name = anatomy.stack.rpartition(".")
    layers = list(view.get_submodule(anatomy.stack).children())
    for place, layer in enumerate(kept):
        for module in layers[layer].modules():
            if getattr(module, "layer_idx", None) == layer:
                module.layer_idx = place  # which entry of the cache is this layer's
    setattr(view.get_submodule(parent), name, nn.ModuleList(layers[layer] for layer in kept))
    return view


def _nested(config: Any) -> list[tuple[str, ...]]:
    """Return where the configs of a composite config's parts are."""
    return [(name,) for name in getattr(config, "sub_configs", {}) if getattr(config, name, None) is not None]


def _at(config: Any, path: tuple[str, ...]) -> Any:
    for name in path:
        config = getattr(config, name)
    return config


def _adopt(config: Any, before: Any, after: Any) -> None:
    """Set what removal changes on a config that modules hold, and leave what loading has set on it."""
    old, new = vars(before), vars(after)
    nested = set(getattr(config, "sub_configs", {}))
    for name in (old.keys() | new.keys()) - nested:
        if name not in new:
            vars(config).pop(name, None)
        elif name not in old or old[name] != new[name]:
            vars(config)[name] = new[name]


@torch.no_grad()
def _differences(
    model: PreTrainedModel, view: PreTrainedModel, anatomy: Anatomy, removal: Removal
) -> tuple[float, float]:
    """Return the largest difference of a logit, as a share of the largest: reading a text, and a step with a cache."""
    ids = torch.tensor([PROBE], device=model.device) % view.get_input_embeddings().weight.shape[0]
    with bypassed(model, list(model.get_submodule(anatomy.stack).children()), removal):
        expected = model(input_ids=ids, use_cache=False).logits[0].double()  # (tokens, vocabulary)
    read = view(input_ids=ids, use_cache=False).logits[0]
    cache = view(input_ids=ids[:, :-1], use_cache=True).past_key_values
    step = view(input_ids=ids[:, -1:], past_key_values=cache, use_cache=True).logits[0]
    largest = expected.abs().max()
    return float((read - expected).abs().max() / largest), float((step - expected[-1:]).abs().max() / largest)
