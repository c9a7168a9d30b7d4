"""A model under examination: weights, tokenizer and anatomy on a device, and the same model with layers bypassed."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from layerprune.architecture import Architecture, check_weights, find_stack, load_config, positions, read_architecture
from layerprune.architecture.architecture import require_causal
from layerprune.architecture.stack import build_on_meta
from layerprune.artifacts import ModelRef
from layerprune.checkpoint import Checkpoint, Folder, locate
from layerprune.checkpoint.location import reference
from layerprune.errors import ModelError, UsageError, one_line
from layerprune.models.bypass import bypassed
from layerprune.models.offload import LayerStream, load_streamed
from layerprune.models.placement import asked_attention, placed, wanted_dtype
from layerprune.removal import Removal

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


ROWS = 4  # of each tensor's beginning and end, to see that a model in memory is still the one on disk


@dataclass
class LoadedModel:
    """One loaded causal language model."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None  # None: the model has none, and nothing that reads text was asked
    architecture: Architecture
    ref: ModelRef
    attention: str | None = None  # its implementation, where one was asked for
    stream: LayerStream | None = None  # brings layers in as they run; None: all weights are in memory

    @classmethod
    def load(
        cls,
        model: str,
        *,
        revision: str | None = None,
        dtype: str = "auto",
        device: str = "auto",
        attn_implementation: str = "auto",
        offload: str = "auto",
        trust_remote_code: bool = False,
        reads_text: bool = True,
    ) -> LoadedModel:
        """Load a local folder or a Hub model for evaluation.

        ``dtype``: auto (the checkpoint's own, except that a CPU without fast bfloat16 gets float32), float32, bfloat16
        or float16. ``device``: auto (one card that holds the model, else as many as do, else the CPU) or a torch device
        name. ``attn_implementation``: auto (as transformers chooses) or a name it knows. ``offload``: where decoder
        layers stay while they do not run: none (on the device), cpu, disk, or auto (none where the model fits, else the
        first of the two that holds it). ``reads_text``: whether a tokenizer is needed. Raises ``ModelError`` when
        weights are missing or the type has no decoder stack, ``RefusedError`` for what is not causal.
        """
        from transformers import AutoModelForCausalLM

        attention = asked_attention(attn_implementation)
        folder = locate(model, revision)
        config = load_config(str(folder.path), trust_remote_code=trust_remote_code)
        checkpoint = Checkpoint.open(folder.path)
        architecture = read_architecture(config, trust_remote_code=trust_remote_code)
        check_weights(folder.id, checkpoint.shapes, config, architecture, trust_remote_code=trust_remote_code)
        try:
            tokenizer = load_tokenizer(folder.path, model, trust_remote_code=trust_remote_code)
        except ModelError:
            if reads_text:
                raise
            tokenizer = None
        wanted = wanted_dtype(dtype, config, device)
        # packed weights take what they take on disk
        weights = checkpoint.nbytes if _quantised(config) else architecture.parameters() * wanted.itemsize
        place, kept = placed(device, offload, weights)
        load = partial(
            AutoModelForCausalLM.from_pretrained,
            folder.path,
            dtype=wanted,
            **attention,
            output_loading_info=True,
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
        )
        try:
            if kept is None:
                stream, (loaded, info) = None, load(device_map=place)
            else:
                skeleton = build_on_meta(config, trust_remote_code=trust_remote_code)
                stream, loaded, info = load_streamed(load, skeleton, architecture.stack, torch.device(place), kept)
        except Exception as error:  # loaders and quantisers raise what they like, NameError for a missing package too
            raise ModelError(f"{model} cannot be loaded: {one_line(error)}{_quantised(config)}") from error
        if info["missing_keys"]:  # transformers fills these at random and says nothing
            first = sorted(info["missing_keys"])[0]
            raise ModelError(f"{model} lacks {len(info['missing_keys'])} of its weights, {first} for one")
        loaded.eval()
        require_causal(loaded, config)
        used = str(loaded.config._attn_implementation) if attention else None
        return cls(
            loaded, tokenizer, architecture, _reference(folder, checkpoint, config, architecture), used, stream
        )  # fmt: skip

    @classmethod
    def of(cls, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> LoadedModel:
        """Return a model that is loaded already, as it is; it is put into evaluation mode.

        Its files are read where it was loaded from, a folder or the Hub's cache: plans name the weights there. Raises
        ``UsageError`` for a model that comes from neither, or whose weights are no longer those of its files.
        """
        where = str(model.name_or_path)
        if not where:
            raise UsageError("this model comes from no folder and no Hub repo; use save_pretrained, give that folder")
        revision = None if Path(where).is_dir() else getattr(model.config, "_commit_hash", None)
        folder = locate(where, revision)
        trusted = runs_own_code(model)
        config = load_config(str(folder.path), trust_remote_code=trusted)
        checkpoint = Checkpoint.open(folder.path)
        architecture = read_architecture(config, trust_remote_code=trusted)
        _check_unchanged(model, checkpoint, where)
        model.eval()
        require_causal(model, config)
        return cls(model, tokenizer, architecture, _reference(folder, checkpoint, config, architecture))

    @cached_property
    def layers(self) -> list[nn.Module]:
        """The decoder layers, in order."""
        return list(self.model.get_submodule(find_stack(self.model, self.model.config)))  # type: ignore[arg-type]

    @property
    def device(self) -> torch.device:
        return self.model.device if self.stream is None else self.stream.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @property
    def marks(self) -> dict[str, str]:
        """What of the model a figure depends on, as text: weights, config, code and tokenizer, dtype, device.

        The config as it was loaded, without the name of its folder and the version that wrote it.
        """
        config = self.model.config.to_dict() | {"attention": self.model.config._attn_implementation}
        generating = getattr(self.model, "generation_config", None)
        read = {name: value for name, value in config.items() if name not in ("_name_or_path", "transformers_version")}
        settings = [read, generating.to_dict() if generating is not None else {}]
        text = json.dumps(settings, sort_keys=True, default=str)
        return {
            "model": self.ref.fingerprint,
            "config": hashlib.sha256(text.encode()).hexdigest(),
            "code": self._code,
            "tokenizer": self._tokenizer,
            "dtype": str(self.dtype),
            "device": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type,
        }

    @cached_property
    def _code(self) -> str:
        """A hash of the model's own code (trust_remote_code): every module beside its class; transformers' has none."""
        if not runs_own_code(self.model):
            return ""
        files = sorted(Path(inspect.getfile(type(self.model))).parent.glob("*.py"))
        return hashlib.sha256(b"\0".join(file.name.encode() + file.read_bytes() for file in files)).hexdigest()

    @cached_property
    def _tokenizer(self) -> str:
        """A hash of the tokenizer: whole where it is a fast one, else its words, without what a call has set."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        whole = dict(self.tokenizer.get_vocab() if backend is None else json.loads(backend.to_str()))
        if backend is not None:
            whole |= {"padding": None, "truncation": None}
        text = json.dumps([whole, self.tokenizer.special_tokens_map], sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()

    @cached_property
    def vocabulary(self) -> int:
        """Width of the logits."""
        return int(self.model.get_output_embeddings().weight.shape[0])

    @property
    def cache_bytes(self) -> int:
        """Bytes of one token's keys and values in all layers, as attention with this config's heads would keep them."""
        config = self.model.config.get_text_config()
        heads = int(getattr(config, "num_attention_heads", None) or 1)
        shared = int(getattr(config, "num_key_value_heads", None) or heads)
        width = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
        return 2 * shared * width * self.dtype.itemsize * len(self.layers)

    @cached_property
    def positions(self) -> int | None:
        """How many tokens the model reads at most; None where its config does not say."""
        return positions(self.model)

    @cached_property
    def encoder(self) -> Any:
        """lm-eval's own wrapper of this model: tokenises and generates as its published numbers were made."""
        from layerprune.models.generation import wrapped

        return wrapped(self.model, self.tokenizer)

    def held(self, index: int) -> AbstractContextManager[None]:
        """Keep the weights of a layer that has run in the block until the block ends, where layers come and go."""
        return nullcontext() if self.stream is None else self.stream.held(index)

    @torch.no_grad()
    def change(self, name: str, value: torch.Tensor) -> None:
        """Give a parameter, by its name in the model, other values; of any dtype, which becomes the parameter's own."""
        inside, _, own = name.removeprefix(f"{self.architecture.stack}.").partition(".")
        if self.stream is not None and inside.isdigit():
            self.stream.replace(int(inside), own, value)
        else:
            self.model.get_parameter(name).copy_(value)

    @contextmanager
    def layer(self, index: int) -> Iterator[nn.Module]:
        """A decoder layer with its weights in it while the context is open: elsewhere they may be on disk."""
        layer = self.layers[index]
        with nullcontext() if self.stream is None else self.stream.present(index, layer):
            yield layer

    @contextmanager
    def without(self, removal: Removal) -> Iterator[PreTrainedModel]:
        """The model with the removed layers bypassed, in place, while the context is open."""
        with bypassed(self.model, self.layers, removal):
            yield self.model


def load_tokenizer(folder: Path, name: str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load a model's tokenizer and try it; raises ``ModelError``, naming the model by ``name``, where it fails."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
        tokenizer("a b" * 10, verbose=False)
        if not isinstance(tokenizer.model_max_length, int | float):
            raise TypeError(f"model_max_length is {tokenizer.model_max_length!r}, not a number")
    except Exception as error:  # the readers of a hundred tokenizers raise what they like
        raise ModelError(f"{name} has no tokenizer that transformers can read: {one_line(error)}") from error
    return tokenizer  # type: ignore[no-any-return]


def _reference(folder: Folder, checkpoint: Checkpoint, config: Any, architecture: Architecture) -> ModelRef:
    depth, parameters = architecture.depth, architecture.parameters()
    return reference(folder, checkpoint, model_type=config.model_type, layers=depth, parameters=parameters)


def runs_own_code(model: PreTrainedModel) -> bool:
    """Whether a loaded model's class came with the model (trust_remote_code) and not with transformers."""
    return type(model).__module__.startswith("transformers_modules.")


def _check_unchanged(model: PreTrainedModel, checkpoint: Checkpoint, where: str) -> None:
    """Raise ``UsageError`` where rows of a tensor in memory are not those on disk, as the model's dtype has them."""
    from safetensors import safe_open

    held, compared = model.state_dict(), 0
    for path in {tensor.file for tensor in checkpoint.tensors.values()}:
        with safe_open(path, framework="pt") as file:
            for name in {*file.keys()} & held.keys():
                own, stored = held[name], file.get_slice(name)
                if list(own.shape) != stored.get_shape() or not own.is_floating_point() or own.ndim == 0:
                    continue  # quantised, or put together anew
                for rows in (slice(0, ROWS), slice(max(0, own.shape[0] - ROWS), None)):
                    there = stored[rows].to(own.dtype)
                    if not torch.equal(own[rows].detach().cpu(), there):
                        raise UsageError(
                            f"the model in memory is not the one in {where}: {name} differs; save it with "
                            "save_pretrained and give that folder"
                        )
                compared += 1
    if not compared:
        raise UsageError(f"no weight of the model in memory stands as it is in {where}; give the folder itself")


def _quantised(config: Any) -> str:
    """Return what to add to why a model cannot be loaded, where its weights are quantised."""
    settings = getattr(config, "quantization_config", None)
    if settings is None:
        return ""
    method = settings.get("quant_method") if isinstance(settings, dict) else settings.quant_method
    return f"; its weights are quantised ({method}), which may take a package or a device that is not here"
