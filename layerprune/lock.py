"""One run at a time in a run folder: two would write each other's journal and documents."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from layerprune.errors import UsageError, WriteError
from layerprune.output import check_apart, made_folder, settle, try_folder
from layerprune.paths import check_plain

if TYPE_CHECKING:
    from filelock import BaseFileLock

FILENAME = ".lock"
# What commands go on from in a run folder; a link would be read, or a journal written, elsewhere.
READ = (
    "recipe.json", "scores.json", "plan.json", "study.json", "front/front.json", "locator.json", "journal.jsonl",
    "answers.jsonl", "budget.json",
)  # fmt: skip
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # of file systems that have none, such as some mounts of NFS

_held = threading.local()  # .folders: those that this thread holds


@contextmanager
def locked(folder: Path | None, *sources: str | Path | None) -> Iterator[None]:
    """Hold ``folder`` (made when it is not there) for this process while the block runs; None: nothing to hold.

    Before the block begins a file is written there and removed again, and what a killed run had begun to publish is
    completed. ``sources``: models that are read; ``folder`` must not lie inside the folder of one. Blocks of one thread
    nest. The operating system lets go when the process dies, however it dies. Folders that were made here and hold
    nothing at the end are removed again. Raises ``UsageError`` when another run holds the folder or it cannot be
    locked, ``WriteError`` when nothing can be written there, and ``CheckpointError`` where a document or journal in it
    is a link or a special file.
    """
    if folder is None:
        yield
        return
    check_apart(folder, *sources)
    folder = Path(folder).absolute()
    held: set[Path] = _held.__dict__.setdefault("folders", set())
    if folder in held:
        yield
        return
    with made_folder(folder):
        check_plain(folder, [name for name in READ if (folder / name).is_symlink() or not (folder / name).is_dir()])
        lock = _acquired(folder)
        held.add(folder)
        try:
            try_folder(folder)
            settle(folder)
            yield
        finally:
            held.discard(folder)
            (folder / FILENAME).unlink(missing_ok=True)
            lock.release()


def _acquired(folder: Path) -> BaseFileLock:
    """Return the lock of a folder, held."""
    from filelock import FileLock, Timeout

    path = folder / FILENAME
    fresh = not path.exists()
    while True:
        lock = FileLock(path, timeout=0)
        try:
            lock.acquire()
        except Timeout:
            refused = _kernel_refusal(path)
            if refused is None:
                raise UsageError(
                    f"another layerprune is at work in {folder}; wait until it is done, or give another folder with -o"
                ) from None
            raise _unlockable(path, fresh, refused) from refused
        except (OSError, NotImplementedError) as error:
            raise _unlockable(path, fresh, error) from error
        if path.exists():
            return lock
        lock.release()  # who held it until now has just removed the file that was locked


def _kernel_refusal(path: Path) -> OSError | None:
    """Return why the system locks a file for nobody, None when another holds it: older filelock does not tell."""
    try:
        import fcntl
    except ImportError:
        return None
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError, FileNotFoundError):  # held, EACCES on some file systems; or just let go
        return None
    except OSError as error:
        return error
    return None


def _unlockable(path: Path, fresh: bool, error: OSError | NotImplementedError) -> UsageError | WriteError:
    """Return the error that says so, once a lock file that was made for this is removed."""
    if fresh and path.exists():
        path.unlink()
    number = error.errno if isinstance(error, OSError) and error.errno else errno.ENOSYS
    if number in NO_LOCKS:
        return UsageError(f"{path} cannot be locked: {os.strerror(number)}; give a folder on a local disk with -o")
    return WriteError(number, os.strerror(number), str(path))
