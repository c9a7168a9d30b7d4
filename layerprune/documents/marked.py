"""YAML with the line of every key, so that a fault can be shown where it is."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from layerprune.documents.faults import Fault, Place
from layerprune.errors import DocumentError


@dataclass
class Marked:
    """Plain data, and the 1-based line of each of its keys and entries."""

    data: dict[str, Any]
    lines: dict[Place, int | None] = field(default_factory=dict)  # None: set from outside the file
    faults: list[Fault] = field(default_factory=list)

    def line(self, place: Place) -> int | None:
        """Return the line of ``place``, or of the nearest thing around it that stands in the file."""
        for length in range(len(place), -1, -1):
            if place[:length] in self.lines:
                return self.lines[place[:length]]
        return None


def read_marked(path: Path) -> Marked:
    """Read a YAML mapping; raises ``DocumentError`` when the file cannot be read or is not one."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise DocumentError(f"{path} does not exist; expected a recipe (YAML)") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DocumentError(f"cannot read {path}: {error}") from error
    try:
        node, data = yaml.compose(text, Loader=yaml.SafeLoader), yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date that no calendar has
        mark = getattr(error, "problem_mark", None)
        place = f":{mark.line + 1}" if mark else ""
        raise DocumentError(f"{path}{place}: not YAML: {getattr(error, 'problem', None) or error}") from error
    if not isinstance(data, dict):
        raise DocumentError(f"{path} holds {type(data).__name__} where a recipe's keys are expected")
    marked = Marked(data)
    _mark(node, (), marked)
    return marked


def _mark(node: yaml.Node | None, place: Place, marked: Marked) -> None:
    if node is None:
        return
    marked.lines.setdefault(place, node.start_mark.line + 1)
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            inner = (*place, str(key.value))
            if key.value in seen:
                name = ".".join(map(str, inner))
                marked.faults.append(Fault(key.start_mark.line + 1, name, "this key is given twice"))
            seen.add(key.value)
            marked.lines[inner] = key.start_mark.line + 1
            _mark(value, inner, marked)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            _mark(value, (*place, index), marked)
