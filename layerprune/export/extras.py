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
from layerprune.anatomy.halves import half_of_child
from layerprune.checkpoint import contained
from layerprune.checkpoint.kinds import PICKLES
from layerprune.errors import CheckpointError, RefusedError

# Tokenizer, chat template, processors, generation config, custom code, licences.
CARRIED = (
    "tokenizer*", "vocab*", "merges*", "*.model", "*.tiktoken", "*.jinja", "*.json", "*.txt", "*.py",
    "LICENSE*", "LICENCE*", "NOTICE*", "COPYING*", "USE_POLICY*",
)  # fmt: skip
# About the base and not about the result: weights, their indices, training state, what layerprune wrote about the base.
LEFT = (
    "config.json", "README.md", "*.safetensors", "*.index.json", "trainer_state.json", "training_args*", "optimizer*",
    "scheduler*", "rng_state*", "all_results.json", "eval_results.json", "train_results.json", ".*", "layerprune/*",
    "*.gguf", "*.onnx*", *PICKLES,
)  # fmt: skip
FOLDERS = ("additional_chat_templates",)
CHILD = re.compile(r"\\?\.(?P<name>\w+)(?=$|\$|\\?\.)")  # the first name behind a layer's number, written out
QUANTISATION_FILES = "*quant*config*.json"


@dataclass(frozen=True)
class Extras:
    """What happens to each file beside weights and config."""

    copied: tuple[str, ...]
    rewritten: dict[str, bytes]  # files that name layers, with their new content
    dropped: tuple[str, ...]


def plan_extras(folder: Path, weights: set[str], renumber: Callable[[Any], Any]) -> Extras:
    """Sort the folder's files; ``weights`` are the weight files, ``renumber`` rewrites layer paths in JSON content.

    Raises ``CheckpointError`` for a file that is a link out of the folder.
    """
    copied: list[str] = []
    rewritten: dict[str, bytes] = {}
    dropped: list[str] = []
    for name in _files(folder):
        if name in weights or name in {"config.json", "README.md", "model.safetensors.index.json"}:
            continue
        if not _is_carried(name):
            dropped.append(name)
        elif fnmatch.fnmatch(name, QUANTISATION_FILES):
            rewritten[name] = _rewritten(contained(folder, name), renumber)
        else:
            contained(folder, name)
            copied.append(name)
    return Extras(tuple(copied), rewritten, tuple(dropped))


def _files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder).as_posix()) for path in folder.rglob("*") if not path.is_dir())


def _is_carried(name: str) -> bool:
    place, _, base = name.rpartition("/")
    if place and place not in FOLDERS:
        return False
    return _matches(base, CARRIED) and not _matches(base, LEFT)


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _rewritten(path: Path, renumber: Callable[[Any], Any]) -> bytes:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error
    return (json.dumps(renumber(content), indent=2, ensure_ascii=False) + "\n").encode()


def layer_renumberer(stack: str, sources: Sources) -> Callable[[Any], Any]:
    """Return a function that renumbers layer paths in JSON content, keys and values, and drops those of removed layers.

    Understood are paths such as ``model.layers.3.mlp`` and the same as a pattern (``re:model\\.layers\\.3\\..*``). A
    pattern over layer numbers (``layers.[0-3]``) raises ``RefusedError`` naming it, and so does a path that may mean
    both halves of a layer where they have not come to stand in one layer.
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
        new = _new_layer(value, int(match["layer"]), match["tail"], sources)
        return None if new is None else f"{match['head']}{new}{match['tail']}"

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


def _new_layer(path: str, layer: int, tail: str, sources: Sources) -> int | None:
    """Return where a path's layer has gone, None when it is gone; with half-layers that is where its half has gone."""
    child = CHILD.match(tail)
    half = half_of_child(child["name"]) if child else None
    halves = ("attention", "mlp") if half is None else (half,)
    found = {origin.index(layer) if layer in origin else None for origin in map(sources.of, halves)}
    if len(found) > 1:
        raise RefusedError(
            f"the quantisation config names {path!r}, and the halves of layer {layer} part; remove whole layers, or "
            "name its attention and its MLP there one by one"
        )
    return found.pop()


def _any_number(pattern: str) -> bool:
    """Whether a pattern's layer number is "any", so that it holds for the pruned stack as it did for the base."""
    return bool(re.search(r"\\\.?(\\d|\[0-9\])[+*]", pattern) or re.search(r"\.(\\d|\[0-9\]|\()[+*d.]", pattern))
