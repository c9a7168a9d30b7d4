"""A written file as a document names it: its sha256 and its length."""

from __future__ import annotations

import hashlib
from pathlib import Path

from layerprune.checkpoint.folder import flush_to_disk
from layerprune.documents import FileEntry


def entry_of(path: Path) -> FileEntry:
    """Hash a file and wait until it is on the disk."""
    with path.open("rb") as file:  # out of the page cache, before the flush lets it go
        digest = hashlib.file_digest(file, "sha256")
    flush_to_disk(path)
    return FileEntry(sha256=digest.hexdigest(), bytes=path.stat().st_size)
