"""What a teacher says of every window, kept on disk: its likeliest tokens at every place, with their probabilities."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from layerprune.corpus import Windows
from layerprune.healing.grading import Top
from layerprune.healing.head import Head
from layerprune.output import reserve, writing
from layerprune.progress import Progress
from layerprune.subject import Subject

Tensor = torch.Tensor

TOKENS, PROBABILITIES, DONE = "tokens.npy", "probabilities.npy", "done"


@dataclass(frozen=True)
class Kept:
    """The top ``k`` tokens of a teacher at a temperature; 8 k bytes a place."""

    folder: Path
    k: int
    temperature: float

    @classmethod
    def of(cls, home: Path, teacher: Subject, windows: Windows, k: int, temperature: float) -> Kept:
        """Return the keeping place for this teacher and text; nothing is computed yet."""
        digest = hashlib.sha256(f"{teacher.ref.fingerprint} {teacher.dtype} {k} {temperature}".encode())
        digest.update(windows.ids.tobytes())
        return cls(home / digest.hexdigest()[:16], min(k, teacher.vocabulary), temperature)

    def fill(self, teacher: Subject, windows: Windows, micro: int, progress: Progress) -> int:
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
