"""Where a command writes: tried before anything slow, several files published at once, faults that name the file."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from layerprune.errors import UsageError, WriteError, one_line
from layerprune.paths import refuse_link

TRIAL = ".layerprune-trial"
TRIAL_BYTES = 4096  # a block of common file systems: on a full disk an empty file can still be made
STAGED, READY = ".layerprune-staged", ".layerprune-ready"


@contextmanager
def writing(path: Path, *others: type[Exception]) -> Iterator[None]:
    """Turn an operating-system error of the block into a ``WriteError`` that names ``path``.

    ``others``: what a library raises in place of an ``OSError`` (safetensors and torch do).
    """
    caught: tuple[type[Exception], ...] = (OSError, *others)
    try:
        yield
    except WriteError:
        raise
    except caught as error:
        number, said = _reason(error)
        raise WriteError(number, said, str(path)) from error


def _reason(error: BaseException) -> tuple[int, str]:
    """Return the errno and words of the operating-system error in or behind an error of a library."""
    behind: BaseException | None = error
    while behind is not None:
        if isinstance(behind, OSError) and behind.errno:
            return behind.errno, behind.strerror or os.strerror(behind.errno)
        behind = behind.__cause__ or behind.__context__
    named = re.search(r"\(os error (\d+)\)", str(error))  # as Rust writes it, so safetensors
    return (int(named[1]), os.strerror(int(named[1]))) if named else (errno.EIO, one_line(error))


def write_all(file: IO[bytes], data: bytes | bytearray | memoryview) -> None:
    """Write to an unbuffered file, which on a disk that is nearly full takes a part and raises only for the rest."""
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]


def check_apart(out: Path, *sources: str | Path | None) -> None:
    """Raise ``UsageError`` when ``out`` is, or lies inside, a folder that a model is read from.

    ``sources`` are folders or Hub ids; what is not a folder is passed over. Documents and journals inside a model's
    folder would be taken for files of the model, and exported with it.
    """
    place = Path(out).resolve()
    for source in sources:
        if source is None or not Path(source).is_dir():
            continue
        folder = Path(source).resolve()
        if place == folder or folder in place.parents:
            where = "is" if place == folder else "lies inside"
            raise UsageError(f"{out} {where} the folder of the model {source}; give another folder with -o")


def check_places(folder: Path, *, files: Iterable[str] = (), folders: Iterable[str] = ()) -> None:
    """Raise ``UsageError`` when a folder lies where a file is to be written in ``folder``, or a file for a folder."""
    for name in files:
        if (Path(folder) / name).is_dir():
            raise UsageError(f"{Path(folder) / name} is a folder, and a file of that name is to be written; move it")
    for name in folders:
        place = Path(folder) / name
        if place.exists() and not place.is_dir():
            raise UsageError(f"{place} is a file, and a folder of that name is to be made; move it")


def try_folder(folder: Path) -> None:
    """Write a block into an existing folder, flush it and remove it; raises ``WriteError`` where that fails."""
    trial = Path(folder) / TRIAL
    with writing(folder):
        trial.unlink(missing_ok=True)  # of a process that was killed
        try:
            with trial.open("xb") as file:
                file.write(bytes(TRIAL_BYTES))
                file.flush()
                os.fsync(file.fileno())
        finally:
            if trial.exists():
                trial.unlink()


def reserve(path: Path) -> None:
    """Allocate all of a sparse file: on a full disk, writing to a memory map of one would kill the process."""
    if not hasattr(os, "posix_fallocate"):
        return
    with writing(path), path.open("r+b") as file:
        os.posix_fallocate(file.fileno(), 0, path.stat().st_size)


@contextmanager
def made_folder(folder: Path) -> Iterator[None]:
    """Make a folder and its missing parents; those that hold nothing when the block ends are removed again."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if not there.is_dir():
        raise UsageError(f"{there} is a file, so there can be no folder {folder}; give another folder with -o")
    try:
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        yield
    finally:
        for path in missing:
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()


@contextmanager
def published_together(folder: Path) -> Iterator[Path]:
    """Yield an empty folder; what the block writes into it goes to the same places in ``folder``, all of it or nothing.

    An error in the block (a full disk) leaves ``folder`` as it was. A process that is killed leaves it as it was or, if
    everything had been written, in a state that ``settle`` completes.
    """
    staged = folder / STAGED
    settle(folder)
    try:
        with writing(folder):
            staged.mkdir(parents=True)
        yield staged
        written = {path.relative_to(staged).as_posix(): path.is_dir() for path in staged.rglob("*")}
        inner = [name for name, is_folder in written.items() if is_folder]
        check_places(folder, files=written.keys() - set(inner), folders=inner)
        for name in inner:
            with writing(folder / name):
                (folder / name).mkdir(exist_ok=True)
        staged.rename(folder / READY)
    except WriteError as error:
        shutil.rmtree(staged, ignore_errors=True)
        place = Path(error.filename)
        if place.is_relative_to(staged):  # named as the caller knows it
            place = folder / place.relative_to(staged)
        raise WriteError(error.errno, error.strerror, str(place)) from error
    except BaseException:
        shutil.rmtree(staged, ignore_errors=True)
        raise
    settle(folder)


def settle(folder: Path) -> None:
    """Complete what a killed process had begun to publish in ``folder``; remove what it had not finished writing.

    Raises ``UsageError`` where a folder is a link: files would be taken from elsewhere, or written there.
    """
    ready = folder / READY
    for place in (ready, folder / STAGED):
        refuse_link(place)
    if ready.is_dir():
        written = [path for path in ready.rglob("*") if path.is_file()]
        inner = {parent for path in written for parent in path.relative_to(ready).parents}
        for place in sorted(inner - {Path()}):
            refuse_link(folder / place)
        for path in sorted(written, key=lambda path: (path.stat().st_mtime_ns, path)):  # what names others came last
            target = folder / path.relative_to(ready)
            target.parent.mkdir(parents=True, exist_ok=True)
            path.replace(target)
        shutil.rmtree(ready)
    if (folder / STAGED).is_dir():
        shutil.rmtree(folder / STAGED)
