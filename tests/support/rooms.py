"""The rows of rooms of docs/ARCHITECTURE.md, and the tests that belong to the pure one."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path

from checkout import ROOT

PACKAGE = ROOT / "layerprune"
TESTS = ROOT / "tests"
HEAVY = {"torch", "transformers", "lm_eval", "datasets", "safetensors", "accelerate", "peft", "huggingface_hub"}
PROJECT = {"house", "dependencies"}  # tests of the project as a whole, which read files only


def rows() -> list[tuple[str, list[str]]]:
    """Return the rooms of each row of the table, top row first."""
    text = (ROOT / "docs" / "ARCHITECTURE.md").read_text()
    lines = re.findall(r"^\| (\w+)[^|]*\| (`.*) \|$", text, re.M)
    found = [(row, re.findall(r"`(\w+)`", cells)) for row, cells in lines]
    assert [row for row, _ in found] == ["pure", "reading", "torch", "verbs", "shell"]
    return found


ROW_OF = {room: number for number, (_, rooms) in enumerate(rows()) for room in rooms}
PURE = [room for room, row in ROW_OF.items() if row == 0]


def is_pure(test: Path) -> bool:
    """Say whether a file of tests is of a room of the pure row, or of the project as a whole."""
    room, *inside = test.relative_to(TESTS).parts
    if inside:
        return room in PURE
    subject = room.removeprefix("test_").removesuffix(".py")
    return any(subject == name or subject.startswith(f"{name}_") for name in {*PURE, *PROJECT})


class Refusal:
    """A finder of modules, first in ``sys.meta_path``, by which no heavy package can be imported, installed or not."""

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: object = None) -> ModuleSpec | None:
        if name.partition(".")[0] in HEAVY:
            raise ImportError(f"{name} is heavy: the pure rooms and their tests do without it")
        return None

    def install(self) -> None:
        """Refuse from now on.

        Raises:
            RuntimeError: a heavy package is loaded already, so that refusing it would show nothing.
        """
        if loaded := HEAVY & set(sys.modules):
            raise RuntimeError(f"{', '.join(sorted(loaded))} is loaded before the first test")
        sys.meta_path.insert(0, self)  # type: ignore[arg-type]
