"""A folder written whole or not at all: under a hidden name until everything in it is on the disk."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from layerprune.errors import ExportError, one_line
from layerprune.output import check_apart, try_folder, writing


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Yield a hidden sibling of ``out`` to write into; rename it to ``out`` on success, remove it on any failure.

    Raises ``ExportError`` when ``out`` exists or cannot be made; operating-system errors inside the block (a full disk)
    become one-line ``ExportError``s. What a killed process left behind is removed by the next export to the same place.
    """
    out = Path(out).absolute()
    with _partial_folder(out) as partial:
        yield partial
        _publish(partial, out)


def try_new_folder(out: Path, *sources: str | Path | None) -> None:
    """See that ``out`` can be made and written, and leave nothing; for what takes long before its folder is begun.

    Raises ``ExportError`` as ``new_folder`` does, and ``UsageError`` when ``out`` lies inside one of the folders
    ``sources``, which a model is read from.
    """
    out = Path(out).absolute()
    check_apart(out, *sources)
    with _partial_folder(out) as partial:
        try_folder(partial)


@contextmanager
def _partial_folder(out: Path) -> Iterator[Path]:
    """Yield a new hidden sibling of ``out``, locked; it is gone at the end unless it was renamed."""
    if os.path.lexists(out):
        raise ExportError(f"{out} exists already; choose a new folder or remove it")
    missing = [folder for folder in (out.parent, *out.parent.parents) if not folder.exists()]
    partial = lock = None
    try:
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            _remove_abandoned(out)
            partial = Path(tempfile.mkdtemp(dir=out.parent, prefix=_prefix(out)))
            lock = _lock(partial)
        except OSError as error:
            raise ExportError(f"cannot write to {out.parent}: {error.strerror or error}") from error
        yield partial
    except OSError as error:
        raise ExportError(f"writing {out} failed, nothing was left behind: {one_line(error)}") from error
    finally:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)
        for folder in missing:
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
        if lock is not None:
            os.close(lock)


def flush_to_disk(path: Path) -> None:
    """Wait until a written file is on the disk; a disk that fills up only now raises ``OSError`` here."""
    with writing(path):
        handle = os.open(path, os.O_RDWR)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_file(path: Path, data: bytes) -> None:
    """Write a small file and flush it to disk."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as handle:
            handle.write(data)
            handle.flush()
            os.fsync(handle.fileno())


def _prefix(out: Path) -> str:
    return f".{out.name}.partial-"


def _lock(folder: Path) -> int | None:
    """Hold a lock that the kernel drops when this process dies, however it dies; None where there are no such locks."""
    try:
        import fcntl
    except ImportError:  # Windows: abandoned folders stay, hidden, until someone removes them
        return None
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BaseException:
        os.close(handle)
        raise
    return handle


def _remove_abandoned(out: Path) -> None:
    """Remove partial folders whose writer was killed: nobody holds their lock."""
    for folder in [entry for entry in out.parent.iterdir() if entry.name.startswith(_prefix(out))]:
        try:
            lock = _lock(folder)
        except (BlockingIOError, FileNotFoundError):
            continue  # its writer is alive, or finished meanwhile
        if lock is not None:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(lock)


def _publish(partial: Path, out: Path) -> None:
    """Give the finished folder its name: data first, then the name, both flushed to disk."""
    umask = os.umask(0)
    os.umask(umask)
    partial.chmod(0o777 & ~umask)  # mkdtemp makes private folders; a checkpoint is for sharing
    for path in partial.rglob("*"):
        _sync_folder(path) if path.is_dir() else flush_to_disk(path)
    _sync_folder(partial)
    if os.path.lexists(out):
        raise ExportError(f"{out} appeared while it was being written; nothing was changed")
    partial.rename(out)
    _sync_folder(out.parent)


def _sync_folder(folder: Path) -> None:
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
