"""MODEL as a user types it, a local folder or a Hub id, to a folder on this disk; and where local models lie."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from layerprune import parsing
from layerprune.artifacts import ModelRef
from layerprune.artifacts.base import pretty, write_atomically
from layerprune.checkpoint.companions import MODULES, PATTERNS, TEMPLATES, is_companion, is_licence, pipeline_files
from layerprune.checkpoint.safetensors import INDEX, PICKLES, WEIGHTS, Checkpoint, HubFile, read_json, why_no_weights
from layerprune.errors import CheckpointError, DocumentError, ModelError, one_line
from layerprune.files import check_plain
from layerprune.formatting import CONTROL, in_words

# MODEL as a user types it, a local folder or a Hub id, to a folder on this disk.


# Everything a model needs beside its weights. No pickle matches. Python files are fetched, never run without
# trust_remote_code. What is carried into the result is decided by ``companions``.
LICENCES = ("license", "licence", "notice", "copying", "copyright", "policy", "legal", "patents", "terms", "eula")
SMALL_FILES = (
    "*.json", "*.txt", "*.py", "tokenizer*", "README.md", *PATTERNS,
    *(
        shape.format("".join(f"[{c}{c.upper()}]" for c in word))  # the Hub's patterns know case
        for word in LICENCES
        for shape in ("*{}", "{}[-_.]*", "*{}*.md", "*{}*.MD", "*{}*.rst", "*{}*.html", "*{}*.pdf")
    ),
)  # fmt: skip
NOT_FETCHED = (
    "*/*.json", "*/*.txt", "*/*.py", "*/*.model", "onnx/*", "gguf/*", "original/*", "*.onnx*", "*.gguf", *PICKLES,
)  # fmt: skip
READ = ("config.json", "adapter_config.json")  # by transformers, beside the companions
HUB_ID = re.compile(r"\w[\w.-]{0,95}(/\w[\w.-]{0,95})?")


@dataclass(frozen=True)
class Folder:
    """A model's folder on this disk and the name it is known by."""

    path: Path
    id: str  # Hub id, or the folder's name
    revision: str | None  # Hub commit; None for a local folder

    def open(self) -> Checkpoint:
        """Read the headers of the weights; of a Hub model's files that have not been fetched, from the Hub."""
        return Checkpoint.open(self.path, None if self.revision is None else partial(HubFile, self.id, self.revision))


