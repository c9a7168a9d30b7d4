"""What has been measured so far, appended to a file as it comes, so that a killed run goes on where it was."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from layerprune.errors import DocumentError
from layerprune.output import write_all, writing
from layerprune.subject import Subject
from layerprune.tasks.items import Questions
from layerprune.versions import tool_versions


def journal_key(subject: Subject, questions: Questions | None, **settings: Any) -> str:
    """Return a hash of what a measurement depends on: the model, what is asked and how it is judged, tools, settings.

    Not in it: files that a task's own file imports.
    """
    asked = None if questions is None else questions.mark()
    whole = {"subject": subject.marks, "asked": asked, "versions": tool_versions(), "settings": settings}
    return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()[:16]


class Journal:
    """An append-only file of JSON lines. Lines of a run with other settings (another ``key``) are left alone."""

    def __init__(self, path: Path, key: str) -> None:
        self.path, self.key = path, key
        self.entries = self._read()

    def _read(self) -> list[dict[str, Any]]:
        """Return this key's entries; a last line that a kill cut short is removed from the file."""
        if not self.path.exists():
            return []
        data = self.path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        if len(whole) < len(data):
            with writing(self.path):
                os.truncate(self.path, len(whole))
        try:
            lines = [json.loads(line) for line in whole.splitlines()]
        except ValueError as error:
            raise DocumentError(f"{self.path} is damaged ({error}); remove it to measure again") from error
        if not all(isinstance(line, dict) for line in lines):
            raise DocumentError(f"{self.path} is damaged (a line is no object); remove it to measure again")
        return [line for line in lines if line.get("key") == self.key]

    def append(self, entry: dict[str, Any]) -> None:
        """Add one entry and have it on the disk before returning; on a ``WriteError`` the file is as it was."""
        line = json.dumps({"key": self.key, **entry}, separators=(",", ":"), allow_nan=False) + "\n"
        with writing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            before = self.path.stat().st_size if self.path.exists() else 0
            try:
                with self.path.open("ab", buffering=0) as file:
                    write_all(file, line.encode())
                    os.fsync(file.fileno())
            except BaseException:
                self._shorten(before)
                raise
        self.entries.append(entry)

    def _shorten(self, size: int) -> None:
        """Take back what was written of an entry."""
        if size:
            os.truncate(self.path, size)
        else:
            self.path.unlink(missing_ok=True)
