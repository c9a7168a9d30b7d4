"""From hidden states to a loss without the logits of a whole batch: the head is computed in pieces, once.

A loss on a sum over tokens needs of the logits only their gradient, which the softmax gives on the spot: so each piece
of logits is made, graded, sent back through the head and forgotten within the forward pass. Memory is that of one piece
instead of several times (tokens, vocabulary), and nothing is computed twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from layerprune.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Tensor = torch.Tensor
# (logits of a piece, its slice of the places) -> (loss summed over its places, gradient of the loss by the logits)
Grade = Callable[[Tensor, slice], tuple[Tensor, Tensor]]

PIECE_BYTES = 25 * 2**20  # float32 logits of a piece: below what malloc maps anew, and clears, at every allocation
TOLERANCE = 0.03  # of the largest logit, between the head in pieces and the model's own forward: bfloat16 rounds so


class Head:
    """What a causal LM does between its decoder's last hidden states and its logits: head, scaling, soft caps.

    The model's own forward does it, with the decoder standing still: no table of architectures is needed.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.decoder: nn.Module = model.base_model
        if self.decoder is model:
            raise ModelError(f"{type(model).__name__} has no decoder apart from its head")
        self.vocabulary = int(model.get_output_embeddings().weight.shape[0])

    def hidden(self, ids: Tensor) -> Tensor:
        """Return the decoder's last hidden states of windows, (windows, tokens) -> (windows, tokens, hidden)."""
        found: Tensor = self.decoder(input_ids=ids, use_cache=False).last_hidden_state
        return found

    def logits(self, hidden: Tensor) -> Tensor:
        """Return what the model's forward makes of hidden states, (places, hidden) -> (places, vocabulary)."""
        ids = torch.zeros(1, len(hidden), dtype=torch.long, device=hidden.device)
        with _answering(self.decoder, hidden[None]):
            found: Tensor = self.model(input_ids=ids, use_cache=False).logits[0]
        return found

    @property
    def weights(self) -> list[nn.Parameter]:
        """Trainable weights of the output embeddings, which may be tied to the input's."""
        return [weight for weight in self.model.get_output_embeddings().parameters() if weight.requires_grad]

    @torch.no_grad()
    def check(self, ids: Tensor) -> None:
        """Raise ``ModelError`` where head and decoder apart are not the model; ``ids``: (windows, tokens), small."""
        whole = self.model(input_ids=ids, use_cache=False).logits.float()
        parts = self.logits(self.hidden(ids).flatten(0, 1)).float().view_as(whole)
        worst = float((whole - parts).abs().max() / whole.abs().max().clamp_min(1e-9))
        if not worst <= TOLERANCE:
            raise ModelError(
                f"the head of a {self.model.config.model_type} model cannot be run apart from its decoder: logits "
                f"differ by {worst:.2g} of the largest"
            )

    def pieces(self, places: int) -> Iterator[slice]:
        """Yield slices of ``places`` whose float32 logits take ``PIECE_BYTES`` at most."""
        size = max(1, PIECE_BYTES // (4 * self.vocabulary))
        yield from (slice(start, min(start + size, places)) for start in range(0, places, size))

    def loss(self, hidden: Tensor, grade: Grade) -> Tensor:
        """Return the sum of ``grade`` over all places, differentiable by ``hidden`` and the head's own weights."""
        found: Tensor = _Pieces.apply(self, grade, hidden, *self.weights)  # type: ignore[no-untyped-call]
        return found


class _Pieces(torch.autograd.Function):
    """A sum over places of a function of their logits; its gradient is worked out in the forward pass."""

    @staticmethod
    def forward(ctx: Any, head: Head, grade: Grade, hidden: Tensor, *weights: Tensor) -> Tensor:
        total = torch.zeros((), dtype=torch.float64 if hidden.dtype == torch.float64 else torch.float32)
        total = total.to(hidden.device)
        by_hidden = torch.empty_like(hidden)
        by_weights = [torch.zeros_like(weight) for weight in weights]
        for piece in head.pieces(len(hidden)):
            with torch.enable_grad():
                part = hidden[piece].detach().requires_grad_()
                logits = head.logits(part)
            value, by_logits = grade(logits.detach(), piece)
            total += value
            first, *rest = torch.autograd.grad(logits, (part, *weights), by_logits.to(logits.dtype))
            by_hidden[piece] = first
            for sum_, gradient in zip(by_weights, rest, strict=True):
                sum_ += gradient
        ctx.save_for_backward(by_hidden, *by_weights)
        return total

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> Any:
        by_hidden, *by_weights = ctx.saved_tensors
        return None, None, by_hidden * outer[0], *(gradient * outer[0] for gradient in by_weights)


@contextmanager
def _answering(decoder: nn.Module, hidden: Tensor) -> Iterator[None]:
    """Have the decoder answer with these hidden states, whatever it is given."""
    from transformers.modeling_outputs import BaseModelOutput

    class Answer(BaseModelOutput):
        """What decoders of all kinds answer with: caches, router logits and the like are None."""

        def __getattr__(self, name: str) -> None:
            if name.startswith("__"):
                raise AttributeError(name)

    own = vars(decoder).get("forward")
    decoder.forward = lambda *args, **kwargs: Answer(last_hidden_state=hidden)
    try:
        yield
    finally:
        if own is None:
            del decoder.forward
        else:
            decoder.forward = own
