"""One run at a time in a run folder: two would write each other's journal and documents."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from layerprune.errors import UsageError

FILENAME = ".lock"


@contextmanager
def locked(folder: Path | None) -> Iterator[None]:
    """Hold ``folder`` (made when it is not there) for this process while the block runs; None: nothing to hold.

    Blocks of one thread nest. The operating system lets go when the process dies, however it dies. Folders that were
    made here and hold nothing at the end are removed again. Raises ``UsageError`` when another run holds the folder.
    """
    if folder is None:
        yield
        return
    from filelock import FileLock, Timeout

    folder = Path(folder).absolute()
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / FILENAME, timeout=0, is_singleton=True)
    try:
        lock.acquire()
    except Timeout:
        raise UsageError(
            f"another layerprune is at work in {folder}; wait until it is done, or give another folder with -o"
        ) from None
    try:
        yield
    finally:
        if lock.lock_counter == 1:
            (folder / FILENAME).unlink(missing_ok=True)
        lock.release()
        for path in made:
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()
