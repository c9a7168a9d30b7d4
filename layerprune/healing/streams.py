"""The residual stream of a model on windows of text, carried from layer to layer: each layer runs once per window.

What is kept is one hidden state per token, at one depth; activations inside a layer are seen by a watcher and
forgotten.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import nn

from layerprune.engine.walk import Walk, replaced_forwards, split_hidden
from layerprune.errors import RefusedError
from layerprune.subject import Subject

CHECK_TOKENS = 16
# One kernel on the same numbers: nothing but the order of additions may differ.
CHECK_TOLERANCE = 1e-2  # of the largest state


class Stream:
    """The states of all windows in front of one layer."""

    def __init__(self, subject: Subject, ids: Sequence[torch.Tensor]) -> None:
        """Embed batches of token ids, each (windows, tokens).

        Raises ``RefusedError`` where layers hand each other more than the residual stream.
        """
        self.subject = subject
        self.walk = Walk(subject.model, subject.layers)
        few = ids[0][:1, :CHECK_TOKENS]
        self.walk.learn_outputs({"input_ids": few.to(subject.device)})
        self._check(few)
        self.depth = 0
        self.ids = list(ids)
        self.states = [_entering(subject, rows) for rows in ids]  # each (windows, tokens, hidden)

    def outputs(self) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield, batch by batch, its number and what the layer at ``depth`` makes of it; nothing is moved on."""
        for number, (ids, states) in enumerate(zip(self.ids, self.states, strict=True)):
            yield number, self._through(self.depth, ids, states)

    def advance(self) -> None:
        """Carry every window through the layer at ``depth``."""
        for number, output in self.outputs():
            self.states[number] = output
        self.depth += 1

    def _through(self, layer: int, ids: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        return self.walk.through(layer, states, {"input_ids": ids.to(self.subject.device)})

    def _check(self, ids: torch.Tensor) -> None:
        """See that carrying is the model's own forward."""
        carried = _entering(self.subject, ids)
        for layer in range(len(self.subject.layers)):
            carried = self._through(layer, ids, carried)
        plain = _leaving(self.subject, ids)
        if not (carried - plain).abs().max() <= CHECK_TOLERANCE * plain.abs().max():
            raise RefusedError(
                f"the layers of a {self.subject.anatomy.model_type} model hand each other more than the residual "
                "stream: they cannot be fitted one by one"
            )


def _entering(subject: Subject, ids: torch.Tensor) -> torch.Tensor:
    return _seen(subject, ids, 0)[0]


def _leaving(subject: Subject, ids: torch.Tensor) -> torch.Tensor:
    return _seen(subject, ids, len(subject.layers) - 1)[1]


class _Enough(Exception):
    """The state that was wanted has been seen."""


@torch.no_grad()
def _seen(subject: Subject, ids: torch.Tensor, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what enters and what leaves a layer in a plain forward."""
    found: list[torch.Tensor] = []

    def make(index: int, original: Any) -> Any:
        def forward(*args: Any, **kwargs: Any) -> Any:
            output = original(*args, **kwargs)
            if index == layer:
                found.append(split_hidden(args, kwargs)[0])
                found.append(output[0] if isinstance(output, tuple | list) else output)
                raise _Enough
            return output

        return forward

    with replaced_forwards(subject.layers, make), suppress(_Enough):
        subject.model(input_ids=ids.to(subject.device), use_cache=False)
    return found[0], found[1]


@contextmanager
def watching(module: nn.Module) -> Iterator[list[Any]]:
    """Note the (input, output) of a module's last call while the block is open."""
    seen: list[Any] = []

    def note(module: nn.Module, args: Sequence[Any], output: Any) -> None:
        seen[:] = [args[0], output]

    handle = module.register_forward_hook(note)
    try:
        yield seen
    finally:
        handle.remove()
