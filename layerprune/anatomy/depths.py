"""What would work where a config class refuses a depth that its own lists of layers contradict."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from layerprune.anatomy.fields import DEPTH_KEYS, FIELDS
from layerprune.checkpoint.opened import Checkpoint
from layerprune.errors import CheckpointError

LAYER = re.compile(r"(.*?)\.(\d+)\.")  # the first number of a tensor's name, and what stands before it
OTHER = re.compile(r"vision|visual|image|audio|speech|mtp")  # stacks that are not the decoder's


def stale_depth(folder: Path) -> str:
    """Return advice, by the number of layers that the weights hold, to end a message with; empty where it has none.

    Such a config cannot be read, so that its model is not there to hold the weights against: they go by their names.
    """
    if not (folder / "config.json").is_file():
        return ""
    try:
        content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        layers = _layers(Checkpoint.open(folder).tensors)
    except (OSError, ValueError, CheckpointError):
        return ""  # no JSON, or no whole weights: no number of layers to go by
    part = content.get("text_config", content) if isinstance(content, dict) else None
    return _advice(part, layers) if layers and isinstance(part, dict) else ""


def _advice(fields: dict[str, Any], layers: int) -> str:
    key = next((key for key in DEPTH_KEYS if key in fields), None)
    lists = {name: len(fields[name]) for name, kind in FIELDS.items()
             if kind == "list" and isinstance(fields.get(name), list)}  # fmt: skip
    if key is None or not any(length != fields[key] for length in lists.values()):
        return ""
    todo = [f"set {key} to {layers}"] if fields[key] != layers else []
    todo += [f"give {name} one entry for each" for name, length in lists.items() if length != layers]
    return f"; the weights hold {layers} layers: {' and '.join(todo)}"


def _layers(names: Iterable[str]) -> int:
    """Return how many layers tensors of these names make; 0 where they are not numbered from 0, or more than once."""
    stacks: dict[str, set[int]] = defaultdict(set)
    for name in names:
        if (match := LAYER.match(name)) and not OTHER.search(match[1]):
            stacks[match[1]].add(int(match[2]))
    found = next(iter(stacks.values()), set())
    return len(found) if len(stacks) == 1 and found == {*range(len(found))} else 0
