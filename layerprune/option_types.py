"""The types of options: how a value is read, from the command line, a recipe or Python, and how help writes it."""

from __future__ import annotations

import math
import os
import re
import stat
from collections.abc import Callable, ItemsView, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from layerprune.errors import UsageError
from layerprune.formatting import parse_size, short

MOST_ROWS = 10**6  # rows of one batch
MOST_CHARACTERS = 4096  # of a text; a path has no more


@dataclass(frozen=True)
class OptionType:
    """A type of option."""

    read: Callable[[Any], Any]  # returns what the program works with, of text or a Python value; raises ValueError
    metavar: str | None = None  # how help writes its value
    is_flag: bool = False
    negative: bool = False  # of a flag: the command line has --no-..., too
    optional: bool = False  # a value may follow the option
    by_name: bool = False  # reads a mapping, so that of several values one is made


def option_type(metavar: str, **more: bool) -> Callable[[Callable[[Any], Any]], OptionType]:
    """Return a decorator that makes a type of the function that reads its values."""
    return lambda read: OptionType(read, metavar, **more)


def text(metavar: str = "TEXT") -> OptionType:
    """Any text; numbers are taken as they are written."""
    return OptionType(_text, metavar)


def _text(value: Any) -> str:
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str):
        raise ValueError(f"{short(value)} is not text")
    return _readable(value)


def _readable(value: str) -> str:
    """Return a text that documents can hold and the system takes as a name; raises ``ValueError`` for another."""
    if len(value) > MOST_CHARACTERS:
        raise ValueError(f"{short(value)} has {len(value):,} characters; at most {MOST_CHARACTERS:,} are read")
    if "\0" in value or any("\ud800" <= letter <= "\udfff" for letter in value):
        raise ValueError(f"{short(value)} holds what is no character of UTF-8, or a NUL")
    return value


@option_type("LAYERS")
def layers(value: Any) -> str:
    """Layers by number and range: ``0-3,-1``, or a list of numbers."""
    return _text(",".join(map(str, value)) if isinstance(value, list | tuple | range) else value)


@option_type("LAYERS|FILE")
def removal(value: Any) -> str:
    """Layers by number and range, or the path of a file that says which."""
    return _text(os.fspath(value)) if isinstance(value, os.PathLike) else str(layers.read(value))


def whole(least: int, most: int) -> OptionType:
    """A whole number between two bounds, both included."""

    @option_type("N")
    def read(value: Any) -> int:
        if isinstance(value, str) and value.strip().removeprefix("-").isdecimal() and len(value) <= 20:
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool):
            raise ValueError(f"{short(value)} is not a whole number from {least} to {most}")
        if not least <= value <= most:
            raise ValueError(f"{short(value)} is not in the range {least} to {most}")
        return value

    return read


def flag(*, negative: bool = False, optional: bool = False) -> OptionType:
    """Yes or no. ``negative``: the command line has ``--no-...``, too. ``optional``: a value may follow the option."""
    return OptionType(_flag, "[BOOL]" if optional else None, is_flag=True, negative=negative, optional=optional)


def _flag(value: Any) -> bool:
    if isinstance(value, str):
        value = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}.get(value.lower())
    if not isinstance(value, bool):
        raise ValueError("neither true nor false")
    return value


@option_type("[NAME]", optional=True)
def template(value: Any) -> bool | str:
    """A chat template: the tokenizer's own (true), none (false), or one by name."""
    if not isinstance(value, bool | str):
        raise ValueError(f"{value!r} is neither true, false nor the name of a template")
    return {"true": True, "false": False}.get(str(value).lower(), value)


@option_type("N|auto")
def rows(value: Any) -> int | str:
    """A number of rows, or ``auto``."""
    try:
        return "auto" if value == "auto" else whole(1, MOST_ROWS).read(value)
    except ValueError:
        raise ValueError(f"{short(value)} is neither auto nor a number from 1 to {MOST_ROWS}") from None


@option_type("SIZE")
def size(value: Any) -> int:
    """Bytes, as people write them: ``4GB``."""
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 10**18:
        value = str(value)
    if not isinstance(value, str):
        raise ValueError(f"{short(value)} is not a size; write 5GB or 500MB")
    try:
        return parse_size(value, "")
    except UsageError as error:
        raise ValueError(str(error).strip()) from error


