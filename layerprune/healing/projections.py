"""The projections that write into the residual stream, and that stream read from layer to layer."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from torch import nn

from layerprune.data.corpus import Windows
from layerprune.errors import RefusedError
from layerprune.healing.base import ATTENTION, MLP
from layerprune.models.model import LoadedModel
from layerprune.scoring.walk import Walk, split_hidden

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
    def matrix(self) -> torch.Tensor:
        """The weight as (out, in)."""
        weight: torch.Tensor = self.module.weight.detach()  # type: ignore[assignment,operator]
        return weight.T if self.transposed else weight

    @property
    def weights(self) -> dict[str, nn.Parameter]:
        """The module's weights by parameter name."""
        return dict(self.module.named_parameters(prefix=self.path))


def down_projection(stream: Stream) -> Projection:
    """Return the projection through which the MLP of the layer at the stream's depth writes into the residual stream.

    Found by pushing: what is added to the output of the right module comes out of the layer as it went in. Raises
    ``RefusedError`` naming the layer where there is none: a norm or a scale behind the MLP, or a mixture of experts.
    """
    return _only_projection(stream, "MLP")


def output_projections(stream: Stream) -> list[Projection]:
    """Return all that the layer at the stream's depth writes into the residual stream through: attention's, then MLP's.

    A push on the attention's goes on through the MLP, which is silenced for it. Raises ``RefusedError`` as above.
    """
    with ExitStack() as silenced:
        for name, child in stream.loaded.layers[stream.depth].named_children():
            if name in MLP | AFTER_MLP:
                silenced.enter_context(child.register_forward_hook(_zeros))
        attention = _only_projection(stream, "attention")
    return [attention, down_projection(stream)]


Found = TypeVar("Found")


def probe(
    loaded: LoadedModel, windows: Windows, layers: Collection[int], find: Callable[[Stream], Found]
) -> dict[int, Found]:
    """Return what ``find`` says of the stream in front of each of some layers.

    A few tokens are enough: a refusal must not come after minutes of reading.
    """
    stream, found = Stream(loaded, [torch.from_numpy(windows.ids[:1, :CHECK_TOKENS])]), {}
    while stream.depth <= max(layers, default=-1):
        if stream.depth in layers:
            found[stream.depth] = find(stream)
        stream.advance()
    return found


def _only_projection(stream: Stream, part: Literal["attention", "MLP"]) -> Projection:
    """Return the linear module of a part of the layer whose output arrives in the stream; refused unless it is one."""
    model, width = stream.loaded.architecture, stream.states[0].shape[-1]
    found = []
    for name, module in stream.loaded.layers[stream.depth].named_modules():
        names = name.split(".")
        of_mlp = names[0] in MLP or not ATTENTION & set(names)
        if of_mlp == (part == "MLP") and _writes(module, width) and _arrives(stream, module):
            found.append(Projection(f"{model.stack}.{stream.depth}.{name}", module))
    if len(found) == 1:
        return found[0]
    count = f"{len(found)} of its linear modules write" if found else "none of its linear modules writes"
    raise RefusedError(
        f"the {part} of layer {stream.depth} of this {model.model_type} model has no single "
        f"output projection to fold anything into: {count} into the residual stream as it is (a norm or a scale may "
        "stand behind them, or experts may be chosen); a method that trains heals it"
    )


def _writes(module: nn.Module, width: int) -> bool:
    """Whether a module is linear with ``width`` outputs."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, torch.Tensor):
        return False
    if isinstance(module, nn.Linear):
        return weight.is_floating_point() and weight.shape[0] == width
    return type(module).__name__ == "Conv1D" and weight.shape[1] == width  # transformers' own, of GPT-2


def _arrives(stream: Stream, module: nn.Module) -> bool:
    """Whether what is added to a module's output is added to the layer's output, neither more nor less."""
    ids, states = stream.ids[0][:1, :8], stream.states[0][:1, :8]
    before = stream.through(stream.depth, ids, states)
    push = torch.randn(before.shape, generator=torch.Generator().manual_seed(0)).to(before)
    push = push * before.square().mean().sqrt()
    calls = 0

    def add(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return output + push.reshape(output.shape) if output.numel() == push.numel() else output

    with module.register_forward_hook(add):
        after = stream.through(stream.depth, ids, states)
    missed = (after.double() - before.double() - push.double()).norm() / push.double().norm()
    return calls == 1 and bool(missed <= PUSH_TOLERANCE[before.dtype])


def _zeros(module: nn.Module, args: Any, output: Any) -> Any:
    """Answer with zeros in place of a module's output."""
    if isinstance(output, torch.Tensor):
        return torch.zeros_like(output)
    return type(output)((torch.zeros_like(output[0]), *output[1:]))


# The residual stream of a model on windows of text, carried from layer to layer: each layer runs once per window.
#
# What is kept is one hidden state per token, at one depth; activations inside a layer are seen by a hook and forgotten.


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
        self.walk = Walk(loaded.model, loaded.layers, loaded.held)
        few = ids[0][:1, :CHECK_TOKENS]
        self.walk.learn_outputs({"input_ids": few.to(loaded.device)})
        self._check(few)
        self.depth = 0
        self.ids = list(ids)
        with loaded.held(0):
            self.states = [_around(loaded, rows, 0)[0] for rows in ids]  # each (windows, tokens, hidden)

    def outputs(self) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield, batch by batch, its number and what the layer at ``depth`` makes of it; nothing is moved on."""
        with self.loaded.held(self.depth):
            for number, (ids, states) in enumerate(zip(self.ids, self.states, strict=True)):
                yield number, self.through(self.depth, ids, states)

    def advance(self) -> None:
        """Carry every window through the layer at ``depth``."""
        for number, output in self.outputs():
            self.states[number] = output
        self.depth += 1

    def through(self, layer: int, ids: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        """Return what a layer makes of states, (windows, tokens, hidden)."""
        return self.walk.through(layer, states, {"input_ids": ids.to(self.loaded.device)})

    def _check(self, ids: torch.Tensor) -> None:
        """See that carrying is the model's own forward."""
        carried = _around(self.loaded, ids, 0)[0]
        for layer in range(len(self.loaded.layers)):
            carried = self.through(layer, ids, carried)
        plain = _around(self.loaded, ids, len(self.loaded.layers) - 1)[1]
        if not (carried - plain).abs().max() <= CHECK_TOLERANCE * plain.abs().max():
            raise RefusedError(
                f"the layers of a {self.loaded.architecture.model_type} model hand each other more than the residual "
                "stream: they cannot be fitted one by one"
            )


class _Enough(Exception):
    """The state that was wanted has been seen."""


@torch.no_grad()
def _around(loaded: LoadedModel, ids: torch.Tensor, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what enters and what leaves a layer in a plain forward."""
    found: list[torch.Tensor] = []

    def note(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        found.append(split_hidden(args, kwargs)[0])
        found.append(output[0] if isinstance(output, tuple | list) else output)
        raise _Enough

    with loaded.layers[layer].register_forward_hook(note, with_kwargs=True), suppress(_Enough):
        loaded.model(input_ids=ids.to(loaded.device), use_cache=False)
    return found[0], found[1]
