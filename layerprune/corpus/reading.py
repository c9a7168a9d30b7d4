"""Documents from where a user keeps them: a text, JSONL or parquet file, a folder of those, or a Hub dataset.

A record is one of the forms that trainers take: ``{"text": ...}``, ``{"messages": [{"role", "content"}, ...]}`` or
``{"prompt": ..., "completion": ...}`` (strings or messages).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from layerprune.errors import UsageError, one_line

SUFFIXES = {".txt": "text", ".md": "text", ".jsonl": "jsonl", ".parquet": "parquet"}
PARAGRAPHS = "\n\n"
BUILTIN = "builtin"
FORMS = "'text', 'messages', or 'prompt' and 'completion'"


@dataclass(frozen=True)
class Document:
    """One document: plain text, or a chat whose assistant's messages are the answers."""

    text: str | None = None
    messages: tuple[tuple[str, str], ...] = ()  # (role, content)

    @property
    def words(self) -> str:
        """All of its text, for looking things up in."""
        return self.text if self.text is not None else "\n".join(content for _, content in self.messages)

    def key(self) -> str:
        """What its hash stands for."""
        return self.text if self.text is not None else repr(self.messages)


def read_documents(source: str) -> tuple[str, list[Document]]:
    """Return a name for the source, without the folders above it, and its documents in order.

    ``source``: ``builtin`` (the corpus in this package), a file or folder, or a Hub dataset, ``owner/name`` or
    ``owner/name:split``. Raises ``UsageError`` naming file and record.
    """
    files = find_source(source)
    if files is None:
        return source, _from_hub(source)
    return (BUILTIN if source == BUILTIN else Path(source).name), _from_files(files)


def find_source(source: str) -> list[Path] | None:
    """Return the files of a source, None for one that only the Hub can have; raises ``UsageError`` without reading."""
    if source == BUILTIN:
        return [Path(__file__).parent / "prose.jsonl"]
    path = Path(source).expanduser()
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix in SUFFIXES and file.is_file())
        if not files:
            raise UsageError(f"the folder {source} holds no text: none of {', '.join(SUFFIXES)}")
        return files
    if path.is_file():
        if path.suffix not in SUFFIXES:
            raise UsageError(f"{source} is none of {', '.join(SUFFIXES)}")
        return [path]
    if source.startswith((".", "/", "~")) or path.suffix in SUFFIXES:
        raise UsageError(f"the corpus {source} does not exist; give a file, a folder, a Hub dataset or {BUILTIN}")
    return None


def _from_files(files: Iterable[Path]) -> list[Document]:
    found: list[Document] = []
    for file in files:
        kind = SUFFIXES[file.suffix]
        if kind == "text":
            try:
                content = file.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise UsageError(f"cannot read the corpus {file}: {one_line(error)}") from error
            found += [Document(text=part) for part in _parts(content)]
        else:
            rows = enumerate(_rows(file, kind), 1)
            found += [_document(record, f"{file}, record {number}") for number, record in rows]
    return found


def _parts(content: str) -> list[str]:
    """A plain text is one document a paragraph: what is held out must not be the whole of a file."""
    return [part.strip() for part in content.split(PARAGRAPHS) if part.strip()]


def _rows(file: Path, kind: str) -> Iterable[Mapping[str, Any]]:
    import json

    if kind == "parquet":
        import pyarrow.parquet

        try:
            rows: list[Mapping[str, Any]] = pyarrow.parquet.read_table(file).to_pylist()
        except (OSError, ValueError) as error:  # pyarrow's own errors are these two
            raise UsageError(f"cannot read the corpus {file}: {one_line(error)}") from error
        return rows
    try:
        content = file.read_text(encoding="utf-8")
        # Not splitlines: a string in JSON may hold U+2028, U+2029 and U+0085 as they are.
        return [json.loads(line) for line in content.split("\n") if line.strip()]
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot read the corpus {file}: {one_line(error)}") from error


def _from_hub(source: str) -> list[Document]:
    import datasets

    name, _, split = source.partition(":")
    try:
        rows = datasets.load_dataset(name, split=split or "train")
    except Exception as error:  # datasets raises anything from FileNotFoundError to httpx errors
        raise UsageError(
            f"the corpus {source} is no file or folder here, and the Hub does not give it: {one_line(error)}"
        ) from error
    return [_document(record, f"{source}, record {number}") for number, record in enumerate(rows, 1)]


def _document(record: Any, where: str) -> Document:
    if isinstance(record, Mapping):
        if isinstance(record.get("text"), str):
            return Document(text=record["text"])
        if record.get("messages") is not None:
            return Document(messages=_messages(record["messages"], where))
        if record.get("prompt") is not None and record.get("completion") is not None:
            prompt, answer = record["prompt"], record["completion"]
            asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
            said = [{"role": "assistant", "content": answer}] if isinstance(answer, str) else answer
            return Document(messages=_messages([*asked, *said], where))
        known = ", ".join(map(str, record)) or "nothing"
        raise UsageError(f"{where} has the keys {known}; expected {FORMS}")
    raise UsageError(f"{where} is a {type(record).__name__}; expected an object with {FORMS}")


def _messages(value: Any, where: str) -> tuple[tuple[str, str], ...]:
    try:
        found = tuple((str(entry["role"]), entry["content"]) for entry in value)
    except (TypeError, KeyError) as error:
        raise UsageError(f"{where}: messages are objects with role and content: {one_line(error)}") from error
    if not all(isinstance(content, str) for _, content in found):
        raise UsageError(f"{where}: a message's content is not text")
    if not any(role == "assistant" for role, _ in found):
        raise UsageError(f"{where}: no message has the role 'assistant', so there is no answer to learn")
    return found
