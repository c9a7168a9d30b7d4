"""The losses of a student: the text's next token or the teacher's distribution, computed in pieces of the head."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from layerprune.data.corpus import Windows
from layerprune.errors import ModelError
from layerprune.scoring.walk import replaced_forwards
from layerprune.util import SILENT, Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel


# The loss of a model on windows of text: the figure that healing is measured by.


BATCH_TOKENS = 4096


def batches(windows: Windows) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return token ids, and which count, in batches of up to ``BATCH_TOKENS`` tokens: both (windows, tokens)."""
    rows = max(1, BATCH_TOKENS // windows.window)
    parts = (torch.from_numpy(array).split(rows) for array in (windows.ids, windows.counted))
    return list(zip(*parts, strict=True))


def id_batches(windows: Windows) -> list[torch.Tensor]:
    """Return the token ids of windows in batches, each (windows, tokens)."""
    return [ids for ids, _ in batches(windows)]


@torch.no_grad()
def mean_nats(model: nn.Module, windows: Windows, progress: Progress = SILENT, label: str = "reading text") -> float:
    """Return the mean negative log-likelihood of the counted tokens, nats per token.

    Log-probabilities are taken in float32 whatever the model's dtype, sums in float64. The first token of a window is
    predicted from nothing and does not count.
    """
    total, count = 0.0, 0
    with progress.task(label, windows.tokens, "tokens") as advance:
        for rows, counted in batches(windows):
            ids = rows.to(model.device)  # type: ignore[arg-type]
            wanted = counted[:, 1:].to(ids.device)  # (windows, tokens - 1)
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1][wanted]  # (counted, vocabulary)
            nats = nn.functional.cross_entropy(logits.float(), ids[:, 1:][wanted], reduction="none")
            total += float(nats.double().sum())
            count += len(nats)
            advance(ids.numel())
    return total / count


# What a student is trained towards: the text itself, here; what the intact base says of it, in ``distill``.


Tensor = torch.Tensor
# (float32 logits of a piece, which may be overwritten; its slice of the places)
# -> (loss summed over its places, gradient of the loss by the logits)
LogitsLoss = Callable[[Tensor, slice], tuple[Tensor, Tensor]]


class NextToken:
    """Plain language modelling: minus the log-probability of the text. Other goals of training derive from it."""

    key = "next token"  # its settings in words; runs with different ones are different runs

    def prepare(self, rows: Tensor, ids: Tensor, wanted: Tensor, labels: Tensor) -> LogitsLoss:
        """Get ready for a batch and return the loss of its logits.

        ``rows`` (windows,) are the windows' numbers, ``ids`` (windows, tokens), ``wanted`` (windows, tokens - 1) says
        at which places the next token counts, ``labels`` (places,) are those next tokens.
        """
        return lambda logits, piece: cross_entropy(logits, labels[piece])

    def auxiliary_loss(self, wanted: Tensor) -> Tensor:
        """Return what is added to the loss once the student has read the batch, summed over its places."""
        return torch.zeros((), device=wanted.device)


# The losses, place by place: the text's next token, and what the intact base says comes next.
#
# Each loss is given logits in float32 that it may overwrite, (places, vocabulary), and returns its sum over the places
# and its gradient by the logits. They are spelt out, for passes over logits are what they cost (``engine.likelihood``).


@dataclass(frozen=True)
class Top:
    """A teacher's most likely tokens at some places, at a temperature; what is left over is one more outcome."""

    tokens: Tensor  # (places, k) token ids
    probabilities: Tensor  # (places, k) float32; they sum to at most 1

    def __getitem__(self, piece: slice) -> Top:
        return Top(self.tokens[piece], self.probabilities[piece])

    @classmethod
    def of(cls, logits: Tensor, k: int, temperature: float) -> Top:
        """Return the ``k`` likeliest of each row of logits."""
        wide = logits.float() / temperature
        values, tokens = wide.topk(min(k, wide.shape[-1]), dim=-1)
        return cls(tokens, (values - wide.logsumexp(-1, keepdim=True)).exp())


