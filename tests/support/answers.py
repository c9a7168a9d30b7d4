"""Runs a command on malformed input, and tells which rules its answer breaks.

The rules: exit code 2 and, as the last line of stderr, one line that begins with ``layerprune:``; no traceback; nothing
that would move a terminal's cursor; every folder as it was. ``verify`` lists problems and
ends with 1; a recipe's faults follow the line that counts them.
"""

from __future__ import annotations

import hashlib
import re
import signal
import stat
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unicodedata import category

from click.testing import CliRunner, Result

from checkout import ROOT
from layerprune.cli.command import app

SECONDS, MEMORY = 30, 6 * 10**9  # what the answer to one malformed input may take
LONGEST = 1000  # characters of a line
REFUSED, PROBLEMS, DONE = 2, 1, 0  # exit codes


class TookTooLong(BaseException):
    """A command that did not answer; no ``except Exception`` of it holds this."""


def state(folder: Path) -> dict[str, str]:
    """Return what lies below a folder: a hash of each file, where links lead, the kind of everything else."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name, mode = path.relative_to(folder).as_posix(), path.lstat().st_mode
        if stat.S_ISLNK(mode):
            found[name] = f"link to {path.readlink()}"
        elif stat.S_ISREG(mode):
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        else:
            found[name] = f"kind {stat.S_IFMT(mode)}"
    return found


@contextmanager
def limited() -> Iterator[None]:
    """Raise ``TookTooLong`` in a block that takes too long, and ``MemoryError`` where it wants too much memory."""

    def late(number: int, frame: object) -> None:
        raise TookTooLong

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        with _little_memory():
            yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def _little_memory() -> Iterator[None]:
    if sys.platform != "linux":  # elsewhere the address space is not what is used
        yield
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def broken_rules(folder: Path, words: list[str], codes: tuple[int, ...] = (REFUSED,)) -> list[str]:
    """Run ``layerprune`` with these words; return what is wrong with the answer, nothing where all is well.

    ``folder`` holds everything that the command may touch; ``codes`` are the exit codes that are right.
    """
    before = state(folder)
    try:
        with limited():
            result = CliRunner().invoke(app, words, color=True)  # as on a terminal: escapes are not stripped
    except TookTooLong:
        return [f"no answer in {SECONDS} s"]
    found = list(_faults(result, codes))
    if result.exit_code != DONE and (changed := differing(before, state(folder))):
        found.append(f"changed: {', '.join(changed)}")
    return found


def differing(before: dict[str, str], after: dict[str, str]) -> list[str]:
    return sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))


def _place(frame: traceback.FrameSummary) -> str:
    return f"{'/'.join(Path(frame.filename).parts[-2:])}:{frame.lineno}"


def _faults(result: Result, codes: tuple[int, ...]) -> Iterator[str]:
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        frames = traceback.extract_tb(result.exc_info[2])
        ours = [frame for frame in frames if Path(frame.filename).is_relative_to(ROOT)]
        yield f"{type(result.exception).__name__} below {(ours or frames)[-1].name}, {_place((ours or frames)[-1])}"
        return
    if result.exit_code not in codes:
        yield f"exit code {result.exit_code}: {(result.stderr or result.stdout)[-200:]!r}"
    if result.exit_code == REFUSED:
        lines = result.stderr.split("\n")[:-1]
        said = next((number for number, line in enumerate(lines) if line.startswith("layerprune: ")), len(lines))
        several = re.search(r" has (\d+) faults$", lines[said]) if said < len(lines) else None  # of a recipe
        if said + 1 + int(several[1] if several else 0) != len(lines):
            yield f"not one line: {lines[-2:]}"
        if "stopped at what it does not expect" in result.stderr:
            yield f"unforeseen: {lines[-1]}"
        if "Traceback" in result.stderr:
            yield "a traceback"
    text = result.stdout + result.stderr
    if (longest := max(map(len, text.splitlines()), default=0)) > LONGEST:
        yield f"a line of {longest} characters"
    if odd := {char for char in text if category(char) in ("Cc", "Cs") and char not in "\n"}:
        yield f"printed {sorted(map(hex, map(ord, odd)))}"
