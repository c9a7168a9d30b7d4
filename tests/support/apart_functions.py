"""What the tests of ``apart`` have done in a process of its own; torch is not among it."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from layerprune.errors import RefusedError


def report(words: list[str]) -> dict[str, object]:
    print("libraries talk")  # onto stdout, where the answer goes
    return {"words": (*words, "ü"), "process": os.getpid()}


def refuse(field: str) -> dict[str, object]:
    raise RefusedError(f"{field} stands in the way")


def break_down() -> dict[str, object]:
    raise ZeroDivisionError("a bug")


def run_out_of_memory() -> dict[str, object]:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("unreachable")


def dawdle(mark: str) -> dict[str, object]:
    Path(mark).write_text(str(os.getpid()))
    time.sleep(60)
    return {}
