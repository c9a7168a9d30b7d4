"""Distillation: the pruned model learns from what the intact base says of the text, not from the text alone."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from layerprune.artifacts.base import write_atomically
from layerprune.data.corpus import TextDocument, Windows, pack_documents, render
from layerprune.errors import DocumentError, UsageError, one_line
from layerprune.files import reserve, writing
from layerprune.healing.base import Changed, Cut, HealContext, cuts
from layerprune.healing.finetune import (
    COUNTS,
    RATES,
    Partial,
    Seams,
    WeightTraining,
    final_norm,
    precision_of,
    weights_of,
)
from layerprune.healing.losses import Head, LogitsLoss, NextToken, Top, cross_entropy, divergence, divergence_from_top
from layerprune.healing.training import main_process_first, on_own_device
from layerprune.models.generation import padded
from layerprune.models.model import LoadedModel
from layerprune.registry import option
from layerprune.scoring.cached_evaluator import Journal
from layerprune.util import SILENT, Progress


@dataclass(frozen=True)
class Distill(WeightTraining):
    """Train towards the base's next-token distribution: all decoder layers unless told otherwise."""

    lr: float = option(3e-4, "learning rate, at its height", RATES)
    batch: int = option(2, "windows of a step, over all processes", COUNTS)
    train: Literal["layers", "all", "seams", "last"] = option(
        "layers", "which weights: decoder layers and final norm, all, the layers at the cuts, or the last three"
    )
    weight: float = option(1.0, "share of the base's word in the loss; the rest is the text's next token", (0, 1))
    temperature: float = option(
        1.0, "of both distributions; above 1 the base's unlikely tokens count more", (1e-3, 1000)
    )
    match: float = option(0.0, "weight of the relative squared distance of hidden states at the cuts", (0, 1e6))
    answers: Literal["corpus", "base"] = option(
        "corpus", "base: the base first writes the answers of the corpus's chats afresh, and they are what is read"
    )
    answer_tokens: int = option(256, "of an answer that the base writes, at most", (1, 10**6))
    keep: int = option(
        0, "keep the base's top so many tokens on disk, to read the text more than once; 0: ask anew", (0, 10**6)
    )

    needs = ("text", "base")
    cost = "a forward pass of the base, a forward and a backward pass over the text"
    source = "Hinton et al., arXiv:1503.02531; for removed layers: Minitron, arXiv:2408.11796"

    def heal(self, case: HealContext) -> Iterator[Changed]:
        """Yield the distilled weights; the base is loaded once, and writes before it teaches."""
        teacher = on_own_device(case).load_base(precision_of(case))
        if self.answers == "base":
            case = self._with_answers(case, teacher)
        yield from self.fit(case, lambda student: self._goal(case, teacher, student))

    def _with_answers(self, case: HealContext, teacher: LoadedModel) -> HealContext:
        """Return the case with a text whose answers are the base's; what is held out stays as it is."""
        corpus, folder = case.text, case.work / "answers"
        with main_process_first():  # the first one writes, the others read
            documents = rewrite_answers(corpus.documents, teacher, self.answer_tokens, folder, case.progress)
        train = pack_documents(documents, teacher.tokenizer, corpus.train.window, "what the base has written")
        case.record.notes.append(f"{len(documents)} chats were answered by the base before they were read")
        return replace(case, corpus=replace(corpus, train=train))

    def weights_to_train(self, case: HealContext, loaded: LoadedModel) -> set[str]:
        if self.train == "all":
            return {name for name, _ in loaded.model.named_parameters()}
        if self.train == "seams":
            return Seams().weights_to_train(case, loaded)
        if self.train == "last":
            return Partial(layers=min(3, len(loaded.layers))).weights_to_train(case, loaded)
        return weights_of(loaded, loaded.layers) | final_norm(loaded)

    def _goal(self, case: HealContext, teacher: LoadedModel, student: LoadedModel) -> DistillationLoss:
        if teacher.vocabulary != student.vocabulary:
            raise UsageError(f"the base has {teacher.vocabulary} tokens and the pruned model {student.vocabulary}")
        kept = None
        if self.keep:
            windows = case.text.train
            kept = TeacherCache.of(case.work / "teacher", teacher, windows, self.keep, self.temperature)
            with main_process_first():  # the first one asks, the others find the answers
                case.record.tokens += kept.fill(teacher, windows, self.forward_windows(case, teacher), case.progress)
        return DistillationLoss(self, teacher, student, cuts(case.removal, case.receipt.base.layers), kept)


# What a teacher says of every window, kept on disk: its likeliest tokens at every place, with their probabilities.


Tensor = torch.Tensor

TABLE, DONE = "top.npy", "done"
PLACE = np.dtype([("tokens", np.int32), ("probabilities", np.float32)])  # of one of a teacher's top tokens