def locate(model: str, revision: str | None = None, *, shards: bool = True, weights: bool = True) -> Folder:
    """Return the local folder, or the Hub snapshot (downloaded when it is not in the cache).

    Fetched are safetensors, JSON, tokenizer and licence files; no pickle. Without ``shards`` the weights of a Hub model
    that come in several files are left for ``fetch``; without ``weights`` one in a single file is left, too, and only
    headers can be read (``Folder.open``). ``revision`` is a branch, tag or commit of a Hub model. Raises
    ``ModelError`` for a path that does not exist or a model the Hub does not give.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        if revision is not None:
            raise ModelError(f"{model} is a local folder; a revision ({revision!r}) is for Hub ids only")
        _check_files(path.resolve())
        return Folder(path.resolve(), path.resolve().name, None)
    if path.exists():
        raise ModelError(f"{model} is a file; expected a folder with config.json and safetensors, or a Hub id")
    if _reads_as_path(model):
        raise ModelError(f"{model} does not exist; expected a local folder or a Hub id like 'org/name'")
    path = _download(model, revision, [*SMALL_FILES, *([WEIGHTS] if weights else [])], NOT_FETCHED)
    if not (path / INDEX).exists() and not (path / WEIGHTS).exists():
        names = _names_on_hub(model, path.name)
        if WEIGHTS not in names:
            raise CheckpointError(f"{model} {why_no_weights(names)}")
    named = _weight_files(path) if shards and weights else []
    if (path / MODULES).exists():  # a sentence-transformers pipeline
        files, why = pipeline_files(read_json(path / MODULES))
        named += [] if why else files  # none where it cannot be carried along
    if named:
        _fetch_named(model, path.name, named)
    return Folder(path, model, path.name)


def fetch(folder: Folder, files: Iterable[HubFile]) -> None:
    """Download files of a Hub model that were left; ``ModelError`` when the Hub does not give them."""
    _fetch_named(folder.id, folder.revision, sorted(file.path for file in files))


def _check_files(folder: Path) -> None:
    """Raise ``CheckpointError`` where a file that a model is loaded from is a link, no regular file, or not fetched.

    transformers would follow it wherever it leads, or wait for ever on a named pipe. A licence may be one here: export,
    which would carry it along, refuses it.
    """
    names = [entry.name for entry in folder.iterdir()]
    if (folder / TEMPLATES).is_dir():
        names += [f"{TEMPLATES}/{entry.name}" for entry in (folder / TEMPLATES).iterdir()]
    read = [name for name in names if name in READ or name.endswith(".py") or is_companion(name)]
    read = sorted(name for name in read if not is_licence(name))
    check_plain(folder, read)
    for name in read:
        size = (folder / name).stat().st_size
        if size > parsing.MOST_BYTES:
            most = in_words(parsing.MOST_BYTES)
            raise CheckpointError(f"{folder / name} is {in_words(size)} long; such a file has at most {most}")
        with (folder / name).open("rb") as file:
            if file.read(len(parsing.POINTER)) == parsing.POINTER:
                said = "is a git-lfs pointer in place of the file; fetch it: git lfs pull"
                raise CheckpointError(f"{folder / name} {said}")


def fetch_documents(folder: Folder) -> None:
    """Download what layerprune wrote beside a Hub model that it pruned; nothing for another, or a local folder."""
    if folder.revision is not None:
        _download(folder.id, folder.revision, ["layerprune/*.json"])


def _reads_as_path(model: str) -> bool:
    if model.startswith((".", "~")) or os.sep in model.replace("/", "") or not HUB_ID.fullmatch(model):
        return True
    return "/" in model and Path(model).parent.is_dir()  # the folder is there, its child is not: a typing mistake


def _fetch_named(model: str, revision: str | None, names: Iterable[str]) -> None:
    """Download these files and no others: a name may hold what a pattern gives a meaning to."""
    _download(model, revision, [glob.escape(name) for name in names])


def _names_on_hub(model: str, revision: str) -> list[str]:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        return HfApi(library_name="layerprune").list_repo_files(model, revision=revision)
    except (OSError, HfHubHTTPError, OfflineModeIsEnabled) as error:
        said = f"the weights of {model} are not here, and the Hub does not tell"
        raise ModelError(f"{said}: {one_line(error)}") from error


def _download(model: str, revision: str | None, patterns: list[str], ignored: Sequence[str] = ()) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import CachedRepoTreeNotFoundError, HFValidationError, RevisionResolutionError
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=patterns, ignore_patterns=list(ignored)))
    except (OSError, HFValidationError, RevisionResolutionError, CachedRepoTreeNotFoundError) as error:
        at = f" at revision {revision!r}" if revision else ""
        raise ModelError(f"no folder {model} here, and the Hub does not give it{at}: {one_line(error)}") from error


def _weight_files(small: Path) -> list[str]:
    """Return the names of the weight files; the index's entries are checked again, strictly, when it is opened."""
    index = small / INDEX
    if not index.exists():
        return [WEIGHTS]
    try:
        names = sorted({WEIGHTS, *parsing.read_json(index)["weight_map"].values()})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} has no weight_map of tensor names to file names") from error
    for name in names:
        if not str(name).endswith(".safetensors"):
            raise CheckpointError(f"{index} names {name!r}, which is no safetensors file")
    return names


# Where local models lie on this machine. Documents hold a model's name and fingerprint, and no path.
#
# ``locator.json`` in a run folder, and in ``layerprune/`` of a checkpoint, maps fingerprints to folders: outside of
# what is hashed, of this machine alone, and never pushed. Nothing is believed because it stands there: who loads a base
# compares its fingerprint with the documents.


FILENAME = "locator.json"

_known: dict[str, str] = {}  # folders of the local models that this process has read, by fingerprint


def reference(folder: Folder, checkpoint: Checkpoint, *, model_type: str, layers: int, parameters: int) -> ModelRef:
    """Return how documents name the model in ``folder``; where a local one lies is kept for ``record``."""
    if "\n" in folder.id or CONTROL.search(folder.id):
        raise ModelError(f"the folder {folder.id!a} has a name that cannot be printed; rename it")
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
        found: Any = parsing.read_json(path)
    except (OSError, ValueError) as error:
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