def cross_entropy(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return minus the log-probability of the labels (places,), nats: sum, and softmax minus one-hot."""
    logits -= logits.amax(-1, keepdim=True)
    chosen = logits.gather(-1, labels[:, None])
    total = _softmax_of_shifted(logits)
    logits.scatter_add_(-1, labels[:, None], -torch.ones_like(chosen))
    return (total.log() - chosen).sum(), logits


def divergence(logits: Tensor, teacher: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Return KL(teacher || student) in nats of the two distributions at a temperature: sum, and gradient.

    ``teacher`` are logits that may be overwritten, too. Both are times temperature squared, which keeps the gradient's
    size (Hinton et al., arXiv:1503.02531).
    """
    for each in (logits, teacher):
        each -= each.amax(-1, keepdim=True)
        if temperature != 1:
            each /= temperature
    apart = teacher - logits  # of shifted logits; the log-sums are added below
    total, teacher_total = _softmax_of_shifted(logits), _softmax_of_shifted(teacher)
    value = torch.linalg.vecdot(teacher, apart).sum() + (total.log() - teacher_total.log()).sum()
    return value * temperature**2, logits.sub_(teacher).mul_(temperature)


def divergence_from_top(logits: Tensor, top: Top, temperature: float) -> tuple[Tensor, Tensor]:
    """Return KL(teacher || student) where the teacher's tokens beyond its top ones count as one outcome, as above.

    It is never more than the KL over the whole vocabulary, and equal to it when k is the whole vocabulary.
    """
    logits -= logits.amax(-1, keepdim=True)
    if temperature != 1:
        logits /= temperature
    shifted = logits.gather(-1, top.tokens)
    total = _softmax_of_shifted(logits)
    logs = shifted - total.log()  # the student's log-probabilities of the teacher's top tokens
    teacher, student = top.probabilities, logs.exp()
    logits.scatter_(-1, top.tokens, 0.0)
    student_rest = logits.sum(-1, keepdim=True).clamp_min(TINY)  # summed, not 1 - ...: exact where it is small
    rest = (1 - teacher.sum(-1, keepdim=True)).clamp_min(TINY)
    value = (teacher * (teacher.clamp_min(TINY).log() - logs)).sum() + (rest * (rest / student_rest).log()).sum()
    logits *= 1 - rest / student_rest
    logits.scatter_(-1, top.tokens, student - teacher)
    return value * temperature**2, logits.mul_(temperature)


TINY = 1e-12  # a probability that stands for none, in float32


def _softmax_of_shifted(logits: Tensor) -> Tensor:
    """Turn logits whose largest is 0 into probabilities, in place; return the sums of exponentials, (places, 1)."""
    total = logits.exp_().sum(-1, keepdim=True)
    logits /= total
    return total


# From hidden states to a loss without the logits of a whole batch: the head is computed in pieces, once.
#
# A loss on a sum over tokens needs of the logits only their gradient, which the softmax gives on the spot: so each
# piece of logits is made, graded, sent back through the head and forgotten within the forward pass. Memory is that of
# one piece instead of several times (tokens, vocabulary), and nothing is computed twice.


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
        answer = _decoder_output(hidden[None])
        with replaced_forwards([self.decoder], lambda index, original: lambda *args, **kwargs: answer):
            found: Tensor = self.model(input_ids=ids, use_cache=False).logits[0]
        return found

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

    def loss(self, hidden: Tensor, of_logits: LogitsLoss) -> Tensor:
        """Return the sum of a loss over all places, differentiable by ``hidden`` and the head's own weights.

        These are the trainable ones of the output embeddings, which may be tied to the input's.
        """
        weights = [weight for weight in self.model.get_output_embeddings().parameters() if weight.requires_grad]
        found: Tensor = _Pieces.apply(self, of_logits, hidden, *weights)  # type: ignore[no-untyped-call]
        return found


class _Pieces(torch.autograd.Function):
    """A sum over places of a function of their logits; its gradient is worked out in the forward pass."""

    @staticmethod
    def forward(ctx: Any, head: Head, of_logits: LogitsLoss, hidden: Tensor, *weights: Tensor) -> Tensor:
        total = torch.zeros((), dtype=torch.float64 if hidden.dtype == torch.float64 else torch.float32)
        total = total.to(hidden.device)
        by_hidden = torch.empty_like(hidden)
        by_weights = [torch.zeros_like(weight) for weight in weights]
        for piece in head.pieces(len(hidden)):
            with torch.enable_grad():
                part = hidden[piece].detach().requires_grad_()
                logits = head.logits(part)
            value, by_logits = of_logits(logits.detach().to(torch.float32, copy=True), piece)
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


def _decoder_output(hidden: Tensor) -> Any:
    """Return hidden states as a decoder of any kind answers with them: caches, router logits and the like are None."""
    from transformers.modeling_outputs import BaseModelOutput

    class Answer(BaseModelOutput):
        """An output whose other fields are None."""

        def __getattr__(self, name: str) -> None:
            if name.startswith("__"):
                raise AttributeError(name)

    return Answer(last_hidden_state=hidden)