@dataclass(frozen=True)
class TeacherCache:
    """The top ``k`` tokens of a teacher at a temperature; 8 k bytes a place."""

    folder: Path
    k: int
    temperature: float

    @classmethod
    def of(cls, home: Path, teacher: LoadedModel, windows: Windows, k: int, temperature: float) -> TeacherCache:
        """Return the keeping place for this teacher and text; nothing is computed yet."""
        digest = hashlib.sha256(f"{TABLE} {teacher.ref.fingerprint} {teacher.dtype} {k} {temperature}".encode())
        digest.update(windows.ids.tobytes())
        return cls(home / digest.hexdigest()[:16], min(k, teacher.vocabulary), temperature)

    @torch.no_grad()
    def fill(self, teacher: LoadedModel, windows: Windows, micro: int, progress: Progress) -> int:
        """Ask the teacher about every window that it has not been asked about; return how many tokens it read.

        Killed and called again, it goes on where it was.
        """
        if not self.done:
            self.make_room(len(windows), windows.window - 1)
        table, head, before = self._table("r+"), Head(teacher.model), self.done
        with progress.task("asking the base", (len(windows) - before) * windows.window, "tokens") as advance:
            for start in range(before, len(windows), micro):
                ids = torch.from_numpy(windows.ids[start : start + micro]).to(teacher.device)
                states = head.hidden(ids)[:, :-1].flatten(0, 1)
                pieces = head.pieces(len(states))
                tops = [Top.of(head.logits(states[piece]), self.k, self.temperature) for piece in pieces]
                for name in PLACE.names:
                    found = torch.cat([getattr(top, name) for top in tops])
                    table[name][start : start + micro] = found.view(len(ids), -1, self.k).cpu().numpy()
                table.flush()
                write_atomically(self.folder / DONE, str(start + len(ids)).encode())
                advance(ids.numel())
        return (len(windows) - before) * windows.window

    @property
    def done(self) -> int:
        """How many windows the teacher has been asked about."""
        path = self.folder / DONE
        try:
            return int(path.read_text()) if path.exists() else 0
        except ValueError as error:
            raise DocumentError(f"{path} is damaged ({error}); remove {self.folder} to ask the base anew") from error

    def read(self, rows: Tensor, wanted: Tensor) -> Top:
        """Return what the teacher said of some windows at the wanted places, (windows, tokens - 1) bool."""
        asked = self._table("r")[rows.cpu().numpy()]  # (windows, places, k)
        tokens, chances = (torch.from_numpy(asked[name].copy()).to(wanted.device)[wanted] for name in PLACE.names)
        return Top(tokens.long(), chances)

    def make_room(self, windows: int, places: int) -> None:
        """Make the file and take all of its room on the disk."""
        path = self.folder / TABLE
        with writing(path):
            self.folder.mkdir(parents=True, exist_ok=True)
            np.lib.format.open_memmap(path, mode="w+", dtype=PLACE, shape=(windows, places, self.k))
        reserve(path)

    def _table(self, mode: Any) -> Any:
        """Map the file, (windows, places, k)."""
        try:
            return np.load(self.folder / TABLE, mmap_mode=mode)
        except (ValueError, EOFError) as error:
            said = f"{self.folder / TABLE} is damaged ({one_line(error)}); remove {self.folder} to ask the base anew"
            raise DocumentError(said) from error


# The intact base as a teacher: what it says comes next, computed as it is needed or kept on disk beforehand.


