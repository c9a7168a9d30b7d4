"""Finding the decoder stack in a model, without a table of architectures."""

from __future__ import annotations

import copy
import logging
import re
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layerprune.architecture.config_fields import DEPTH_KEYS, depth_key, full_lists
from layerprune.checkpoint.safetensors import Checkpoint, file_names, why_no_weights
from layerprune.errors import CheckpointError, ModelError, one_line
from layerprune.formatting import short
from layerprune.parsing import read_json

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig


# Points for a module list that may be the decoder stack; measured over all causal-LM types of transformers 5.23, where
# the highest sum is the stack of every type but xlm (which has none) and hrm_text (which has two).
CHECKPOINTED, RIGHT_DEPTH, NO_SPLIT, UNDER_DECODER, OTHER_MODALITY = 4, 3, 2, 1, -5
MODALITY = re.compile(r"vision|visual|image|audio|speech|patch|mtp")


def load_config(path: str, *, revision: str | None = None, trust_remote_code: bool = False) -> PretrainedConfig:
    """Read a model's config from a folder or Hub id; raises ``ModelError`` when transformers cannot."""
    from transformers import AutoConfig

    if Path(path).is_dir() and not (Path(path) / "config.json").exists():
        said = why_no_weights(names := file_names(Path(path)))
        weights = any(name.startswith("model") and name.endswith(".safetensors") for name in names)
        raise ModelError(f"{path} has no config.json" if weights else f"{path} {said}, and no config.json")
    if Path(path).is_dir():
        _check_sizes(Path(path))
    try:
        return AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=trust_remote_code)
    except Exception as error:  # config classes raise anything from KeyError to strict-dataclass errors
        if not trust_remote_code and "trust_remote_code" in str(error):
            raise ModelError(f"{path} brings its own model code, which runs only with --trust-remote-code") from error
        raise ModelError(f"the config of {path} cannot be read: {one_line(error)}{stale_depth(Path(path))}") from error


# What a config repeats a module for. Building takes time and memory with each, on the meta device too.
MOST_LAYERS = 2000
MOST = dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 10_000)
MOST["num_labels"] = 100_000
LARGEST = 2**63 - 1  # of any number
POSITIVE = (*DEPTH_KEYS, "hidden_size", "n_embd", "d_model", "vocab_size", "num_attention_heads", "n_head")


def _check_sizes(folder: Path) -> None:
    """Raise ``ModelError`` for a config that is no JSON object, or asks for what cannot be built: seen before it is."""
    try:
        content = read_json(folder / "config.json", finite=False)
    except (OSError, ValueError) as error:
        raise ModelError(f"the config of {folder} cannot be read: {one_line(error)}") from error
    if not isinstance(content, dict):
        raise ModelError(f"the config of {folder} is a {type(content).__name__}, not an object")
    named = content.get("architectures")
    if named is not None and not (isinstance(named, list) and all(isinstance(name, str) for name in named)):
        raise ModelError(f"the config of {folder} says architectures {short(named)}; a list of class names is expected")
    for fields in (content, *(value for value in content.values() if isinstance(value, dict))):
        for key, value in fields.items():
            most = MOST_LAYERS if key in DEPTH_KEYS else MOST.get(key, LARGEST)
            if isinstance(value, int) and value > most:
                raise ModelError(
                    f"the config of {folder} says {key} {short(value)}; at most {most:,} are read{_depth_of(folder)}"
                )
    for fields in (content, content.get("text_config")):
        for key in POSITIVE if isinstance(fields, dict) else ():
            value = fields.get(key)
            if isinstance(value, int) and value < 1:
                raise ModelError(f"the config of {folder} says {key} {short(value)}; at least 1 is needed")


def _depth_of(folder: Path) -> str:
    """Return how many layers the weights of a folder hold by their names, to end a message with; empty if unknown."""
    try:
        layers = _layers(Checkpoint.open(folder).tensors)
    except CheckpointError:
        return ""
    return f", and the weights hold {layers} layers" if layers else ""


