"""The files of a model beside weights, config and card: an allow-list by purpose. What has no purpose is left behind.

A model folder often holds what is nobody else's business or no longer true of the result: tokens, notes, training
state, exports to other formats, another vendor's config of the same model. Export, healing and push use this list.
"""

from __future__ import annotations

import ast
import fnmatch
import json
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from layerprune.checkpoint.safetensors import read_json
from layerprune.errors import CheckpointError
from layerprune.files import checked_name, contained, same_file, shown

TEMPLATES = "additional_chat_templates"
# By purpose, each name as transformers 5.23 reads or writes it. Tokenizers: every name in a class's vocab_files_names
# (tests/test_companions.py collects them), and what custom tokenizers commonly use.
PURPOSES: Mapping[str, tuple[str, ...]] = {
    "generation config": ("generation_config.json",),
    "quantisation config": ("*quant*config*.json",),
    "tokenizer": (
        "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
        "tokenizer.model.v*", "*.model", "*.spm", "*.tiktoken", "tekken.json", "bpe.codes", "prophetnet.tokenizer",
        "vocab*.json", "vocab*.txt", "vocab.bpe", "*_vocab.json", "merges*.txt", "encoder.json", "normalizer.json",
        "dict.txt", "emoji.json", "byte_maps.json", "word_shape.json", "word_pronunciation.json",
    ),
    "chat template": ("*.jinja", "chat_template.json", f"{TEMPLATES}/*.jinja"),
    "processor": ("*processor_config.json",),
}  # fmt: skip
PATTERNS = tuple(pattern for patterns in PURPOSES.values() for pattern in patterns)
# Licences, notices, use policies: a word of the name, in any case (MODEL_LICENSE, License.md, LICENSE-CODE, Notice).
LICENCE = re.compile(
    r"licen[cs]e|third[-_ ]?party[-_ ]?notices?"
    r"|(?<![a-z])(?:copying|copyright|notices?|legal|patents?|terms|use[-_ ]policy|acceptable[-_ ]use|eula)(?![a-z])"
)
NO_LICENCE = re.compile(r"(?<![a-z])(?:keys?|tokens?|secrets?|server)(?![a-z])")  # license_key.txt
TEXT_ENDINGS = (".md", ".txt", ".rst", ".html", ".pdf")
LICENCE_ENDING = re.compile(  # LICENSE.MIT, COPYING.LESSER, LICENSE-2.0, LICENSE.model
    r"(?:mit|bsd|isc|apache|[al]?gpl|lesser|mpl|cc|eupl|openrail|rail|model|code|weights|data|\d)[\w.+-]*|[^.]*licen[cs]e[^.]*"
)
NOT_COMPANIONS = ("config.json", "README.md", "model.safetensors", "model.safetensors.index.json")

NAMED = 20  # files named in one line

MODULES = "modules.json"  # sentence-transformers: the modules of a pipeline, each in a folder of its own
# Modules that work on the model's output whatever its depth, by the class they name, and the weights they need.
MODULE_FILES = {
    "Pooling": (), "Normalize": (), "Dropout": (), "Dense": ("model.safetensors",), "LayerNorm": ("model.safetensors",),
}  # fmt: skip
TRANSFORMER = "Transformer"
PIPELINE_FILES = (MODULES, "config_sentence_transformers.json", "sentence_*_config.json")
AUTO_MAP = ("auto_map", "custom_pipelines")  # where a JSON file names the model's own code: "modeling_own.OwnModel"
READS_CODE = ("config.json", "tokenizer_config.json", "*processor_config.json")


@dataclass(frozen=True)
class Companions:
    """What is carried along beside weights and config, and what is not."""

    carried: tuple[str, ...]
    left: tuple[str, ...]
    notes: tuple[str, ...]  # what is left though it belongs to the model, and why


def companions(folder: Path, names: Collection[str], weights: Collection[str]) -> Companions:
    """Sort the files ``names`` of a model folder; ``weights`` are its weight files.

    Raises ``CheckpointError`` for a file to carry that is a link or no regular file, a JSON or Python file that cannot
    be read where it says what else belongs to the model, a name that no document may hold, and for two names to carry
    that differ in case alone.
    """
    for name in names:
        try:
            checked_name(name)
        except ValueError as error:
            raise CheckpointError(f"{folder} holds {name!r}, {error}; rename or remove it") from None
    pipeline, notes = _pipeline(folder, names)
    own = {*pipeline, *own_code(folder, names)}
    names = [name for name in names if name not in weights and name not in NOT_COMPANIONS]
    carried = sorted(name for name in names if name in own or is_companion(name))
    for name in carried:
        contained(folder, name)
    if alike := same_file(carried):
        said = "which are one file on systems where case does not count"
        raise CheckpointError(f"{folder} holds {alike[0]} and {alike[1]}, {said}; remove or rename one of them")
    return Companions(tuple(carried), tuple(sorted({*names} - {*carried})), notes)


