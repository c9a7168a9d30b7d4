"""What every document shares: frozen, versioned, canonical JSON, sha256, atomic write, one-line errors."""

from __future__ import annotations

import hashlib
import json
import os
from abc import abstractmethod
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from layerprune.errors import DocumentError
from layerprune.output import writing
from layerprune.paths import shown

if TYPE_CHECKING:
    from pandas import DataFrame


SHOWN = 60  # rows of a document's table in a notebook


class Part(BaseModel):
    """A frozen piece of a document; an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Document(Part):
    """A file that one step leaves and the next one takes. ``kind`` and ``format`` stand in every file."""

    filename: ClassVar[str]

    @property
    @abstractmethod
    def headline(self) -> str:
        """One line that says what the document is about."""

    def records(self) -> list[dict[str, Any]]:
        """Return what the document measured as rows for a table; empty where it is no table."""
        return []

    def to_pandas(self) -> DataFrame:
        """Return ``records()`` as a ``pandas.DataFrame``."""
        import pandas

        return pandas.DataFrame(self.records())

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {self.headline}>"

    __str__ = __repr__

    def _repr_html_(self) -> str:
        """Return the headline and the first rows for a notebook."""
        rows = self.records()
        shown = [{name: _cell(value) for name, value in row.items()} for row in rows[:SHOWN]]
        names = dict.fromkeys(name for row in shown for name in row)
        head = "".join(f"<th>{escape(name)}</th>" for name in names)
        body = "".join("<tr>" + "".join(f"<td>{row.get(name, '')}</td>" for name in names) + "</tr>" for row in shown)
        more = f"<p>and {len(rows) - SHOWN} more rows: to_pandas()</p>" if len(rows) > SHOWN else ""
        table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{more}" if rows else ""
        return f"<p><b>{type(self).__name__}</b>: {escape(self.headline)}</p>{table}"

    def canonical_json(self) -> str:
        """Return the one spelling of this document that is hashed: sorted keys, no spaces, UTF-8, no NaN."""
        return json.dumps(
            self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
        )

    def sha256(self) -> str:
        """Return the hex sha256 of the canonical JSON."""
        return hashlib.sha256(self.canonical_json().encode()).hexdigest()

    def save(self, path: Path) -> Path:
        """Write the document for people to read and diff (same bytes for the same content); never half a file."""
        write_atomically(path, (pretty(self.model_dump(mode="json")) + "\n").encode())
        return path

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a document; raises ``DocumentError`` naming the file and the first fault."""
        try:
            text = Path(path).read_text(encoding="utf-8")
        except FileNotFoundError:
            raise DocumentError(f"{path} does not exist; expected a {cls.filename}") from None
        except (OSError, UnicodeDecodeError) as error:
            raise DocumentError(f"cannot read {path}: {error}") from error
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise DocumentError(f"{path} is not JSON: {error}") from error
        return cls.parse(data, source=str(path))

    @classmethod
    def parse(cls, data: Any, source: str) -> Self:
        """Validate plain data; ``source`` is the name used in errors."""
        if not isinstance(data, dict):
            raise DocumentError(f"{source} holds {type(data).__name__} where a {cls.filename} object is expected")
        expected = cls.model_fields["kind"].default
        if data.get("kind") != expected:
            raise DocumentError(f"{source} is a {data.get('kind')!r} document; expected {expected!r}")
        latest = cls.model_fields["format"].default
        if data.get("format") != latest:
            raise DocumentError(f"{source} has format {data.get('format')!r}; this layerprune reads format {latest}")
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            first = error.errors()[0]
            # none: the whole document
            where = [".".join(shown(str(part)) for part in first["loc"])] if first["loc"] else []
            said = first["msg"].removeprefix("Value error, ")
            raise DocumentError(": ".join([source, *where, said])) from error


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, tuple | list):
        return ", ".join(_cell(part) for part in value)
    return "" if value is None else escape(str(value))


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file in full or not at all: a hidden sibling, flushed to disk, then renamed.

    The sibling has one name, so that what a killed process left of it goes with the next write. Two processes must not
    write the same file (``lock``). Raises ``WriteError``, which names the file.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.unlink(missing_ok=True)
        try:
            with partial.open("xb") as file:  # never through a link that lies there
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


def pretty(value: Any, indent: str = "") -> str:
    """Return JSON with sorted keys where lists of plain values stay on one line (a thousand items, one line)."""
    deeper = indent + "  "
    if isinstance(value, dict) and value:
        rows = [f"{deeper}{json.dumps(key, ensure_ascii=False)}: {pretty(value[key], deeper)}" for key in sorted(value)]
        return "{\n" + ",\n".join(rows) + f"\n{indent}}}"
    if isinstance(value, list) and any(isinstance(entry, dict | list) for entry in value):
        return "[\n" + ",\n".join(deeper + pretty(entry, deeper) for entry in value) + f"\n{indent}]"
    return json.dumps(value, ensure_ascii=False, allow_nan=False)
