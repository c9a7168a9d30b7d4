"""Reading JSON, YAML and text that others wrote: within bounds, and with every fault in one line."""

from __future__ import annotations

import json
import math
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from layerprune.formatting import in_words

# What is read whole, and held many times over once it is parsed. Real ones stay far below: a tokenizer.json has 35 MB.


MOST_BYTES = 128 * 2**20
MOST_DOCUMENT_BYTES = 512 * 2**20  # scores.json: every item's figures under every candidate, some 13 bytes each
MOST_TEXT_BYTES = 2**30  # of a corpus
MOST_YAML_BYTES = 2**20  # PyYAML reads some 100 kB a second
MOST_DEPTH = 100  # levels of nesting
MOST_DIGITS = 100  # of one number
MOST_CONTAINERS = 10**7  # lists and objects; each takes some hundred bytes, and two or three in a file
MOST_NODES = 100_000  # of YAML once every alias is written out

SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
POINTER = b"version https://git-lfs.github.com/spec/"


def read_bytes(path: Path, most: int = MOST_BYTES) -> bytes:
    """Return a file's bytes; raises ``ValueError`` for more than ``most`` of them, and for a git-lfs pointer.

    For what is no regular file, too: a pipe would be waited for, a device read for ever.
    """
    mode = Path(path).stat().st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):  # opening a folder says what it is
        raise ValueError("no regular file")
    with Path(path).open("rb") as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise ValueError(f"more than {in_words(most)} long")
    if data.startswith(POINTER):
        raise ValueError("a git-lfs pointer in place of the file; fetch it with `git lfs pull`")
    return data


def read_text(path: Path, most: int = MOST_BYTES) -> str:
    """Return a file's text; raises ``ValueError`` as ``read_bytes`` does, and for what is not UTF-8."""
    return read_bytes(path, most).decode("utf-8-sig")


def read_json(path: Path, *, finite: bool = True) -> Any:
    """Return what a JSON file holds; raises ``OSError`` and ``ValueError``, of one line that does not name the file."""
    return parse_json(read_text(path), finite=finite)


def parse_json(text: str, *, finite: bool = True, repeats: bool = True) -> Any:
    """Return the value of a JSON text; raises ``ValueError`` with one line for what is none.

    Beyond the grammar it refuses what some reader behind it cannot take: more than ``MOST_DEPTH`` levels, numbers of
    more than ``MOST_DIGITS`` digits or beyond a double, half a surrogate pair, more than ``MOST_CONTAINERS`` lists and
    objects, with ``finite`` NaN and Infinity, and unless ``repeats`` a key that occurs twice in one object.
    """
    if text.count("[") + text.count("{") > MOST_CONTAINERS:
        raise ValueError(f"more than {MOST_CONTAINERS:,} lists and objects")
    hooks: dict[str, Any] = {"parse_int": _whole, "parse_float": _number}
    if finite:
        hooks["parse_constant"] = _constant
    if not repeats:
        hooks["object_pairs_hook"] = _once
    try:
        value = json.loads(text, **hooks)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error}") from error
    except RecursionError:
        raise ValueError(_too_deep()) from None
    _check_depth(value)
    if SURROGATE.search(text):
        _check_characters(value)
    return value


def _whole(digits: str) -> int:
    if len(digits) > MOST_DIGITS:
        raise ValueError(f"a number of {len(digits)} digits; {MOST_DIGITS} are read")
    return int(digits)


def _number(digits: str) -> float:
    if len(digits) > MOST_DIGITS or not math.isfinite(value := float(digits)):
        raise ValueError(f"the number {_start(digits)} is beyond what is read")
    return value


def _constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON number")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} occurs twice")
    return found


def _check_depth(value: Any) -> None:
    level, depth = [value], 0
    while level:
        level = [inner for outer in level for inner in _inner(outer) if isinstance(inner, dict | list)]
        depth += 1
        if depth > MOST_DEPTH:
            raise ValueError(_too_deep())


def _inner(value: Any) -> Any:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def _check_characters(value: Any) -> None:
    try:
        json.dumps(value, ensure_ascii=False, default=str, skipkeys=True).encode()
    except UnicodeEncodeError as error:
        half = error.object[error.start : error.start + 1]
        raise ValueError(f"half a surrogate pair, {half!a}, which is no character") from None


def _too_deep() -> str:
    return f"nested more than {MOST_DEPTH} levels deep"


def _start(text: str) -> str:
    return text if len(text) <= 40 else f"{text[:40]}..."


def parse_yaml(text: str, loader: type[yaml.SafeLoader] = yaml.SafeLoader) -> tuple[yaml.Node | None, Any]:
    """Return a YAML text's node tree and its value; raises ``ValueError`` or ``yaml.YAMLError`` for what is none.

    Refused, before any value is made, are aliases that contain themselves or multiply to more than ``MOST_NODES``.
    """
    if len(text) > MOST_YAML_BYTES:
        raise ValueError(f"{len(text):,} characters of YAML; {MOST_YAML_BYTES:,} are read")
    try:
        node = yaml.compose(text, Loader=loader)
        if node is None:
            return None, None
        _check_nodes(node)
        made = loader("")
        try:
            value = made.construct_document(node)
        finally:
            made.dispose()
    except RecursionError:
        raise ValueError(_too_deep()) from None
    _check_depth(value)
    _check_characters(value)
    return node, value


def _check_nodes(root: yaml.Node) -> None:
    """Raise ``ValueError`` for a tree that, with every alias written out, is endless or too large."""
    sizes: dict[int, int] = {}
    open_nodes: set[int] = set()
    todo: list[tuple[yaml.Node, bool]] = [(root, False)]
    while todo:
        node, left = todo.pop()
        key = id(node)
        if left:
            open_nodes.discard(key)
            sizes[key] = 1 + sum(sizes[id(inner)] for inner in _below(node))
            if sizes[key] > MOST_NODES:
                raise ValueError(f"more than {MOST_NODES:,} values once its aliases are written out")
        elif key in open_nodes:
            raise ValueError("an alias stands for what contains it")
        elif key not in sizes:
            open_nodes.add(key)
            todo.append((node, True))
            todo.extend((inner, False) for inner in _below(node))


def _below(node: yaml.Node) -> Iterator[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield key
            yield value
    elif isinstance(node, yaml.SequenceNode):
        yield from node.value
