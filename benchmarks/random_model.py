"""A Llama of random weights in a given shape, with a made-up tokenizer: what the engine's speed can be measured on.

``build`` makes one on a device, without a disk. ``write`` makes a folder that ``LoadedModel.load`` reads: config.json,
a safetensors shard per layer and one of the rest, and a tokenizer whose words are w0, w1, ....
"""

from __future__ import annotations

import json
import math
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from layerprune.architecture import read_architecture
from layerprune.artifacts import ModelRef
from layerprune.errors import UsageError
from layerprune.formatting import in_words
from layerprune.models.model import LoadedModel

# Spread of the weights times the square root of the hidden size: Llama's 0.02 at 4,096. Narrower models need wider
# weights, or their layers would add nothing to the embeddings and a removal would change nothing.
SPREAD = 1.28
POSITIONS = 2048
HEADROOM = 1.02  # times the weights' bytes, on a disk or a device: headers, buffers


@dataclass(frozen=True)
class Shape:
    """The sizes of a Llama."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocabulary: int

    def config(self, dtype: str) -> LlamaConfig:
        return LlamaConfig(
            hidden_size=self.hidden, num_hidden_layers=self.layers, num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads, intermediate_size=self.intermediate, vocab_size=self.vocabulary,
            max_position_embeddings=POSITIONS, initializer_range=SPREAD / math.sqrt(self.hidden),
            tie_word_embeddings=False, bos_token_id=1, eos_token_id=2, dtype=getattr(torch, dtype),
            architectures=["LlamaForCausalLM"],
        )  # fmt: skip

    @property
    def layer_weights(self) -> int:
        """Weights of one layer's matrix products."""
        keys = self.hidden * self.kv_heads // self.heads
        return self.hidden * (2 * self.hidden + 2 * keys + 3 * self.intermediate)

    def bytes(self, dtype: str) -> int:
        """Bytes of all weights; the norms' are too few to count."""
        weights = self.layers * self.layer_weights + 2 * self.vocabulary * self.hidden
        return weights * getattr(torch, dtype).itemsize


SHAPES = {
    "tiny": Shape(64, 4, 4, 2, 128, 512),
    "small": Shape(384, 8, 6, 2, 1024, 8192),
    "8b": Shape(4096, 32, 32, 8, 14336, 128256),  # Llama 3.1 8B
    "70b": Shape(8192, 80, 64, 8, 28672, 128256),  # Llama 3.1 70B
}


def build(shape: Shape, dtype: str, device: torch.device) -> LoadedModel:
    """Return a model made on the device. Raises ``UsageError`` where its weights do not fit."""
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    _require(shape.bytes(dtype), free, f"the memory of {device}")
    config = shape.config(dtype)
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).eval()
    architecture = read_architecture(config)
    counted = architecture.parameters()
    ref = ModelRef(id="random", fingerprint="random", model_type="llama", layers=shape.layers, parameters=counted)
    return LoadedModel(model, tokenizer(shape.vocabulary), architecture, ref)


def write(shape: Shape, folder: Path, dtype: str, device: torch.device) -> None:
    """Write a model, drawn on the device one shard at a time; config.json comes last.

    Raises ``UsageError``, with nothing written, where the disk has no room or the folder is in use.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder} is in use; give a new or an empty folder")
    place = next(each for each in (folder, *folder.absolute().parents) if each.exists())
    _require(shape.bytes(dtype), shutil.disk_usage(place).free, f"the disk of {folder}")
    folder.mkdir(parents=True, exist_ok=True)
    config = shape.config(dtype)
    with torch.device("meta"):
        tensors = AutoModelForCausalLM.from_config(config).state_dict()
    shards: dict[str, list[str]] = {}
    for name in tensors:
        layer = re.search(r"layers\.(\d+)\.", name)
        shards.setdefault(layer.group(1) if layer else "rest", []).append(name)
    dice, files = torch.Generator(device).manual_seed(0), {}
    for number, names in enumerate(shards.values(), start=1):
        drawn = {name: torch.ones(tensors[name].shape, dtype=config.dtype, device=device) for name in names}
        for tensor in drawn.values():
            if tensor.ndim > 1:  # the norms' weights stay one
                tensor.normal_(0, config.initializer_range, generator=dice)
        files |= dict.fromkeys(names, f"model-{number:05d}-of-{len(shards):05d}.safetensors")
        save_file(drawn, folder / files[names[0]], metadata={"format": "pt"})
    index = {"metadata": {"total_size": shape.bytes(dtype)}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    tokenizer(shape.vocabulary).save_pretrained(folder)
    config.save_pretrained(folder)


def load(shape: Shape, folder: Path, dtype: str, device: torch.device, **options: Any) -> LoadedModel:
    """Return the model in a folder, written first where there is none; ``options`` go to ``LoadedModel.load``.

    Raises ``UsageError`` where the folder holds a model of another shape.
    """
    if not (folder / "config.json").exists():
        write(shape, folder, dtype, device)
    loaded = LoadedModel.load(str(folder), dtype=dtype, device=str(device), **options)
    wanted, found = shape.config(dtype).to_dict(), loaded.model.config.to_dict()
    for name in ("hidden_size", "num_hidden_layers", "num_key_value_heads", "intermediate_size", "vocab_size"):
        if found.get(name) != wanted[name]:
            raise UsageError(f"{folder} holds a model with {name} {found.get(name)}, and {wanted[name]} was asked for")
    return loaded


def tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """Return a tokenizer of made-up words, one per token."""
    words = Tokenizer(models.WordLevel({f"w{number}": number for number in range(vocabulary)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"unk_token": "w0", "bos_token": "w1", "eos_token": "w2", "pad_token": "w2"}
    return PreTrainedTokenizerFast(tokenizer_object=words, model_max_length=POSITIONS, **special)


def _require(weights: int, free: int, where: str) -> None:
    if weights * HEADROOM > free:
        raise UsageError(
            f"{where} has {in_words(free)} free and the weights take {in_words(weights)}; take a smaller shape "
            f"({', '.join(SHAPES)}) or bfloat16"
        )