def build_on_meta(config: PretrainedConfig, *, trust_remote_code: bool = False) -> nn.Module:
    """Build the causal LM without memory for its weights; raises ``ModelError`` when transformers cannot build it."""
    import torch
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except Exception as error:  # the modelling code of 190 types raises what it likes
        if outside := not_a_causal_type(config):
            raise ModelError(outside) from error
        raise ModelError(
            f"transformers cannot build a causal LM of type {config.model_type!r} from this config: {one_line(error)}"
        ) from error


# transformers' lists of model classes by task, and what a type is called that stands in one; first match wins.
KINDS = {
    "IMAGE_TEXT_TO_TEXT": "a vision-language model",
    "SPEECH_SEQ_2_SEQ": "a speech model",
    "CTC": "a speech model",
    "AUDIO_CLASSIFICATION": "an audio model",
    "TEXT_TO_WAVEFORM": "a text-to-speech model",
    "TEXT_TO_SPECTROGRAM": "a text-to-speech model",
    "MULTIMODAL_LM": "a multimodal model",
    "SEQ_TO_SEQ_CAUSAL_LM": "an encoder-decoder",
    "MASKED_LM": "an encoder",
    "TEXT_ENCODING": "a text encoder",
    "IMAGE_CLASSIFICATION": "a vision model",
    "ZERO_SHOT_IMAGE_CLASSIFICATION": "a vision model",
    "TIME_SERIES_PREDICTION": "a time-series model",
}


def not_a_causal_type(config: PretrainedConfig) -> str:
    """Return one line on a type that transformers has no causal LM of, and what would work; empty for other types."""
    from transformers.models.auto import modeling_auto

    kind, causal = config.model_type, modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    own = getattr(config, "auto_map", None) or {}
    if kind in causal or "AutoModelForCausalLM" in own:
        return ""
    if own:
        return (
            f"{kind!r} is a type with its own code, which has no AutoModelForCausalLM (its auto_map has "
            f"{', '.join(sorted(own))}): layers are removed from causal language models only"
        )
    found = next(
        (
            (words, entries[kind])
            for name, words in KINDS.items()
            if kind in (entries := getattr(modeling_auto, f"MODEL_FOR_{name}_MAPPING_NAMES", {}))
        ),
        ("an encoder-decoder" if config.is_encoder_decoder else "another kind of model", type(config).__name__),
    )
    text = getattr(getattr(config, "text_config", None), "model_type", None)
    advice = "docs/ZOO.md lists the types that can be pruned"
    if text in causal:
        advice = f"its language model alone (text_config: {text}), saved as a causal language model, can be pruned"
    return (
        f"{kind!r} is {found[0]} ({found[1]}), and layers are removed from causal language models only: transformers "
        f"has none of this type; {advice}"
    )


def find_stack(model: nn.Module, config: PretrainedConfig) -> str:
    """Return the path of the module list that holds the decoder layers, e.g. ``"model.layers"``.

    Every ``nn.ModuleList`` is scored by what its children are and where it stands; parameters break ties.
    Raises ``ModelError`` when no list scores above zero or the model has no list at all.
    """
    from torch.nn import ModuleList
    from transformers.modeling_layers import GradientCheckpointingLayer

    lists = {name: module for name, module in model.named_modules() if isinstance(module, ModuleList) and len(module)}
    if not lists:
        raise ModelError(f"no decoder stack in {type(model).__name__}: it has no list of layers")
    depth = getattr(config.get_text_config(decoder=True), "num_hidden_layers", None)
    no_split = {entry for part in model.modules() for entry in (getattr(part, "_no_split_modules", None) or ())}
    decoder: Any = model.get_decoder() if hasattr(model, "get_decoder") else None
    inside = next((name for name, module in model.named_modules() if module is decoder and name), "-")
    found = []
    for name, module in lists.items():
        points = CHECKPOINTED * all(isinstance(child, GradientCheckpointingLayer) for child in module)
        points += RIGHT_DEPTH * (len(module) == depth)
        points += NO_SPLIT * any(type(child).__name__ in no_split for child in module)
        points += UNDER_DECODER * name.startswith(inside)
        points += OTHER_MODALITY * bool(MODALITY.search(name))
        found.append((points, sum(parameter.numel() for parameter in module.parameters()), name))
    points, _, name = max(found)
    if points <= 0:
        raise ModelError(f"no decoder stack in {type(model).__name__}: {name!r} is the likeliest list, and unlikely")
    return name


