"""Faults of a file that a person wrote: all of them, each with the line it is on."""

from __future__ import annotations

import typing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ValidationError

from layerprune.errors import did_you_mean

if TYPE_CHECKING:
    from layerprune.documents.marked import Marked


Place = tuple[int | str, ...]  # the way to a value in a file: ("score", "tasks", 0)
# Findings whose value adds nothing to the message.
SELF_EXPLAINING = ("extra_forbidden", "missing", "combination", "option")


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong with one key."""

    line: int | None  # 1-based; None for what does not stand in the file
    key: str  # "score.limit"
    message: str

    def __str__(self) -> str:
        place = "" if self.line is None else f":{self.line}"
        return f"{place}: {self.key + ': ' if self.key else ''}{self.message}"


def faults_of(error: ValidationError, model: type[BaseModel], marked: Marked) -> list[Fault]:
    """Return pydantic's findings as faults; a value that fits no branch of a union is one fault, not one a branch."""
    messages: dict[Place, list[str]] = {}
    values: dict[Place, Any] = {}
    for entry in error.errors():
        place = _keys(entry["loc"], model)
        messages.setdefault(place, []).append(_message(entry, place, model))
        if entry["type"] not in SELF_EXPLAINING:
            values[place] = entry["input"]
    return [
        Fault(
            marked.line(place),
            ".".join(map(str, place)),
            " or ".join(texts) + (f"; got {values[place]!r}" if place in values else ""),
        )
        for place, texts in messages.items()
    ]


def _keys(loc: tuple[int | str, ...], model: type[BaseModel]) -> Place:
    """Return the part of pydantic's location that stands in the file (it also names the branches of unions)."""
    path: list[int | str] = []
    current: type[BaseModel] | None = model
    for part in loc:
        if isinstance(part, int):
            path.append(part)
        elif current is not None:
            path.append(part)
            current = part_model(current, part)
    return tuple(path)


def part_model(model: type[BaseModel], field: str) -> type[BaseModel] | None:
    """Return the model that a field holds, if it holds one."""
    if field not in model.model_fields:
        return None
    hint = model.model_fields[field].annotation
    for choice in (hint, *typing.get_args(hint)):
        if isinstance(choice, type) and issubclass(choice, BaseModel):
            return choice
    return None


def _message(entry: Any, path: Place, model: type[BaseModel]) -> str:
    current: type[BaseModel] | None = model
    for part in path[:-1]:
        current = part_model(current, part) if current is not None and isinstance(part, str) else None
    if entry["type"] == "extra_forbidden" and current is not None:
        known = [name for name in current.model_fields if name != "kind"]
        return f"unknown key.{did_you_mean(str(path[-1]), known)} Known: {', '.join(known)}"
    if entry["type"] == "missing":
        return "this key is needed"
    if entry["type"] == "model_type":
        return "this key holds further keys"
    if entry["type"] == "tuple_type":
        return "should be a list"
    return str(entry["msg"]).removeprefix("Input ").replace(", unable to parse string as an integer", "")
