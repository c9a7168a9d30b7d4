"""config.json: read with suspicion, rebuilt as transformers will read it, compared field by field."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from layerprune.documents import Change
from layerprune.errors import CheckpointError, RefusedError, one_line

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; raises ``CheckpointError`` naming the file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not an object")
    return content


def rebuilt(config: PretrainedConfig, content: dict[str, Any]) -> PretrainedConfig:
    """Return a config of the same class from new content of config.json; ``RefusedError`` when it is not accepted."""
    try:
        with TemporaryDirectory() as folder:  # read as a file, as everyone will: JSON has no infinity, config.json does
            (Path(folder) / "config.json").write_text(json.dumps(content), encoding="utf-8")
            return type(config).from_pretrained(folder)
    except Exception as error:  # strict config classes raise their own errors
        name = type(config).__name__
        raise RefusedError(f"the pruned config is not one that {name} accepts: {one_line(error)}") from error


def config_changes(before: dict[str, Any], after: dict[str, Any], path: str = "") -> dict[str, Change]:
    """Return the fields that differ, nested ones by dotted path."""
    changes: dict[str, Change] = {}
    for key in sorted(before.keys() | after.keys()):
        old, new = before.get(key), after.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            changes.update(config_changes(old, new, f"{path}{key}."))
        elif old != new:
            changes[f"{path}{key}"] = Change(before=old, after=new)
    return changes