class DistillationLoss(NextToken):
    """The goal of distillation: KL from the teacher, the text itself, and the teacher's states at the cuts."""

    def __init__(
        self,
        options: Distill,
        teacher: LoadedModel,
        student: LoadedModel,
        cuts: Sequence[Cut] = (),
        kept: TeacherCache | None = None,
    ) -> None:
        """``kept`` is the teacher's word on disk; None: it is asked on the way."""
        self.options, self.teacher, self.kept = options, teacher, kept
        self.teacher.model.requires_grad_(False).eval()
        top = "" if kept is None else f" top {kept.k}"
        asked = f"weight {options.weight}, temperature {options.temperature}, match {options.match}"
        self.key = f"distilled with {asked} from {teacher.ref.fingerprint}{top}"
        # Before its first layer a student has nothing to move.
        self.cuts = [cut for cut in cuts if cut.after >= 0] if options.match else []
        if options.match and not self.cuts:
            raise UsageError("match compares states at cuts, and no cut has a layer before it; leave match out")
        self.seen: dict[tuple[str, Cut], Tensor] = {}
        for cut in self.cuts:
            self._watch(("student", cut), student.layers[cut.after])
            self._watch(("teacher", cut), teacher.layers[cut.resumes - 1])

    def _watch(self, place: tuple[str, Cut], layer: nn.Module) -> None:
        seen = self.seen  # and not self: a hook that held the teacher would keep it in memory

        def look(module: nn.Module, args: Any, output: Any) -> None:
            seen[place] = output[0] if isinstance(output, tuple) else output

        layer.register_forward_hook(look)

    def prepare(self, rows: Tensor, ids: Tensor, wanted: Tensor, labels: Tensor) -> LogitsLoss:
        head, weight, temperature = Head(self.teacher.model), self.options.weight, self.options.temperature
        top = None if self.kept is None else self.kept.read(rows, wanted)
        if top is None or self.cuts:
            with torch.no_grad():
                states = head.hidden(ids)[:, :-1][wanted]

        def taught(logits: Tensor, piece: slice) -> tuple[Tensor, Tensor]:
            if top is not None:
                return divergence_from_top(logits, top[piece], temperature)
            with torch.no_grad():
                return divergence(logits, head.logits(states[piece]).float(), temperature)

        def mixed(logits: Tensor, piece: slice) -> tuple[Tensor, Tensor]:
            by_teacher, slope = taught(logits.clone(), piece)
            value, gradient = cross_entropy(logits, labels[piece])
            value = (1 - weight) * value + weight * by_teacher
            return value, gradient.mul_(1 - weight).add_(slope, alpha=weight)

        if weight == 1:
            return taught
        return mixed if weight else super().prepare(rows, ids, wanted, labels)

    def auxiliary_loss(self, wanted: Tensor) -> Tensor:
        """Return how far the student's states at the cuts are from those they stand for, times ``match``.

        The squared distance over the teacher's squared length, summed over places, the mean of the cuts.
        """
        total = super().auxiliary_loss(wanted)
        for cut in self.cuts:
            mine = self.seen.pop(("student", cut))[:, :-1][wanted].float()  # (places, hidden)
            theirs = self.seen.pop(("teacher", cut))[:, :-1][wanted].float()
            total = total + ((mine - theirs).pow(2).sum(-1) / theirs.pow(2).sum(-1)).sum()
        return self.options.match * (total / len(self.cuts)) if self.cuts else total


# Self-data distillation: the intact base writes the answers of a corpus of chats afresh, and they are trained on.
#
# A pruned model learns its base's own way of answering better than another's. Source: arXiv:2410.09982.


Chat = Sequence[tuple[str, str]]  # (role, content) of every message

BATCH = 8  # chats that are answered together


def rewrite_answers(
    documents: Sequence[TextDocument], author: LoadedModel, most: int, folder: Path, progress: Progress = SILENT
) -> list[TextDocument]:
    """Return the chats with every answer written by a model, greedily, each turn after the turns before it.

    An answer has at most ``most`` tokens. What is written goes to ``folder`` as it comes: killed and called again, it
    goes on. Plain texts ask nothing and are left out; raises ``UsageError`` where there is no chat.
    """
    chats = [document.messages for document in documents if document.text is None]
    if not chats:
        raise UsageError("the base writes answers to prompts, and the corpus holds none: give chats")
    key = hashlib.sha256(f"{author.ref.fingerprint} {most} {chats}".encode()).hexdigest()
    journal = Journal(folder / "answers.jsonl", key)
    with progress.task("the base writes answers", len(chats) - len(journal.entries), "chats") as advance:
        for start in range(len(journal.entries), len(chats), BATCH):
            for messages in _answered(chats[start : start + BATCH], author, most):
                journal.append({"messages": messages})
                advance()
    return [TextDocument(messages=tuple(map(tuple, entry["messages"]))) for entry in journal.entries]


def _answered(chats: Sequence[Chat], author: LoadedModel, most: int) -> list[Chat]:
    """Answer turn by turn: the chats' first answers together, then their second ones, and so on."""
    written = [list(chat) for chat in chats]
    turns = [[place for place, (role, _) in enumerate(chat) if role == "assistant"] for chat in chats]
    for turn in range(max(map(len, turns))):
        asked = [(chat, places[turn]) for chat, places in zip(written, turns, strict=True) if turn < len(places)]
        prompts = [chat[:place] for chat, place in asked]
        for (chat, place), answer in zip(asked, _next_messages(prompts, author, most), strict=True):
            chat[place] = ("assistant", answer)
    return written


@torch.no_grad()
def _next_messages(chats: Sequence[Chat], author: LoadedModel, most: int) -> Iterator[str]:
    """Yield what the model says next in each chat."""
    tokenizer: Any = author.tokenizer
    rows = [
        tokenizer(
            render(tokenizer, [{"role": role, "content": content} for role, content in chat], True),
            add_special_tokens=False,
            verbose=False,
        )["input_ids"]
        for chat in chats
    ]
    spare = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (tokenizer.eos_token_id or 0)
    ids, mask = (tensor.to(author.device) for tensor in padded(rows))
    written: Any = author.model.generate(  # type: ignore[operator]
        input_ids=ids, attention_mask=mask, max_new_tokens=most, do_sample=False, pad_token_id=spare
    )
    for row in written[:, ids.shape[1] :]:
        yield str(tokenizer.decode(row, skip_special_tokens=True)).strip()
