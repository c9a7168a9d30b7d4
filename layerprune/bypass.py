"""Running a model as if some of its decoder layers were not there, without changing a weight.

A bypassed layer hands its input hidden states on, in whatever form the layer itself would have answered.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from layerprune.anatomy import find_stack
from layerprune.errors import UsageError
from layerprune.removal import Removal


@contextmanager
def bypassed(model: nn.Module, layers: Sequence[nn.Module], removal: Removal) -> Iterator[None]:
    """Bypass the layers of ``removal`` (indices into ``layers``, the decoder stack of ``model``) in the block.

    ``forward`` is replaced on the instance, so hooks and the module list stay as they are; it is restored on exit,
    after an exception too. Blocks nest. Run the model with ``use_cache=False``: the cache of a bypassed layer stays
    empty. Raises ``UsageError`` for a layer that does not exist.
    """
    if removal and max(removal) >= len(layers):
        raise UsageError(f"{removal} names a layer that does not exist: the model has layers 0 to {len(layers) - 1}")
    before: list[tuple[nn.Module, Any]] = []
    try:
        for index in removal:
            layer = layers[index]
            before.append((layer, layer.__dict__.get("forward")))
            layer.forward = _Identity(layer.forward)  # type: ignore[method-assign]
        yield
    finally:
        for layer, forward in reversed(before):
            if forward is None:
                del layer.forward  # the class's own shows again
            else:
                layer.forward = forward


@contextmanager
def applied(model: nn.Module, removal: Removal) -> Iterator[nn.Module]:
    """Yield ``model``, a causal language model of transformers, with the layers of ``removal`` bypassed and no cache.

    Its decoder stack is found by its config; the cache's setting is put back at the end. Raises ``ModelError`` where no
    stack is found, ``UsageError`` for a layer that does not exist.
    """
    layers = list(model.get_submodule(find_stack(model, model.config)))  # type: ignore[arg-type]
    configs = [model.config, getattr(model, "generation_config", None)]
    before = [(config, config.use_cache) for config in configs if hasattr(config, "use_cache")]
    try:
        for config, _ in before:
            config.use_cache = False
        with bypassed(model, layers, removal):
            yield model
    finally:
        for config, cached in before:
            config.use_cache = cached


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
