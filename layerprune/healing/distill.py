"""Distillation: the pruned model learns from what the intact base says of the text, not from the text alone."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import nn

from layerprune.data.corpus import TextDocument, Windows, pack_documents, render
from layerprune.errors import UsageError
from layerprune.files import reserve, writing
from layerprune.healing.base import (
    Changed,
    Cut,
    HealContext,
    cuts,
    final_norm,
    head_weights,
    last_layers,
    layer_weights,
    seams,
)
from layerprune.healing.finetune import Trained, heal_weights, option, precision_of
from layerprune.healing.losses import Grade, Head, Top, cross_entropy, divergence, divergence_from_top, own
from layerprune.healing.training import leader_first, own_place
from layerprune.models.model import LoadedModel
from layerprune.scoring.cached_evaluator import Journal
from layerprune.util import SILENT, Progress


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

    def heal(self, case: HealContext) -> Iterator[Changed]:
        """Yield the distilled weights; the base is loaded once, and writes before it teaches."""
        teacher = own_place(case).load_base(precision_of(case))
        if self.answers == "base":
            case = self._with_answers(case, teacher)
        yield from heal_weights(
            case, self, lambda loaded: self._chosen(case, loaded), lambda student: self._goal(case, teacher, student)
        )

    def _with_answers(self, case: HealContext, teacher: LoadedModel) -> HealContext:
        """Return the case with a text whose answers are the base's; what is held out stays as it is."""
        author, corpus = AnswerWriter(teacher, self.answer_tokens), case.text
        with leader_first():  # the first one writes, the others read
            documents = author.rewrite(corpus.documents, case.work / "answers", case.progress)
        train = pack_documents(documents, teacher.tokenizer, corpus.train.window, "what the base has written")
        case.record.notes.append(f"{len(documents)} chats were answered by the base before they were read")
        return replace(case, corpus=replace(corpus, train=train))

    def _chosen(self, case: HealContext, loaded: LoadedModel) -> set[str]:
        every = range(len(loaded.layers))
        if self.train == "all":
            return {name for name, _ in loaded.model.named_parameters()}
        if self.train == "seams":
            return layer_weights(loaded, seams(case.removal, case.receipt.base.layers, 1))
        if self.train == "last":
            return layer_weights(loaded, last_layers(loaded, min(3, len(every)))) | head_weights(loaded)
        return layer_weights(loaded, every) | final_norm(loaded)

    def _goal(self, case: HealContext, teacher: LoadedModel, student: LoadedModel) -> DistillationLoss:
        if teacher.vocabulary != student.vocabulary:
            raise UsageError(f"the base has {teacher.vocabulary} tokens and the pruned model {student.vocabulary}")
        kept = None
        if self.keep:
            windows = case.text.train
            kept = TeacherCache.of(case.work / "teacher", teacher, windows, self.keep, self.temperature)
            with leader_first():  # the first one asks, the others find the answers
                case.record.tokens += kept.fill(teacher, windows, self.forward_windows(case, teacher), case.progress)
        mix = DistillationMix(self.weight, self.temperature, self.match)
        return DistillationLoss(mix, teacher, student, cuts(case.removal, case.receipt.base.layers), kept)


# What a teacher says of every window, kept on disk: its likeliest tokens at every place, with their probabilities.


Tensor = torch.Tensor

TOKENS, PROBABILITIES, DONE = "tokens.npy", "probabilities.npy", "done"


@dataclass(frozen=True)
class TeacherCache:
    """The top ``k`` tokens of a teacher at a temperature; 8 k bytes a place."""

    folder: Path
    k: int
    temperature: float

    @classmethod
    def of(cls, home: Path, teacher: LoadedModel, windows: Windows, k: int, temperature: float) -> TeacherCache:
        """Return the keeping place for this teacher and text; nothing is computed yet."""
        digest = hashlib.sha256(f"{teacher.ref.fingerprint} {teacher.dtype} {k} {temperature}".encode())
        digest.update(windows.ids.tobytes())
        return cls(home / digest.hexdigest()[:16], min(k, teacher.vocabulary), temperature)

    def fill(self, teacher: LoadedModel, windows: Windows, micro: int, progress: Progress) -> int:
        """Ask the teacher about every window that it has not been asked about; return how many tokens it read.

        Killed and called again, it goes on where it was.
        """
        self._make(len(windows), windows.window - 1)
        tokens, chances = self._open("r+")
        head, before = Head(teacher.model), self.done
        with progress.task("asking the base", (len(windows) - before) * windows.window, "tokens") as advance:
            for start in range(before, len(windows), micro):
                ids = torch.from_numpy(windows.ids[start : start + micro]).to(teacher.device)
                tokens[start : start + micro], chances[start : start + micro] = self._asked(head, ids)
                self._mark(start + len(ids), tokens, chances)
                advance(ids.numel())
        return (len(windows) - before) * windows.window

    @torch.no_grad()
    def _asked(self, head: Head, ids: Tensor) -> list[Any]:
        states = head.hidden(ids)[:, :-1].flatten(0, 1)
        tops = [Top.of(head.logits(states[piece]), self.k, self.temperature) for piece in head.pieces(len(states))]
        joined = (torch.cat([top.tokens for top in tops]), torch.cat([top.probabilities for top in tops]))
        return [part.view(len(ids), -1, self.k).cpu().numpy() for part in joined]

    @property
    def done(self) -> int:
        """How many windows the teacher has been asked about."""
        path = self.folder / DONE
        return int(path.read_text()) if path.exists() else 0

    def read(self, rows: Tensor, wanted: Tensor) -> Top:
        """Return what the teacher said of some windows at the wanted places, (windows, tokens - 1) bool."""
        tokens, chances = (torch.from_numpy(np.ascontiguousarray(part[rows.cpu().numpy()])) for part in self._open("r"))
        return Top(tokens.to(wanted.device)[wanted].long(), chances.to(wanted.device)[wanted])

    def _make(self, windows: int, places: int) -> None:
        if self.done:
            return
        for name, dtype in ((TOKENS, np.int32), (PROBABILITIES, np.float32)):
            path = self.folder / name
            with writing(path):
                self.folder.mkdir(parents=True, exist_ok=True)
                np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=(windows, places, self.k))
            reserve(path)

    def _open(self, mode: Any) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """Map the files, both (windows, places, k)."""
        return np.load(self.folder / TOKENS, mmap_mode=mode), np.load(self.folder / PROBABILITIES, mmap_mode=mode)

    def _mark(self, windows: int, *maps: Any) -> None:
        for each in maps:
            each.flush()
        fresh = self.folder / f"{DONE}.partial"
        with writing(fresh):
            fresh.write_text(str(windows))
        fresh.rename(self.folder / DONE)


