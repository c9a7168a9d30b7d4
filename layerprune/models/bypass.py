"""A model without some of its decoder layers: bypassed in place, or as a view with fewer layers and its own cache."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from layerprune.architecture import find_stack
from layerprune.errors import RefusedError, UsageError, one_line
from layerprune.removal import Removal

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from layerprune.architecture import Architecture


# Running a model as if some of its decoder layers were not there, without changing a weight.
#
# A bypassed layer hands its input hidden states on, in whatever form the layer itself would have answered.


@contextmanager
def bypassed(model: nn.Module, layers: Sequence[nn.Module], removal: Removal) -> Iterator[None]:
    """Bypass the layers of ``removal`` (indices into ``layers``, the decoder stack of ``model``) in the block.

    ``forward`` is replaced on the instance, so hooks and the module list stay as they are; it is restored on exit,
    after an exception too. Blocks nest. Run the model with ``use_cache=False``: the cache of a bypassed layer stays
    empty. Raises ``UsageError`` for a layer that does not exist.
    """
    if removal and max(removal) >= len(layers):
        raise UsageError(f"{removal} names a layer that does not exist: the model has layers 0 to {len(layers) - 1}")
    with ExitStack() as restored:
        for index in removal:
            layer = layers[index]
            if (own := layer.__dict__.get("forward")) is None:
                restored.callback(delattr, layer, "forward")  # the class's own shows again
            else:
                restored.callback(setattr, layer, "forward", own)
            layer.forward = _Identity(layer.forward)  # type: ignore[method-assign]
        yield


@contextmanager
def applied(model: nn.Module, removal: Removal) -> Iterator[nn.Module]:
    """Yield ``model``, a causal language model of transformers, with the layers of ``removal`` bypassed and no cache.

    Its decoder stack is found by its config; the cache's setting is put back at the end. Raises ``ModelError`` where no
    stack is found, ``UsageError`` for a layer that does not exist.
    """
    layers = list(model.get_submodule(find_stack(model, model.config)))  # type: ignore[arg-type]
    with ExitStack() as restored:
        for config in (model.config, getattr(model, "generation_config", None)):
            if hasattr(config, "use_cache"):
                restored.callback(setattr, config, "use_cache", config.use_cache)
                config.use_cache = False
        restored.enter_context(bypassed(model, layers, removal))
        yield model


class _Identity:
    """What stands in for a layer's ``forward``.

    The layer is run once, to see whether it answers with a tensor or a tuple, and again each time when the tuple
    carries more tensors than the hidden states (a state or bias that later layers read).
    """

    def __init__(self, original: Callable[..., Any]) -> None:
        self.original = original
        self.signature = inspect.signature(original)
        self.first = next(iter(self.signature.parameters))
        self.wrap: Callable[[torch.Tensor], Any] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs[self.first]
        if self.wrap is not None:
            return self.wrap(hidden)
        answer = self.original(*args, **kwargs)
        if isinstance(answer, torch.Tensor):
            self.wrap = lambda states: states
            return hidden
        rest = self._carried(answer[1:], args, kwargs)
        if all(entry is None for entry in answer[1:]):
            self.wrap = lambda states: (states, *rest)
        return type(answer)((hidden, *rest))

    def _carried(self, rest: tuple[Any, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        """Replace what a layer hands to the next one (``prev_topk_indices`` and such) by what it was handed itself."""
        previous = [name for name in self.signature.parameters if name.startswith("prev_")]
        if len(previous) != 1 or len(rest) != 1:
            return rest
        return (self.signature.bind(*args, **kwargs).arguments.get(previous[0]),)


# A pruned model in memory: fewer layers, the base model's own tensors, and a key-value cache that works.
#
# ``bypassed`` leaves the removed layers in place, and their cache entries stay empty: it cannot generate with a cache.
# A view is the module tree copied without the removed layers, its tensors shared with the base model, so it takes no
# memory to speak of and ``generate`` runs on it at full speed.


PROBE = (3, 1, 4, 1, 5, 9, 2, 6)  # token ids that the view and the bypassed model are compared on
# Largest difference of a logit, as a share of the largest logit. Reading a whole text takes the same operations on the
# same tensors in both; a step with a cache takes other shapes, so other roundings (bfloat16 keeps 8 bits of a number).
SAME = {torch.float64: 1e-12, torch.float32: 1e-5}
SAME_HALF, CACHED_HALF = 1e-3, 0.05


def pruned_view(model: PreTrainedModel, architecture: Architecture, removal: Removal) -> PreTrainedModel:
    """Return ``model`` without the layers of ``removal``; parameters and buffers are shared, not copied.

    Raises ``RefusedError`` where the view's logits are not those of the model run with the layers bypassed, where it
    does not generate with a cache, and where ``architecture`` refuses the removal.
    """
    what = f"a {architecture.model_type} model without {removal} does not generate with a cache in memory"
    try:
        view = _without(model, architecture, removal)
        read, cached = _differences(model, view, architecture, removal)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, RuntimeError) as error:  # models raise any
        raise RefusedError(f"{what}: {one_line(error)}") from error
    if not (read <= SAME.get(model.dtype, SAME_HALF) and cached <= SAME.get(model.dtype, CACHED_HALF)):
        raise RefusedError(f"{what}: its logits differ by {max(read, cached):.1e} of the largest")
    return view


def _without(model: PreTrainedModel, architecture: Architecture, removal: Removal) -> PreTrainedModel:
    kept = removal.kept(architecture.depth)
    content = model.config.to_dict()
    before, after = (
        type(model.config).from_dict(copy.deepcopy(each))
        for each in (content, architecture.prune_config(content, removal))
    )
    memo: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    view = copy.deepcopy(model, memo)
    for name in view.config.sub_configs:
        if getattr(view.config, name, None) is not None:
            _adopt(*(getattr(config, name) for config in (view.config, before, after)))
    _adopt(view.config, before, after)
    parent, _, name = architecture.stack.rpartition(".")
    layers = list(view.get_submodule(architecture.stack).children())
    for place, layer in enumerate(kept):
        for module in layers[layer].modules():
            if getattr(module, "layer_idx", None) == layer:
                module.layer_idx = place  # which entry of the cache is this layer's
    setattr(view.get_submodule(parent), name, nn.ModuleList(layers[layer] for layer in kept))
    return view


def _adopt(config: Any, before: Any, after: Any) -> None:
    """Set what removal changes on a config that modules hold, and leave what loading has set on it."""
    old, new = vars(before), vars(after)
    for name in (old.keys() | new.keys()) - config.sub_configs.keys():
        if name not in new:
            vars(config).pop(name, None)
        elif name not in old or old[name] != new[name]:
            vars(config)[name] = new[name]


@torch.no_grad()
def _differences(
    model: PreTrainedModel, view: PreTrainedModel, architecture: Architecture, removal: Removal
) -> tuple[float, float]:
    """Return the largest difference of a logit, as a share of the largest: reading a text, and a step with a cache."""
    ids = torch.tensor([PROBE], device=model.device) % view.get_input_embeddings().weight.shape[0]
    with bypassed(model, list(model.get_submodule(architecture.stack).children()), removal):
        expected = model(input_ids=ids, use_cache=False).logits[0].double()  # (tokens, vocabulary)
    read = view(input_ids=ids, use_cache=False).logits[0]
    cache = view(input_ids=ids[:, :-1], use_cache=True).past_key_values
    step = view(input_ids=ids[:, -1:], past_key_values=cache, use_cache=True).logits[0]
    largest = expected.abs().max()
    return float((read - expected).abs().max() / largest), float((step - expected[-1:]).abs().max() / largest)
