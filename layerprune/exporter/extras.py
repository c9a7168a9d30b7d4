"""The files of a model folder beside its weights and config: which are carried along, which are left behind."""

from __future__ import annotations

import fnmatch
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from layerprune.anatomy import Sources
from layerprune.checkpoint import contained
from layerprune.checkpoint.companions import companions
from layerprune.documents import Change
from layerprune.errors import RefusedError
from layerprune.exporter.configs import GENERATION, config_changes, prune_generation, read_json
from layerprune.paths import listed

QUANTISATION_FILES = "*quant*config*.json"


@dataclass(frozen=True)
class Extras:
    """What happens to each file beside weights and config."""

    copied: tuple[str, ...]
    rewritten: dict[str, bytes]  # files that speak of layers, with their new content
    dropped: tuple[str, ...]
    changes: dict[str, Change]  # fields of the generation config that differ
    notes: tuple[str, ...]  # what is left behind though it belongs to the model, and why


def plan_extras(folder: Path, weights: set[str], renumber: Callable[[Any], Any], sources: Sources) -> Extras:
    """Sort the folder's files; ``weights`` are the weight files, ``renumber`` rewrites layer paths in JSON content.

    Raises ``CheckpointError`` for a file to carry that is a link or no regular file, or cannot be read.
    """
    names = [name for name, _ in listed(folder)]
    found = companions(folder, names, weights)
    rewritten, changes = dict[str, bytes](), dict[str, Change]()
    for name in found.carried:
        if fnmatch.fnmatchcase(name, QUANTISATION_FILES):
            rewritten[name] = _as_file(renumber(read_json(contained(folder, name))))
    if GENERATION in found.carried:
        old = read_json(contained(folder, GENERATION))
        new = prune_generation(old, sources)
        changes = {f"{GENERATION}: {field}": change for field, change in config_changes(old, new).items()}
        rewritten |= {GENERATION: _as_file(new)} if changes else {}
    copied = tuple(name for name in found.carried if name not in rewritten)
    return Extras(copied, rewritten, found.left, changes, found.notes)


def _as_file(content: Any) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


def layer_renumberer(stack: str, sources: Sources) -> Callable[[Any], Any]:
    """Return a function that renumbers layer paths in JSON content, keys and values, and drops those of removed layers.

    Understood are paths such as ``model.layers.3.mlp`` and the same as a pattern (``re:model\\.layers\\.3\\..*``). A
    pattern over layer numbers (``layers.[0-3]``) raises ``RefusedError`` naming it.
    """
    last = re.escape(stack.rpartition(".")[2])
    one = re.compile(rf"(?P<head>(?:^|.*?[.:^(*])?{last}\\?\.)(?P<layer>\d+)(?P<tail>(?:\\?\.|$|\$).*)", re.DOTALL)
    many = re.compile(rf"(?:^|[.:^(*]){last}\\?\.(?:[\[(]|\\d|\d+[-|\[\\(?*+](?!\.))")

    def text(value: str) -> str | None:
        if many.search(value):
            if _any_number(value):
                return value
            raise RefusedError(f"the quantisation config names layers by the pattern {value!r}; list them one by one")
        match = one.fullmatch(value)
        if match is None:
            return value
        layer = int(match["layer"])
        return f"{match['head']}{sources.layers.index(layer)}{match['tail']}" if layer in sources.layers else None

    def renumber(value: Any) -> Any:
        if isinstance(value, str):
            return text(value)
        if isinstance(value, list):
            entries = [(entry, renumber(entry)) for entry in value]
            return [new for old, new in entries if new is not None or old is None]
        if isinstance(value, dict):
            pairs = [(text(key), renumber(entry)) for key, entry in value.items()]
            return {key: entry for key, entry in pairs if key is not None}
        return value

    return renumber


def _any_number(pattern: str) -> bool:
    """Whether a pattern's layer number is "any", so that it holds for the pruned stack as it did for the base."""
    return bool(re.search(r"\\\.?(\\d|\[0-9\])[+*]", pattern) or re.search(r"\.(\\d|\[0-9\]|\()[+*d.]", pattern))
