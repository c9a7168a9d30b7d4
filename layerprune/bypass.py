"""Running a model as if some of its decoder layers, or halves of them, were not there, without changing a weight.

A bypassed layer hands its input hidden states on, in whatever form the layer itself would have answered. A bypassed
half adds nothing to the residual stream.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import nn

from layerprune.anatomy import halves
from layerprune.errors import UsageError
from layerprune.removal import Removal

Half = Literal["attention", "mlp"]
HALVES: tuple[Half, Half] = ("attention", "mlp")  # in the order of a layer's sublayers


@contextmanager
def bypassed(model: nn.Module, layers: Sequence[nn.Module], removal: Removal) -> Iterator[None]:
    """Bypass the units of ``removal`` (indices into ``layers``, the decoder stack of ``model``) in the block.

    ``forward`` is replaced on the instance, so hooks and the module list stay as they are; it is restored on exit,
    after an exception too. Blocks nest. Run the model with ``use_cache=False``: the cache of a bypassed layer stays
    empty. Raises ``UsageError`` for a layer that does not exist, ``RefusedError`` for half a layer that has no halves.
    """
    replacements = [pair for index in range(len(layers)) for pair in _replacements(layers[index], index, removal)]
    if removal.sublayers and max(removal.sublayers) >= 2 * len(layers):
        raise UsageError(f"{removal} names a layer that does not exist: the model has layers 0 to {len(layers) - 1}")
    with _standing_in(replacements):
        yield


@contextmanager
def silenced(layer: nn.Module, half: Half) -> Iterator[None]:
    """Have one half of a layer add nothing to the residual stream; ``RefusedError`` where a layer has no halves."""
    with _standing_in(_silencers(layer, half)):
        yield


@contextmanager
def _standing_in(replacements: Sequence[tuple[nn.Module, Callable[..., Any]]]) -> Iterator[None]:
    before: list[tuple[nn.Module, Any]] = []
    try:
        for module, stand_in in replacements:
            before.append((module, module.__dict__.get("forward")))
            module.forward = stand_in(module.forward)  # type: ignore[method-assign]
        yield
    finally:
        for module, forward in reversed(before):
            if forward is None:
                del module.forward  # the class's own shows again
            else:
                module.forward = forward


def _replacements(layer: nn.Module, index: int, removal: Removal) -> list[tuple[nn.Module, Callable[..., Any]]]:
    gone = [half for offset, half in enumerate(HALVES) if 2 * index + offset in removal.sublayers]
    if len(gone) == 2:
        return [(layer, _Identity)]
    return _silencers(layer, gone[0]) if gone else []


def _silencers(layer: nn.Module, half: Half) -> list[tuple[nn.Module, Callable[..., Any]]]:
    found = halves.split(halves.weighted(layer))
    return [(layer.get_submodule(name), _Silence) for name in found.outputs[half]]


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


class _Silence:
    """What stands in for the ``forward`` of an attention, an MLP or the norm behind it: the same answer, but zeros."""

    def __init__(self, original: Callable[..., Any]) -> None:
        self.original = original

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        answer = self.original(*args, **kwargs)
        if isinstance(answer, torch.Tensor):
            return torch.zeros_like(answer)
        return type(answer)((torch.zeros_like(answer[0]), *answer[1:]))
