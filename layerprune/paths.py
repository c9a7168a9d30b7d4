"""Names of files inside a folder, and whether following one stays inside it: one rule for every document and step."""

from __future__ import annotations

import os
import stat
from collections.abc import Collection, Iterator
from pathlib import Path
from unicodedata import category

from layerprune.errors import CheckpointError, UsageError

PART_BYTES = 255  # NAME_MAX of Linux, macOS and Windows file systems
NAME_BYTES = 1024  # PATH_MAX of macOS, the shortest of the three
UNLISTED = (".git", ".cache")  # what git and the Hub's client keep beside a model

KINDS = {
    stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
}  # fmt: skip


def checked_name(name: str) -> str:
    """Return ``name`` if it is a relative POSIX path that names a file inside a folder on every system.

    Raises ``ValueError``, without the name, for anything else: absolute paths, drive letters, backslashes, control
    characters, empty parts, ``.`` and ``..``, a part that ends with a space or a dot (Windows drops both).
    """
    parts = name.split("/")
    drive = name[1:2] == ":" and name[0].isascii() and name[0].isalpha()
    odd = "\\" in name or any(category(char) in ("Cc", "Cs") for char in name)
    if drive or odd or any(part in ("", ".", "..") for part in parts):
        raise ValueError("which is not a path inside the folder")
    if any(part.endswith((" ", ".")) for part in parts):
        raise ValueError("which is not a file's name on every system: a part ends with a space or a dot")
    if max(len(part.encode()) for part in parts) > PART_BYTES or len(name.encode()) > NAME_BYTES:
        raise ValueError("which is too long for a file's name")
    return name


def contained(folder: Path, name: str, source: Path | None = None) -> Path:
    """Return ``folder / name`` when that is a regular file of this folder; raises ``CheckpointError`` otherwise.

    No part of ``name`` may be a symbolic link, save in a snapshot of the Hub's cache, whose files are links into its
    own ``blobs``. Nothing is opened, so a named pipe does not block. ``source`` is the file that named it, for the
    message.
    """
    said = f"{source} names {name!r}" if source is not None else f"{folder / name}"
    try:
        checked_name(name)
    except ValueError as error:
        raise CheckpointError(f"{said}, {error}; refused") from None
    fault = _fault(folder, name)
    if fault:
        raise CheckpointError(f"{said}, {fault}; refused")
    if not (folder / name).exists():
        raise CheckpointError(f"{said}, which does not exist in {folder}" if source else f"{said} does not exist")
    return folder / name


def check_plain(folder: Path, names: Collection[str] | None = None) -> None:
    """Raise ``CheckpointError`` for the first of a folder's files that is a link or no regular file.

    ``names``: look at these alone, where they are there; None: at every file below the folder.
    """
    entries = listed(folder) if names is None else ((name, _fault(folder, name)) for name in names)
    for name, fault in entries:
        if fault:
            raise CheckpointError(f"{folder}/{shown(name)}, {fault}; refused")


def refuse_link(folder: Path) -> None:
    """Raise ``UsageError`` where a folder to write into is a link: files elsewhere would be replaced and removed."""
    if folder.is_symlink():
        raise UsageError(f"{folder} is a symbolic link; remove it, or give another folder with -o")


def listed(folder: Path) -> Iterator[tuple[str, str]]:
    """Yield the name of every file below a folder and what is wrong with it; links to folders are not followed.

    An empty string: nothing, it is a regular file. A folder that cannot be read is yielded itself. What git and the
    Hub's client keep there is left out. Raises ``CheckpointError`` where the folder itself cannot be read.
    """
    found: list[str] = []

    def unreadable(error: OSError) -> None:
        place = Path(str(error.filename))
        if place == Path(folder):
            raise CheckpointError(f"cannot read {folder}: {error.strerror}") from error
        found.append(place.relative_to(folder).as_posix())

    for place, folders, files in os.walk(folder, onerror=unreadable):
        here = Path(place)
        if here == Path(folder):
            folders[:] = [name for name in folders if name not in UNLISTED]
            files = [name for name in files if name not in UNLISTED]
        names = [*files, *(name for name in folders if (here / name).is_symlink())]
        found += [(here / name).relative_to(folder).as_posix() for name in names]
    for name in sorted(found):
        yield name, _fault(folder, name)


def shown(name: str) -> str:
    """Return a name for a message: as it is where that is one readable word, else quoted with escapes."""
    return name if name.isprintable() and " " not in name else repr(name)


def same_file(names: Collection[str]) -> tuple[str, str] | None:
    """Return two names that are one file where case does not count, or None."""
    seen: dict[str, str] = {}
    for name in names:
        other = seen.setdefault(name.casefold(), name)
        if other != name:
            return other, name
    return None


def _fault(folder: Path, name: str) -> str:
    """Return what keeps a file from being read, in words; empty for a regular file and for one that is not there."""
    path = Path(folder)
    for part in name.split("/"):
        path = path / part
        if path.is_symlink() and not _of_hub_cache(Path(folder), path):
            inside = path.resolve().is_relative_to(Path(folder).resolve())
            return "a symbolic link" if inside else "a symbolic link out of the folder"
    try:
        mode = stat.S_IFMT(path.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return ""
    except OSError as error:
        return f"not readable: {error.strerror or error}"
    return "" if mode == stat.S_IFREG else f"not a regular file but {KINDS.get(mode, 'a special file')}"


def _of_hub_cache(folder: Path, path: Path) -> bool:
    """Whether ``path`` is <cache>/models--org--name/snapshots/<commit>/..., linked to a file of ../../blobs."""
    home, target = folder.resolve(), path.resolve()
    return home.parent.name == "snapshots" and target.parent == home.parent.parent / "blobs" and target.is_file()
