"""Where fetched things stay: the user's cache folder, filled folder by folder, each whole or absent."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from layerprune.errors import LayerpruneError

STALE_SECONDS = 3600  # a partial folder this old belongs to a killed process: fetching takes minutes at most


class FetchError(LayerpruneError):
    """Something the demonstration needs could not be fetched; nothing was kept of it."""


def cache_dir() -> Path:
    """Return ``$LAYERPRUNE_CACHE``, else ``layerprune`` in the XDG cache folder; it need not exist yet."""
    override = os.environ.get("LAYERPRUNE_CACHE")
    if override:
        return Path(override).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "layerprune"


@contextmanager
def finished_folder(target: Path) -> Iterator[Path]:
    """Yield an empty folder that becomes ``target`` when the block succeeds and vanishes when it does not.

    When another process finished the same folder first, its result stands and ours is dropped.
    Raises ``FetchError`` when the disk says no.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(target.parent)
        partial = Path(tempfile.mkdtemp(dir=target.parent, prefix=".partial-"))
    except OSError as error:
        reason = f"cannot use the cache folder {target.parent}: {error.strerror}"
        raise FetchError(f"{reason}; set LAYERPRUNE_CACHE to a folder that can be written") from error
    try:
        partial.chmod(0o755)  # mkdtemp makes private folders; a model in a cache is an ordinary folder
        yield partial
        if not target.is_dir():
            partial.rename(target)
    except OSError as error:
        if error.errno is None:  # not the disk: the Hub client's errors are OSErrors too
            raise
        raise FetchError(f"cannot write {target}: {' '.join(str(error).split())}; nothing was kept") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # gone already after the rename


def _remove_stale(folder: Path) -> None:
    for old in folder.glob(".partial-*"):
        with suppress(FileNotFoundError):  # its process finished meanwhile
            if time.time() - old.stat().st_mtime > STALE_SECONDS:
                shutil.rmtree(old, ignore_errors=True)
