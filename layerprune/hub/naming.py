"""The base's name in public: its Hub id, proven by its files, or the bare name of its folder; never a local path."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from layerprune.auditor.exported import short
from layerprune.checkpoint import Checkpoint
from layerprune.documents import Receipt
from layerprune.errors import UsageError
from layerprune.progress import SILENT, Progress
from layerprune.report.card import base_name, base_on_hub

WITHHELD = "not compared: published without a Hub id"
UNCHANGED = "its own base went by its public name; files were left out, or a base before it was a local folder"
GONE = "not compared: the base's folder was not here any more"


@dataclass(frozen=True)
class Name:
    """What the documents call the base in public."""

    id: str
    revision: str | None
    checked: str  # how it is known that this is the model the checkpoint was made from


def is_local(receipt: Receipt) -> bool:
    """Whether the base is known by a place on somebody's disk."""
    return Path(receipt.base.id).is_absolute()


def holds_paths(receipt: Receipt) -> bool:
    """Whether the base of this round or of an earlier one is known by a place on somebody's disk."""
    return any(map(is_local, (receipt, *(one.receipt for one in receipt.rounds))))


def check_choice(receipt: Receipt, base_model: str | None, unnamed_base: bool) -> None:
    """Raise ``UsageError`` unless exactly what is needed to name the base was given."""
    if base_model is not None and unnamed_base:
        raise UsageError("--base-model names the base and --unnamed-base leaves it without a name; give one of them")
    if base_model is not None and not base_on_hub(base_model):
        raise UsageError(f"--base-model {base_model!r} is not a Hub id; write org/name")
    local, given = is_local(receipt), base_model is not None or unnamed_base
    if given and not local:
        raise UsageError(f"the documents name the base as {receipt.base.id}; --base-model and --unnamed-base are for "
                         "bases that were local folders")  # fmt: skip
    if local and not given:
        raise UsageError(
            f"this checkpoint was made from the local folder {base_name(receipt.base.id)}, and its documents hold that "
            "folder's path, which would be published: give --base-model org/name if it is a model on the Hub, or "
            "--unnamed-base to publish the folder's name alone"
        )


def withheld(receipt: Receipt) -> Name:
    """Return the folder's bare name, spelt so that nobody takes it for a Hub id."""
    return Name(f"./{base_name(receipt.base.id)}", None, WITHHELD)


def check_folder(receipt: Receipt) -> None:
    """Raise ``UsageError`` when the base's folder holds other weights by now, which prove nothing."""
    folder = Path(receipt.base.id)
    if not folder.is_dir():  # and the name will say so
        return
    found = Checkpoint.open(folder).fingerprint()
    if found != receipt.base.fingerprint:
        raise UsageError(
            f"the folder {folder.name} no longer holds the base of this checkpoint: its weights' fingerprint is "
            f"{short(found)}, the receipt says {short(receipt.base.fingerprint)}; put the base back, "
            "or give --unnamed-base"
        )


def named(receipt: Receipt, base_model: str, api: Any, progress: Progress = SILENT) -> Name:
    """Return the base's Hub id with its commit, when the Hub has the very files that the base's folder holds.

    Nothing is downloaded: the Hub tells the sha256 of each weight file. Raises ``UsageError`` for another model; a base
    folder that is gone cannot be compared, and the name says so.
    """
    info = api.model_info(base_model, files_metadata=True)
    there = {file.rfilename: file.lfs.sha256 for file in info.siblings if file.lfs is not None}
    folder = Path(receipt.base.id)
    if not folder.is_dir():
        return Name(base_model, None, GONE)
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
                    f"{digest[:12]}...: the Hub's model {has}; name the right one, or give --unnamed-base"
                )
            advance(file.stat().st_size)
    return Name(base_model, info.sha, f"sha256 of {len(files)} weight file{'s' * (len(files) > 1)} equal on the Hub")
