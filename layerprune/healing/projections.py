"""The projections that write into the residual stream, and that stream read from layer to layer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from layerprune.errors import RefusedError
from layerprune.healing.base import ATTENTION, MLP
from layerprune.models.model import LoadedModel
from layerprune.scoring.walk import Walk, replaced_forwards, split_hidden

# The projections that write into the residual stream, found by what they do and not by a table of names.


# A push on a projection's output must come out of the layer unchanged but for rounding. bfloat16 keeps 8 bits.
PUSH_TOLERANCE = {torch.bfloat16: 3e-2, torch.float16: 5e-3, torch.float32: 1e-4, torch.float64: 1e-10}

AFTER_MLP = {"post_feedforward_layernorm", "post_mlp_layernorm", "post_ffn_norm"}  # norms of what the MLP writes


@dataclass(frozen=True)
class Projection:
    """A linear module whose output a layer adds to the residual stream as it is."""

    path: str  # of the module in the model, "model.layers.3.mlp.down_proj"
    module: nn.Module

    @property
    def transposed(self) -> bool:
        """Whether the weight is (in, out), as in GPT-2's Conv1D, and not (out, in), as in nn.Linear."""
        return not isinstance(self.module, nn.Linear)

    @property
    def bias(self) -> bool:
        return getattr(self.module, "bias", None) is not None

    @property
    def bias_value(self) -> torch.Tensor | None:
        """A copy of the bias, None where there is none."""
        return self.module.bias.detach().clone() if self.bias else None  # type: ignore[operator,union-attr]

    @property
    def matrix(self) -> torch.Tensor:
        """The weight as (out, in)."""
        weight: torch.Tensor = self.module.weight.detach()  # type: ignore[assignment,operator]
        return weight.T if self.transposed else weight

    def put(self, matrix: torch.Tensor, bias: torch.Tensor | None) -> None:
        """Set the weight, given as (out, in), and the bias, where there is one; rounded to the model's dtype."""
        with torch.no_grad():
            self.module.weight.copy_(matrix.T if self.transposed else matrix)  # type: ignore[operator,union-attr]
            if bias is not None:
                self.module.bias.copy_(bias)  # type: ignore[operator,union-attr]

    def weights(self) -> dict[str, torch.Tensor]:
        """The module's weights by parameter name."""
        return {f"{self.path}.{name}": value.detach() for name, value in self.module.named_parameters()}


def down_projection(stream: Stream) -> Projection:
    """Return the projection through which the MLP of the layer at the stream's depth writes into the residual stream.

    Found by pushing: what is added to the output of the right module comes out of the layer as it went in. Raises
    ``RefusedError`` naming the layer where there is none: a norm or a scale behind the MLP, or a mixture of experts.
    """
    found = [each for each in _linear_modules(stream) if _of_mlp(stream, each) and _arrives(stream, each.module)]
    if len(found) != 1:
        raise _refusal(stream, "MLP", found)
    return found[0]


def output_projections(stream: Stream) -> list[Projection]:
    """Return all that the layer at the stream's depth writes into the residual stream through: attention's, then MLP's.

    A push on the attention's goes on through the MLP, which is silenced for it. Raises ``RefusedError`` as above.
    """
    children = stream.loaded.layers[stream.depth].named_children()
    with _silent([child for name, child in children if name in MLP | AFTER_MLP]):
        rest = [each for each in _linear_modules(stream) if not _of_mlp(stream, each)]
        first = [each for each in rest if _arrives(stream, each.module)]
    if len(first) != 1:
        raise _refusal(stream, "attention", first)
    return [*first, down_projection(stream)]


def _linear_modules(stream: Stream) -> list[Projection]:
    loaded, depth = stream.loaded, stream.depth
    width = stream.states[0].shape[-1]
    modules = loaded.layers[depth].named_modules()
    return [
        Projection(f"{loaded.architecture.stack}.{depth}.{name}", module)
        for name, module in modules
        if _writes(module, width)
    ]


def _of_mlp(stream: Stream, projection: Projection) -> bool:
    inner = projection.path.removeprefix(f"{stream.loaded.architecture.stack}.{stream.depth}.")
    return inner.partition(".")[0] in MLP or not set(inner.split(".")) & ATTENTION


def _refusal(stream: Stream, part: str, found: list[Projection]) -> RefusedError:
    count = f"{len(found)} of its linear modules write" if found else "none of its linear modules writes"
    return RefusedError(
        f"the {part} of layer {stream.depth} of this {stream.loaded.architecture.model_type} model has no single "
        f"output projection to fold anything into: {count} into the residual stream as it is (a norm or a scale may "
        "stand behind them, or experts may be chosen); a method that trains heals it"
    )


