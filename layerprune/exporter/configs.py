"""config.json: read with suspicion, rebuilt as transformers will read it, compared field by field."""

from __future__ import annotations

import json
import re
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from layerprune.anatomy import Sources
from layerprune.documents import Change
from layerprune.errors import CheckpointError, RefusedError, one_line

if TYPE_CHECKING:
    from transformers import PretrainedConfig

GENERATION = "generation_config.json"
EARLY_EXIT = "assistant_early_exit"  # how many of the first layers draft tokens (transformers' GenerationConfig)
DOLA = "dola_layers"  # after how many layers the contrasted logits are read; "low" and "high" follow the depth
# Whatever else names layers has no meaning that is known here. "alignment_heads" are Whisper's [layer, head] pairs.
LAYER_FIELD = re.compile(r"layer|early_exit|alignment_heads")


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


def prune_generation(content: dict[str, Any], sources: Sources) -> dict[str, Any]:
    """Return the generation config of the pruned model: layer counts mapped, and left out where that is not possible.

    A count of the first layers becomes the count of those that are left of them. Left out are counts that become none
    or all layers, and fields about layers that are not known here.
    """
    new: dict[str, Any] = {}
    for key, value in content.items():
        if key == EARLY_EXIT and _is_count(value):
            count = _left_of(value, sources)
            new |= {key: count} if 0 < count < len(sources) else {}
        elif key == DOLA and isinstance(value, list) and all(map(_is_count, value)):
            counts = {_left_of(entry, sources) for entry in value} - {len(sources)}
            new |= {key: sorted(counts)} if counts else {}
        elif isinstance(value, dict):
            new[key] = prune_generation(value, sources)
        elif not (LAYER_FIELD.search(key) and _counts(value)):
            new[key] = value
    return new if len(sources) < sources.depth else content


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _counts(value: Any) -> bool:
    return _is_count(value) or (isinstance(value, list) and any(map(_counts, value)))


def _left_of(count: int, sources: Sources) -> int:
    """Return how many layers of the result come from the first ``count`` of the base."""
    return sum(layer < count for layer in sources.layers)


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