@option_type("TIME")
def duration(value: Any) -> float:
    """Seconds, as people write them: ``90s``, ``20m``, ``1h30m``; a bare number is seconds."""
    match = re.fullmatch(r"(?:(\d{1,6})h)?(?:(\d{1,6})m)?(?:(\d{1,9})s?)?", str(value)[:40].strip())
    parts = [int(part or 0) for part in match.groups()] if match else []
    if isinstance(value, float) and 0 < value < 10**9:
        return value
    if isinstance(value, bool) or not any(parts):
        raise ValueError(f"{short(value)} is not a time; write 20m, 1h30m or 90s")
    hours, minutes, seconds = parts
    return 3600.0 * hours + 60.0 * minutes + seconds


def list_of(one: OptionType, metavar: str = "NAME,NAME") -> OptionType:
    """Several values of one type, separated by commas on the command line."""

    @option_type(metavar)
    def read(value: Any) -> tuple[Any, ...]:
        parts = value.split(",") if isinstance(value, str) else value
        if not isinstance(parts, list | tuple):
            parts = [parts]
        parts = [part.strip() if isinstance(part, str) else part for part in parts]
        found = tuple(one.read(part) for part in parts if part != "")
        if not found:
            raise ValueError("no name given")
        return found

    return read


names = list_of(text())


@option_type("TASK=NUMBER,...", by_name=True)
def figures(value: Any) -> dict[str, float]:
    """Numbers by the name of a task: ``arc_easy=2,piqa=1``."""
    pairs = [_pair(part) for part in value.split(",")] if isinstance(value, str) else _items(value)
    found: dict[str, float] = {}
    for name, number in pairs:
        if name in found:
            raise ValueError(f"{name!r} is named twice")
        if isinstance(number, bool) or not isinstance(number, int | float) or not math.isfinite(number):
            raise ValueError(f"{name}={number!r} is not a finite number")
        found[name] = float(number)
    return found


def choice(*names: str) -> OptionType:
    """One of a few names."""

    @option_type("NAME")
    def read(value: Any) -> str:
        if value not in names:
            raise ValueError(f"{short(value)} is not one of {', '.join(names)}")
        return str(value)

    return read


def path_to(metavar: str) -> OptionType:
    """A path: of a folder (``DIR``) or of a file (``FILE``)."""

    @option_type(metavar)
    def read(value: Any) -> Path:
        if not isinstance(value, str | os.PathLike):
            raise ValueError(f"{short(value)} is not a path")
        path = Path(_readable(os.fspath(value)))
        try:
            mode = path.stat().st_mode
        except (FileNotFoundError, NotADirectoryError):
            return path  # whoever reads it says so
        except OSError as error:  # a name too long, a loop of links, a folder that may not be entered
            raise ValueError(f"{short(str(path))} is not a path that can be read: {error.strerror}") from error
        if metavar == "DIR" and not stat.S_ISDIR(mode):
            raise ValueError(f"{str(path)!r} is a file, and a folder is asked for")
        if metavar == "FILE" and stat.S_ISDIR(mode):
            raise ValueError(f"{str(path)!r} is a folder, and a file is asked for")
        return path

    return read


folder, file = path_to("DIR"), path_to("FILE")


@option_type("FILE")
def document(value: Any) -> Any:
    """A document: the path of its file, or what was read from it."""
    return file.read(value) if isinstance(value, str | os.PathLike) else value


@option_type("LABEL=PLAN", by_name=True)
def labelled_plans(value: Any) -> dict[str, Any]:
    """Plans, as paths or documents, by a label of their own: ``cosine=cosine/plan.json``."""
    if isinstance(value, str):
        label, equals, path = value.partition("=")
        if not (label and equals and path):
            raise ValueError(f"{value!r} is not a label and a plan; write cosine=cosine/plan.json")
        return {label: Path(path)}
    return {str(label): document.read(plan) for label, plan in _items(value)}


def _pair(text: str) -> tuple[str, float]:
    name, equals, number = (piece.strip() for piece in text.partition("="))
    try:
        if not (name and equals) or not math.isfinite(float(number)):
            raise ValueError
    except ValueError:
        raise ValueError(f"{text!r} is not a task with a number; write arc_easy=2,piqa=1") from None
    return name, float(number)


def _items(value: Any) -> ItemsView[Any, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{short(value)} is not a mapping by name")
    return value.items()
