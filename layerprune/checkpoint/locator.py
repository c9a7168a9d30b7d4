"""Where local models lie on this machine. Documents hold a model's name and fingerprint, and no path.

``locator.json`` in a run folder, and in ``layerprune/`` of a checkpoint, maps fingerprints to folders: outside of what
is hashed, of this machine alone, and never pushed. Nothing is believed because it stands there: who loads a base
compares its fingerprint with the documents.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from layerprune.checkpoint.locate import Folder
from layerprune.checkpoint.opened import Checkpoint
from layerprune.documents import ModelRef
from layerprune.documents.base import pretty, write_atomically
from layerprune.errors import DocumentError, ModelError, one_line

FILENAME = "locator.json"

_known: dict[str, str] = {}  # folders of the local models that this process has read, by fingerprint


def reference(folder: Folder, checkpoint: Checkpoint, *, model_type: str, layers: int, parameters: int) -> ModelRef:
    """Return how documents name the model in ``folder``; where a local one lies is kept for ``record``."""
    fingerprint = checkpoint.fingerprint()
    if folder.revision is None:
        _known[fingerprint] = str(folder.path)
    return ModelRef(
        id=folder.id,
        revision=folder.revision,
        fingerprint=fingerprint,
        model_type=model_type,
        layers=layers,
        parameters=parameters,
    )


def learn(folder: Path) -> None:
    """Read the locator in ``folder``, where there is one; raises ``DocumentError`` for one that is none."""
    path = Path(folder) / FILENAME
    if path.is_symlink() or not path.is_file():  # a link is not what we wrote
        return
    try:
        found: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DocumentError(f"{path} cannot be read: {one_line(error)}; remove it, and give --base") from error
    if not isinstance(found, dict) or not all(isinstance(place, str) for place in found.values()):
        raise DocumentError(f"{path} does not map fingerprints to folders; remove it, and give --base")
    for fingerprint, place in found.items():
        if Path(place).is_dir() or fingerprint not in _known:  # else another folder may hold the same weights
            _known[fingerprint] = place


def record(folder: Path, model: ModelRef) -> None:
    """Write into ``folder`` where a local ``model`` lies, if that is known; one on the Hub needs no locator."""
    if model.revision is None and model.fingerprint in _known:
        data = {model.fingerprint: _known[model.fingerprint]}
        write_atomically(Path(folder) / FILENAME, (pretty(data) + "\n").encode())


def lies_at(model: ModelRef) -> Path | None:
    """Return the folder of a local model where it is known and still there."""
    place = _known.get(model.fingerprint) if model.revision is None else None
    return Path(place) if place is not None and Path(place).is_dir() else None


def source_of(model: ModelRef, given: str | None = None) -> tuple[str, str | None]:
    """Return ``model`` as (folder or Hub id, revision): ``given`` by the user, or where it is known to be.

    Raises ``ModelError`` for a local model that is not known to lie anywhere.
    """
    if given is not None:
        return given, None
    if model.revision is not None:
        return model.id, model.revision
    if (there := lies_at(model)) is not None:
        return str(there), None
    place = _known.get(model.fingerprint)
    why = f"is not at {place} any more" if place else "was a local folder, and nothing here says where it lies"
    raise ModelError(f"the base {model.id} {why}; give --base MODEL")
