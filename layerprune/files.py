"""Where a command writes and what it follows: checked names, places tried first, files published together, locks."""

from __future__ import annotations

import errno
import os
import re
import shutil
import stat
import threading
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING
from unicodedata import category

from layerprune.errors import CheckpointError, UsageError, WriteError, one_line

if TYPE_CHECKING:
    from filelock import BaseFileLock


# Where a command writes: tried before anything slow, several files published at once, faults that name the file.


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
    except BaseException as error:
        shutil.rmtree(staged, ignore_errors=True)
        if isinstance(error, WriteError) and Path(error.filename).is_relative_to(staged):
            place = folder / Path(error.filename).relative_to(staged)  # named as the caller knows it
            raise WriteError(error.errno, error.strerror, str(place)) from error
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


# Names of files inside a folder, and whether following one stays inside it: one rule for every document and step.


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
        if not path.is_symlink():
            continue
        try:
            target = path.resolve()
        except (OSError, RuntimeError):  # the latter: Python before 3.13, of a loop
            return "a symbolic link that leads to itself"
        if not _of_hub_cache(Path(folder), target):
            inside = target.is_relative_to(Path(folder).resolve())
            return "a symbolic link" if inside else "a symbolic link out of the folder"
    try:
        mode = stat.S_IFMT(path.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return ""
    except OSError as error:
        return f"not readable: {error.strerror or error}"
    return "" if mode == stat.S_IFREG else f"not a regular file but {KINDS.get(mode, 'a special file')}"


def _of_hub_cache(folder: Path, target: Path) -> bool:
    """Whether ``folder`` is <cache>/models--org--name/snapshots/<commit> and a link in it leads to ../../blobs."""
    home = folder.resolve()
    return home.parent.name == "snapshots" and target.parent == home.parent.parent / "blobs" and target.is_file()


# One run at a time in a run folder: two would write each other's journal and documents.


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
    """Return the lock of a folder, held; a lock file that was made for one that cannot be had is removed."""
    from filelock import FileLock, Timeout

    path = folder / FILENAME
    fresh, lock = not path.exists(), FileLock(path, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise UsageError(
            f"another layerprune is at work in {folder}; wait until it is done, or give another folder with -o"
        ) from None
    except (OSError, NotImplementedError) as error:
        if fresh:
            path.unlink(missing_ok=True)
        number = getattr(error, "errno", None) or errno.ENOSYS
        if number in NO_LOCKS:
            said = f"{path} cannot be locked: {os.strerror(number)}"
            raise UsageError(f"{said}; give a folder on a local disk with -o") from error
        raise WriteError(number, os.strerror(number), str(path)) from error
    return lock
