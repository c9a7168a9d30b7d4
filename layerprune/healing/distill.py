"""Distillation: the pruned model learns from what the intact base says of the text, not from the text alone.

Measured on SmolLM2-135M without six of its 30 layers (docs/notes/2026-11-25-training.md): 4,096 tokens win back half of
what held-out prose lost, at a learning rate of 3e-4 and few windows a step; 8e-4 is too high. Larger models want less.
It can go on from a checkpoint that ``linear`` healed (what that adds was not measured):

    layerprune heal smaller/ -o fitted/ --method linear --corpus text.jsonl
    layerprune heal fitted/ -o healed/ --method distill:steps=200 --corpus text.jsonl
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from layerprune.corpus import pack_documents
from layerprune.errors import UsageError
from layerprune.healing.answers import Author
from layerprune.healing.base import Case, Changed
from layerprune.healing.kept import Kept
from layerprune.healing.places import cuts, final_norm, head_weights, last_layers, layer_weights, seams
from layerprune.healing.processes import leader_first, own_place
from layerprune.healing.teacher import Distilled, Mix
from layerprune.healing.trained import Trained, heal_weights, option, precision_of
from layerprune.subject import Subject


@dataclass(frozen=True)
class Distill(Trained):
    """Train towards the base's next-token distribution: all decoder layers unless told otherwise."""

    lr: float = option(3e-4, "learning rate, at its height")
    batch: int = option(2, "windows of a step, over all processes")
    train: Literal["layers", "all", "seams", "last"] = option(
        "layers", "which weights: decoder layers and final norm, all, the layers at the cuts, or the last three"
    )
    weight: float = option(1.0, "share of the base's word in the loss; the rest is the text's next token")
    temperature: float = option(1.0, "of both distributions; above 1 the base's unlikely tokens count more")
    match: float = option(0.0, "weight of the relative squared distance of hidden states at the cuts")
    answers: Literal["corpus", "base"] = option(
        "corpus", "base: the base first writes the answers of the corpus's chats afresh, and they are what is read"
    )
    answer_tokens: int = option(256, "of an answer that the base writes, at most")
    keep: int = option(0, "keep the base's top so many tokens on disk, to read the text more than once; 0: ask anew")

    needs_base: ClassVar[bool] = True
    cost: ClassVar[str] = "a forward pass of the base, a forward and a backward pass over the text"
    source: ClassVar[str] = "Hinton et al., arXiv:1503.02531; for removed layers: Minitron, arXiv:2408.11796"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.weight <= 1 or self.temperature <= 0 or self.match < 0 or self.keep < 0:
            raise ValueError("weight is from 0 to 1, temperature above 0, match and keep at least 0")
        if self.answer_tokens < 1:
            raise ValueError(f"answer_tokens is {self.answer_tokens} and has to be at least 1")

    def heal(self, case: Case) -> Iterator[Changed]:
        """Yield the distilled weights; the base is loaded once, and writes before it teaches."""
        teacher = own_place(case).base_subject(precision_of(case))
        if self.answers == "base":
            case = self._with_answers(case, teacher)
        yield from heal_weights(
            case, self, lambda subject: self._chosen(case, subject), lambda student: self._goal(case, teacher, student)
        )

    def _with_answers(self, case: Case, teacher: Subject) -> Case:
        """Return the case with a text whose answers are the base's; what is held out stays as it is."""
        author, corpus = Author(teacher, self.answer_tokens), case.text
        with leader_first():  # the first one writes, the others read
            documents = author.rewrite(corpus.documents, case.work / "answers", case.progress)
        train = pack_documents(documents, teacher.tokenizer, corpus.train.window, "what the base has written")
        case.record.notes.append(f"{len(documents)} chats were answered by the base before they were read")
        return replace(case, corpus=replace(corpus, train=train))

    def _chosen(self, case: Case, subject: Subject) -> set[str]:
        every = range(len(subject.layers))
        if self.train == "all":
            return {name for name, _ in subject.model.named_parameters()}
        if self.train == "seams":
            return layer_weights(subject, seams(case.removal, case.receipt.base.layers, 1))
        if self.train == "last":
            return layer_weights(subject, last_layers(subject, min(3, len(every)))) | head_weights(subject)
        return layer_weights(subject, every) | final_norm(subject)

    def _goal(self, case: Case, teacher: Subject, student: Subject) -> Distilled:
        if teacher.vocabulary != student.vocabulary:
            raise UsageError(f"the base has {teacher.vocabulary} tokens and the pruned model {student.vocabulary}")
        kept = None
        if self.keep:
            windows = case.text.train
            kept = Kept.of(case.work / "teacher", teacher, windows, self.keep, self.temperature)
            with leader_first():  # the first one asks, the others find the answers
                case.record.tokens += kept.fill(teacher, windows, self.forward_windows(case, teacher), case.progress)
        mix = Mix(self.weight, self.temperature, self.match)
        return Distilled(mix, teacher, student, cuts(case.removal, case.receipt.base.layers), kept)