# The intact base as a teacher: what it says comes next, computed as it is needed or kept on disk beforehand.


@dataclass(frozen=True)
class DistillationMix:
    """What a distilled student is graded by."""

    weight: float = 1.0  # of the teacher's word; the rest is the text's next token
    temperature: float = 1.0
    match: float = 0.0  # of the hidden states at the cuts


@dataclass
class DistillationLoss:
    """The goal of distillation: KL from the teacher, the text itself, and the teacher's states at the cuts."""

    mix: DistillationMix
    teacher: LoadedModel
    student: LoadedModel
    cuts: Sequence[Cut] = ()
    kept: TeacherCache | None = None  # the teacher's word on disk; None: it is asked on the way
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

    def __init__(self, teacher: LoadedModel, student: LoadedModel, cuts: Sequence[Cut]) -> None:
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


# Self-data distillation: the intact base writes the answers of a corpus of chats afresh, and they are trained on.
#
# A pruned model learns its base's own way of answering better than another's. Source: arXiv:2410.09982.


Messages = tuple[tuple[str, str], ...]  # (role, content)

BATCH = 8  # chats that are answered together


@dataclass(frozen=True)
class AnswerWriter:
    """A model that answers greedily, in at most so many tokens a turn."""

    loaded: LoadedModel
    most: int

    def rewrite(
        self, documents: Sequence[TextDocument], folder: Path, progress: Progress = SILENT
    ) -> list[TextDocument]:
        """Return the chats with every answer written by the model, each turn after the turns before it.

        What is written goes to ``folder`` as it comes: killed and called again, it goes on. Plain texts ask nothing
        and are left out; raises ``UsageError`` where there is no chat.
        """
        chats = [document.messages for document in documents if document.text is None]
        if not chats:
            raise UsageError("the base writes answers to prompts, and the corpus holds none: give chats")
        key = hashlib.sha256(f"{self.loaded.ref.fingerprint} {self.most} {chats}".encode()).hexdigest()
        journal = Journal(folder / "answers.jsonl", key)
        with progress.task("the base writes answers", len(chats) - len(journal.entries), "chats") as advance:
            for start in range(len(journal.entries), len(chats), BATCH):
                for messages in self._answered(chats[start : start + BATCH]):
                    journal.append({"messages": messages})
                    advance()
        return [
            TextDocument(messages=tuple((role, content) for role, content in e["messages"])) for e in journal.entries
        ]

    def _answered(self, chats: Sequence[Messages]) -> list[Messages]:
        """Answer turn by turn: the chats' first answers together, then their second ones, and so on."""
        written: list[list[tuple[str, str]]] = [list(chat) for chat in chats]
        for turn in range(max(len(_answers(chat)) for chat in chats)):
            asked = [number for number, chat in enumerate(chats) if turn < len(_answers(chat))]
            places = [_answers(chats[number])[turn] for number in asked]
            prompts = [written[number][:place] for number, place in zip(asked, places, strict=True)]
            for number, place, answer in zip(asked, places, self._write(prompts), strict=True):
                written[number][place] = ("assistant", answer)
        return [tuple(chat) for chat in written]

    @torch.no_grad()
    def _write(self, prompts: Sequence[Sequence[tuple[str, str]]]) -> Iterator[str]:
        """Yield what the model says next in each chat."""
        tokenizer: Any = self.loaded.tokenizer
        rows = [
            tokenizer(
                render(tokenizer, [{"role": role, "content": content} for role, content in prompt], True),
                add_special_tokens=False,
                verbose=False,
            )["input_ids"]
            for prompt in prompts
        ]
        width = max(map(len, rows))
        spare = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (tokenizer.eos_token_id or 0)
        ids = torch.tensor([[spare] * (width - len(row)) + row for row in rows], device=self.loaded.device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=self.loaded.device)
        written: Any = self.loaded.model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=self.most, do_sample=False, pad_token_id=spare
        )  # type: ignore[operator]
        for row in written[:, width:]:
            yield str(tokenizer.decode(row, skip_special_tokens=True)).strip()


def _answers(chat: Messages) -> list[int]:
    """Return the places of a chat's answers."""
    return [place for place, (role, _) in enumerate(chat) if role == "assistant"]