def _writes(module: nn.Module, width: int) -> bool:
    weight = getattr(module, "weight", None)
    if isinstance(module, nn.Linear):
        return isinstance(weight, torch.Tensor) and weight.is_floating_point() and weight.shape[0] == width
    conv1d = type(module).__name__ == "Conv1D" and isinstance(weight, torch.Tensor)  # transformers' own, of GPT-2
    return conv1d and weight.shape[1] == width  # type: ignore[union-attr]


def _arrives(stream: Stream, module: nn.Module) -> bool:
    """Whether what is added to a module's output is added to the layer's output, neither more nor less."""
    ids, states = stream.ids[0][:1, :8], stream.states[0][:1, :8]
    before = stream.walk.through(stream.depth, states, {"input_ids": ids.to(states.device)})
    push = torch.randn(before.shape, generator=torch.Generator().manual_seed(0)).to(before)
    push = push * before.square().mean().sqrt()
    with _pushed(module, push) as calls:
        after = stream.walk.through(stream.depth, states, {"input_ids": ids.to(states.device)})
    if len(calls) != 1:
        return False
    missed = (after.double() - before.double() - push.double()).norm() / push.double().norm()
    return bool(missed <= PUSH_TOLERANCE[before.dtype])


@contextmanager
def _silent(modules: list[nn.Module]) -> Iterator[None]:
    """Have modules answer with zeros."""

    def zeros(module: nn.Module, args: Any, output: Any) -> Any:
        if isinstance(output, torch.Tensor):
            return torch.zeros_like(output)
        return type(output)((torch.zeros_like(output[0]), *output[1:]))

    handles = [module.register_forward_hook(zeros) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _pushed(module: nn.Module, push: torch.Tensor) -> Iterator[list[None]]:
    calls: list[None] = []

    def add(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        calls.append(None)
        return output + push.reshape(output.shape) if output.numel() == push.numel() else output

    handle = module.register_forward_hook(add)
    try:
        yield calls
    finally:
        handle.remove()


# The residual stream of a model on windows of text, carried from layer to layer: each layer runs once per window.
#
# What is kept is one hidden state per token, at one depth; activations inside a layer are seen by a watcher and
# forgotten.


CHECK_TOKENS = 16
# One kernel on the same numbers: nothing but the order of additions may differ.
CHECK_TOLERANCE = 1e-2  # of the largest state


class Stream:
    """The states of all windows in front of one layer."""

    def __init__(self, loaded: LoadedModel, ids: Sequence[torch.Tensor]) -> None:
        """Embed batches of token ids, each (windows, tokens).

        Raises ``RefusedError`` where layers hand each other more than the residual stream.
        """
        self.loaded = loaded
        self.walk = Walk(loaded.model, loaded.layers)
        few = ids[0][:1, :CHECK_TOKENS]
        self.walk.learn_outputs({"input_ids": few.to(loaded.device)})
        self._check(few)
        self.depth = 0
        self.ids = list(ids)
        self.states = [_entering(loaded, rows) for rows in ids]  # each (windows, tokens, hidden)

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
        return self.walk.through(layer, states, {"input_ids": ids.to(self.loaded.device)})

    def _check(self, ids: torch.Tensor) -> None:
        """See that carrying is the model's own forward."""
        carried = _entering(self.loaded, ids)
        for layer in range(len(self.loaded.layers)):
            carried = self._through(layer, ids, carried)
        plain = _leaving(self.loaded, ids)
        if not (carried - plain).abs().max() <= CHECK_TOLERANCE * plain.abs().max():
            raise RefusedError(
                f"the layers of a {self.loaded.architecture.model_type} model hand each other more than the residual "
                "stream: they cannot be fitted one by one"
            )


def _entering(loaded: LoadedModel, ids: torch.Tensor) -> torch.Tensor:
    return _seen(loaded, ids, 0)[0]


def _leaving(loaded: LoadedModel, ids: torch.Tensor) -> torch.Tensor:
    return _seen(loaded, ids, len(loaded.layers) - 1)[1]


class _Enough(Exception):
    """The state that was wanted has been seen."""


@torch.no_grad()
def _seen(loaded: LoadedModel, ids: torch.Tensor, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
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

    with replaced_forwards(loaded.layers, make), suppress(_Enough):
        loaded.model(input_ids=ids.to(loaded.device), use_cache=False)
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
