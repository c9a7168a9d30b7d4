"""What a student is graded by, place by place: the text's next token, and what the intact base says comes next.

Each loss is given logits in float32 that it may overwrite, (places, vocabulary), and returns its sum over the places
and its gradient by the logits. They are spelt out, for passes over logits are what they cost (``engine.likelihood``).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

Tensor = torch.Tensor


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
