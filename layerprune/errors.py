"""One tree of errors. Each message is one line: what is wrong, the value seen, what would work."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class LayerpruneError(Exception):
    """Root of every error a user can cause or meet; the command line prints it and exits with code 2."""


class UsageError(LayerpruneError):
    """An option or argument that cannot be used as given."""


class RegistryError(LayerpruneError):
    """An unknown name, a name claimed twice, or a plug-in that cannot be imported."""


class DocumentError(LayerpruneError):
    """A scores, plan, receipt, audit or recipe file that cannot be read, or contradicts another one."""


class SeveralFaults(DocumentError):
    """The faults of one document, a line each: the only message of more than one line."""


class ModelError(LayerpruneError):
    """A model that cannot be found or loaded."""


class CheckpointError(ModelError):
    """A checkpoint folder whose files are missing, damaged or inconsistent."""


class RefusedError(LayerpruneError):
    """A removal that cannot be represented exactly; names the config field or module that stands in the way."""


class TaskError(LayerpruneError):
    """A task that is unknown, has no usable items, or on which the model says nothing."""


class WriteError(LayerpruneError, OSError):
    """What the operating system said of a write: no space, no permission, no such folder. Its ``filename`` says where.

    An ``OSError``, too, with its errno, so that code that cleans up after one cleans up after this.
    """


class ExportError(LayerpruneError):
    """Writing a checkpoint failed; nothing was left behind."""


class TrainingError(LayerpruneError):
    """Training that ran away: the loss is not a number, or far above where it began."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ``" Did you mean 'x'?"`` for the closest known name, or an empty string when nothing is close."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" Did you mean {close[0]!r}?" if close else ""


def one_line(error: BaseException) -> str:
    """Return the first line of an error's text that says something, its type's name where it says nothing."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