def layer_index(name: str, stack: str) -> int | None:
    """Return the layer of a tensor of the stack, also where a base model's names begin further in."""
    parts = stack.split(".")
    for start in range(len(parts)):
        head = ".".join(parts[start:]) + "."
        if name.startswith(head):
            number = name[len(head) :].partition(".")[0]
            return int(number) if number.isdecimal() else None
    return None


def positions(model: nn.Module) -> int | None:
    """Return how many tokens a model, on any device, reads at most; None where its config does not say.

    Beyond it a learned table of positions ends in an ``IndexError``, and others are left in what they never saw.
    """
    found = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)  # type: ignore[union-attr, operator]
    if not isinstance(found, int) or found < 1:
        return None
    from torch import nn

    for table in model.modules():
        if not isinstance(table, nn.Embedding) or table is model.get_input_embeddings():  # type: ignore[operator]
            continue
        if table.num_embeddings == found and table.padding_idx is not None:  # counting starts behind the padding
            return found - table.padding_idx - 1
    return found


# What would work where a config class refuses a depth that its own lists of layers contradict.


LAYER = re.compile(r"(.*?)\.(\d+)\.")  # the first number of a tensor's name, and what stands before it
OTHER = re.compile(r"vision|visual|image|audio|speech|mtp")  # stacks that are not the decoder's


def stale_depth(folder: Path) -> str:
    """Return advice, by the number of layers that the weights hold, to end a message with; empty where it has none.

    Such a config cannot be read, so that its model is not there to hold the weights against: they go by their names.
    """
    if not (folder / "config.json").is_file():
        return ""
    try:
        content = read_json(folder / "config.json", finite=False)
        layers = _layers(Checkpoint.open(folder).tensors)
    except (OSError, ValueError, CheckpointError):
        return ""  # no JSON, or no whole weights: no number of layers to go by
    fields = content.get("text_config", content) if isinstance(content, dict) else None
    if not layers or not isinstance(fields, dict):
        return ""
    key, lists = depth_key(fields), {name: len(value) for name, value in full_lists(fields).items()}
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


# A config class asked again: what it makes of other fields than those it was read from.


def reread(kind: type[PretrainedConfig], fields: dict[str, Any]) -> dict[str, Any] | None:
    """Return all fields of a config of class ``kind`` made from ``fields``; None where the class refuses them."""
    with quiet():
        try:
            return kind.from_dict(_with_infinities(copy.deepcopy(fields))).to_dict()
        except Exception:  # noqa: BLE001  config classes raise what they like, and a refusal is the answer
            return None


def _with_infinities(value: Any) -> Any:
    """Return JSON content with the floats that JSON has not, as transformers reads them from a file."""
    if isinstance(value, dict):
        if value.keys() == {"__float__"}:  # what PretrainedConfig.to_json_string writes for them
            return float(value["__float__"])
        return {key: _with_infinities(entry) for key, entry in value.items()}
    return [_with_infinities(entry) for entry in value] if isinstance(value, list) else value


@contextmanager
def quiet(library: str = "transformers", level: int = logging.ERROR) -> Iterator[None]:
    """Without a library's remarks below ``level``; those of transformers were made when the config was loaded."""
    logger = logging.getLogger(library)
    before = logger.level
    logger.setLevel(level)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        logger.setLevel(before)
