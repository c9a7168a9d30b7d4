"""Self-data distillation: the intact base writes the answers of a corpus of chats afresh, and they are trained on.

A pruned model learns its base's own way of answering better than another's. Source: arXiv:2410.09982.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from layerprune.corpus import Document
from layerprune.corpus.chat import render
from layerprune.engine.journal import Journal
from layerprune.errors import UsageError
from layerprune.progress import SILENT, Progress
from layerprune.subject import Subject

Messages = tuple[tuple[str, str], ...]  # (role, content)

BATCH = 8  # chats that are answered together


@dataclass(frozen=True)
class Author:
    """A model that answers greedily, in at most so many tokens a turn."""

    subject: Subject
    most: int

    def rewrite(self, documents: Sequence[Document], folder: Path, progress: Progress = SILENT) -> list[Document]:
        """Return the chats with every answer written by the model, each turn after the turns before it.

        What is written goes to ``folder`` as it comes: killed and called again, it goes on. Plain texts ask nothing
        and are left out; raises ``UsageError`` where there is no chat.
        """
        chats = [document.messages for document in documents if document.text is None]
        if not chats:
            raise UsageError("the base writes answers to prompts, and the corpus holds none: give chats")
        key = hashlib.sha256(f"{self.subject.ref.fingerprint} {self.most} {chats}".encode()).hexdigest()
        journal = Journal(folder / "answers.jsonl", key)
        with progress.task("the base writes answers", len(chats) - len(journal.entries), "chats") as advance:
            for start in range(len(journal.entries), len(chats), BATCH):
                for messages in self._answered(chats[start : start + BATCH]):
                    journal.append({"messages": messages})
                    advance()
        return [Document(messages=tuple((role, content) for role, content in e["messages"])) for e in journal.entries]

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
        tokenizer: Any = self.subject.tokenizer
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
        ids = torch.tensor([[spare] * (width - len(row)) + row for row in rows], device=self.subject.device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=self.subject.device)
        written: Any = self.subject.model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=self.most, do_sample=False, pad_token_id=spare
        )  # type: ignore[operator]
        for row in written[:, width:]:
            yield str(tokenizer.decode(row, skip_special_tokens=True)).strip()


def _answers(chat: Messages) -> list[int]:
    """Return the places of a chat's answers."""
    return [place for place, (role, _) in enumerate(chat) if role == "assistant"]
