"""A written file as a document names it: its sha256 and its length."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Event

from layerprune.checkpoint.folder import flush_to_disk
from layerprune.documents import FileEntry

CHUNK_BYTES = 4 * 2**20
POLL_SECONDS = 0.005  # a file that has been read as far as it goes is looked at again then


def entry_of(path: Path) -> FileEntry:
    """Hash a file and wait until it is on the disk."""
    with path.open("rb") as file:  # out of the page cache, before the flush lets it go
        digest = hashlib.file_digest(file, "sha256")
    flush_to_disk(path)
    return FileEntry(sha256=digest.hexdigest(), bytes=path.stat().st_size)


class Followed:
    """Hashes and flushes files, one after the other, while another thread appends to them: see ``following``."""

    def __init__(self, paths: Sequence[Path], hasher: ThreadPoolExecutor, flusher: ThreadPoolExecutor) -> None:
        self._flusher = flusher
        self._complete = {path: Event() for path in paths}
        self._hashes = {path: hasher.submit(_follow, path, event) for path, event in self._complete.items()}
        self._flushes: list[Future[None]] = []

    def complete(self, path: Path) -> None:
        """Say that nothing more will be appended to a file."""
        self._complete[path].set()
        self._flushes.append(self._flusher.submit(flush_to_disk, path))

    def entries(self) -> dict[Path, FileEntry]:
        """Wait until every file is hashed and on the disk; raises what went wrong on the way."""
        for flush in self._flushes:
            flush.result()
        return {path: future.result() for path, future in self._hashes.items()}

    def abandon(self) -> None:
        """Let no thread wait for bytes that will not come, nor for the disk on account of files that will go."""
        for future in (*self._hashes.values(), *self._flushes):
            future.cancel()
        for event in self._complete.values():
            event.set()


@contextmanager
def following(paths: Sequence[Path]) -> Iterator[Followed]:
    """Hash and flush files that are written meanwhile, in this order, each only ever appended to.

    The hash of a large file is there moments after its last byte: the thread that hashes reads behind the one that
    writes, and neither waits for the disk, which a third one does.
    """
    with ThreadPoolExecutor(1) as hasher, ThreadPoolExecutor(1) as flusher:
        followed = Followed(paths, hasher, flusher)
        try:
            yield followed
        finally:
            followed.abandon()


def _follow(path: Path, complete: Event) -> FileEntry:
    while not path.exists():
        if complete.wait(POLL_SECONDS):
            break
    digest, size = hashlib.sha256(), 0
    with path.open("rb", buffering=0) as file:
        while True:
            last = complete.is_set()  # asked before reading: what was appended until then is read below
            data = file.read(CHUNK_BYTES)
            digest.update(data)
            size += len(data)
            if not data:
                if last:
                    return FileEntry(sha256=digest.hexdigest(), bytes=size)
                complete.wait(POLL_SECONDS)
