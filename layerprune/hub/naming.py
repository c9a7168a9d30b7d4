"""What the Hub is told of the base: its Hub id, held against the base's files where they are at hand; never a path."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from layerprune.auditor.exported import short
from layerprune.checkpoint import Checkpoint
from layerprune.checkpoint.locator import lies_at
from layerprune.documents import ModelRef
from layerprune.errors import UsageError
from layerprune.progress import SILENT, Progress
from layerprune.report.card import HUB_ID

WRITTEN = (".json", ".md", ".html", ".txt", ".jinja", ".yaml", ".py")  # files that may hold a path in words


def check_name(base: ModelRef, base_model: str) -> None:
    """Raise ``UsageError`` unless ``base_model`` can name the base, a local folder that has not changed since."""
    if not HUB_ID.fullmatch(base_model):
        raise UsageError(f"--base-model {base_model!r} is not a Hub id; write org/name")
    if base.revision is not None:
        raise UsageError(f"the documents name the base as {base.id}; --base-model is for one that was a local folder")
    folder = lies_at(base)
    if folder is None:  # and nothing is compared
        return
    found = Checkpoint.open(folder).fingerprint()
    if found != base.fingerprint:
        raise UsageError(
            f"the folder {folder.name} no longer holds the base of this checkpoint: its weights' fingerprint is "
            f"{short(found)}, the receipt says {short(base.fingerprint)}; put the base back, or leave --base-model out"
        )


def compare(base: ModelRef, base_model: str, api: Any, progress: Progress = SILENT) -> str:
    """Return how it is known that ``base_model`` on the Hub is the base: by the sha256 of each weight file.

    Nothing is downloaded. Raises ``UsageError`` for another model; a base whose folder is not known here cannot be
    compared, and the answer says so.
    """
    info = api.model_info(base_model, files_metadata=True)
    there = {file.rfilename: file.lfs.sha256 for file in info.siblings if file.lfs is not None}
    folder = lies_at(base)
    if folder is None:
        return "not compared, the base's folder is not known here"
    files = Checkpoint.open(folder).files
    with progress.task(f"comparing the base with {base_model}", sum(f.stat().st_size for f in files), "B") as advance:
        for file in files:
            name = file.relative_to(folder).as_posix()
            with file.open("rb") as handle:
                digest = hashlib.file_digest(handle, "sha256").hexdigest()
            if there.get(name) != digest:
                has = "has another file of that name" if name in there else "has no such file"
                raise UsageError(
                    f"{base_model} is not the base of this checkpoint, which was made with a {name} of sha256 "
                    f"{digest[:12]}...: the Hub's model {has}; name the right one, or leave --base-model out"
                )
            advance(file.stat().st_size)
    return f"sha256 of {len(files)} weight file{'s' * (len(files) > 1)} equal on the Hub"


def check_no_path(folder: Path, files: Sequence[str], path: str) -> None:
    """Raise ``UsageError`` when a file that is about to be published holds a local path in words.

    A path that only ends or begins like it is another one: ``some/model`` and ``/models`` are not ``/model``.
    """
    whole = re.compile(rb"(?<![\w.~*})-])" + re.escape(path.rstrip("/").encode()) + rb"(?![\w-]|\.\w)")
    for file in files:
        if file.endswith(WRITTEN) and whole.search((folder / file).read_bytes()):
            raise UsageError(f"{file} holds the path of the local folder {Path(path).name}; nothing was sent")
