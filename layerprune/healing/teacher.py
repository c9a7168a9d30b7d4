"""The intact base as a teacher: what it says comes next, computed as it is needed or kept on disk beforehand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from layerprune.errors import UsageError
from layerprune.healing.goals import own
from layerprune.healing.grading import Top, cross_entropy, divergence, divergence_from_top
from layerprune.healing.head import Grade, Head
from layerprune.healing.kept import Kept
from layerprune.healing.places import Cut
from layerprune.subject import Subject

Tensor = torch.Tensor


@dataclass(frozen=True)
class Mix:
    """What a distilled student is graded by."""

    weight: float = 1.0  # of the teacher's word; the rest is the text's next token
    temperature: float = 1.0
    match: float = 0.0  # of the hidden states at the cuts


@dataclass
class Distilled:
    """The goal of distillation: KL from the teacher, the text itself, and the teacher's states at the cuts."""

    mix: Mix
    teacher: Subject
    student: Subject
    cuts: Sequence[Cut] = ()
    kept: Kept | None = None  # the teacher's word on disk; None: it is asked on the way
    _matcher: Matcher | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.teacher.model.requires_grad_(False).eval()
        if self.mix.match:
            self._matcher = Matcher(self.teacher, self.student, self.cuts)

    @property
    def key(self) -> str:
        kept = "" if self.kept is None else f" top {self.kept.k}"
        return f"distilled {self.mix} from {self.teacher.ref.fingerprint}{kept}"

    def prepare(self, rows: Tensor, ids: Tensor, wanted: Tensor, labels: Tensor) -> Grade:
        top = None if self.kept is None else self.kept.read(rows, wanted)
        states = None
        if top is None or self._matcher is not None:
            with torch.no_grad():
                states = Head(self.teacher.model).hidden(ids)[:, :-1][wanted]
        return self._grade(labels, top, states)

    def beside(self, wanted: Tensor) -> Tensor:
        if self._matcher is None:
            return torch.zeros((), device=wanted.device)
        return self.mix.match * self._matcher.distance(wanted)

    def _grade(self, labels: Tensor, top: Top | None, states: Tensor | None) -> Grade:
        head, weight, temperature = Head(self.teacher.model), self.mix.weight, self.mix.temperature

        def taught(logits: Tensor, piece: slice) -> tuple[Tensor, Tensor]:
            if top is not None:
                return divergence_from_top(own(logits), top[piece], temperature)
            assert states is not None  # asked for whenever there is no top
            with torch.no_grad():
                return divergence(own(logits), own(head.logits(states[piece])), temperature)

        def grade(logits: Tensor, piece: slice) -> tuple[Tensor, Tensor]:
            if weight == 1:
                return taught(logits, piece)
            value, gradient = cross_entropy(own(logits), labels[piece])
            if weight:
                by_teacher, slope = taught(logits, piece)
                value = (1 - weight) * value + weight * by_teacher
                gradient = gradient.mul_(1 - weight).add_(slope, alpha=weight)
            return value, gradient

        return grade


class Matcher:
    """Watches both models at the cuts: how far the student's states are from those they stand for."""

    def __init__(self, teacher: Subject, student: Subject, cuts: Sequence[Cut]) -> None:
        self.cuts = [cut for cut in cuts if cut.after >= 0]  # before its first layer a student has nothing to move
        if not self.cuts:
            raise UsageError("match compares states at cuts, and no cut has a layer before it; leave match out")
        self.seen: dict[tuple[str, int], Tensor] = {}
        for cut in self.cuts:
            self._watch("student", student.layers[cut.after], cut.after)
            self._watch("teacher", teacher.layers[cut.resumes - 1], cut.resumes)

    def _watch(self, who: str, layer: nn.Module, number: int) -> None:
        def look(module: nn.Module, args: Any, output: Any) -> None:
            self.seen[who, number] = output[0] if isinstance(output, tuple) else output

        layer.register_forward_hook(look)

    def distance(self, wanted: Tensor) -> Tensor:
        """Return the squared distance over the teacher's squared length, summed over places, the mean of the cuts."""
        total = torch.zeros((), device=wanted.device)
        for cut in self.cuts:
            mine = self.seen.pop(("student", cut.after))[:, :-1][wanted].float()  # (places, hidden)
            theirs = self.seen.pop(("teacher", cut.resumes))[:, :-1][wanted].float()
            total = total + ((mine - theirs).pow(2).sum(-1) / theirs.pow(2).sum(-1)).sum()
        return total / len(self.cuts)