def is_companion(name: str) -> bool:
    """Whether a file's name alone tells that it belongs to a model, and what for."""
    if name.startswith(".") or ("/" in name and not fnmatch.fnmatchcase(name, f"{TEMPLATES}/*.jinja")):
        return False
    return is_licence(name) or _matches(name, PATTERNS)


def is_licence(name: str) -> bool:
    """Whether a file in the folder itself is a licence, a notice or a use policy, by its name in any case."""
    low = name.lower()
    if "/" in low or low.startswith(".") or not LICENCE.search(low) or NO_LICENCE.search(low):
        return False
    _, dot, ending = low.rpartition(".")
    return not dot or low.endswith(TEXT_ENDINGS) or bool(LICENCE_ENDING.fullmatch(ending))


def own_code(folder: Path, names: Collection[str]) -> set[str]:
    """Return the Python files of the model's own code: those its JSON files name, and what these import from beside."""
    there = {name for name in names if name.endswith(".py")}
    readers = [name for name in names if "/" not in name and _matches(name, READS_CODE)] if there else []
    waiting = [f"{module}.py" for name in readers for module in _named_modules(read_json(contained(folder, name)))]
    found: set[str] = set()
    while waiting:
        name = waiting.pop()
        if name in there and name not in found:
            found.add(name)
            waiting += _beside(contained(folder, name), name)
    return found


def left_out(names: Collection[str]) -> str:
    """Return the line that says which files were not carried along."""
    first = [shown(name) for name in sorted(names)[:NAMED]]
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return f"left out, not known as part of a model: {', '.join(first)}{more}"


def pipeline_files(content: Any) -> tuple[list[str], str]:
    """Return the files that a ``modules.json`` needs in the folders of its modules, and why it cannot be carried.

    An empty reason: all modules are known not to depend on the model's depth.
    """
    files: list[str] = []
    if not isinstance(content, list) or not all(isinstance(entry, dict) for entry in content):
        return [], "it is not a list of modules"
    for entry in content:
        kind, place = str(entry.get("type")), str(entry.get("path", ""))
        package, _, name = kind.rpartition(".")
        if package.partition(".")[0] == "sentence_transformers" and name == TRANSFORMER and not place:
            continue
        if package.partition(".")[0] != "sentence_transformers" or name not in MODULE_FILES:
            return [], f"its module {kind} in {place or 'the folder itself'!r} is not known to fit a shallower model"
        try:
            checked_name(place)
        except ValueError as error:
            return [], f"its module {kind} is in {place!r}, {error}"
        files += [f"{place}/{file}" for file in ("config.json", *MODULE_FILES[name]) if name != "Normalize"]
    return files, ""


def _pipeline(folder: Path, names: Collection[str]) -> tuple[set[str], tuple[str, ...]]:
    """Return the files of a sentence-transformers pipeline, all or none; the note says why none."""
    if MODULES not in names:
        return set(), ()
    files, why = pipeline_files(read_json(contained(folder, MODULES)))
    missing = [file for file in files if file not in names]
    if not why and missing:
        why = f"{missing[0]} is not there"
    settings = [name for name in names if "/" not in name and _matches(name, PIPELINE_FILES[1:])]
    deep = [name for name in settings if not why and "layer" in json.dumps(read_json(contained(folder, name))).lower()]
    if deep:
        why = f"{deep[0]} speaks of layers"
    if why:
        said = "the result is no sentence-transformers model, only the language model in it"
        return set(), (f"{MODULES} and its modules are left out, {why}: {said}",)
    return {MODULES, *settings, *files}, ()


def _matches(name: str, patterns: Collection[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _named_modules(content: Any, inside: bool = False) -> Iterator[str]:
    """Yield the modules that ``auto_map``s at any depth name, but none in another repo (``org/name--module``).

    ``inside``: the content is part of an ``auto_map``.
    """
    if isinstance(content, dict):
        for key, value in content.items():
            yield from _named_modules(value, inside or key in AUTO_MAP)
    elif inside and isinstance(content, list):
        for value in content:
            yield from _named_modules(value, inside)
    elif inside and isinstance(content, str) and "--" not in content and "." in content:
        yield content.rpartition(".")[0]


def _beside(path: Path, name: str) -> Iterator[str]:
    """Yield the files that a module may import relatively, as transformers collects them."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8-sig"))
    except (OSError, SyntaxError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as the model's own code: {error}") from error
    place = name.rpartition("/")[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            modules = [node.module] if node.module else [alias.name for alias in node.names]
            for module in modules:
                inside = module.replace(".", "/")
                yield from (f"{place}/{inside}{end}".lstrip("/") for end in (".py", "/__init__.py"))
