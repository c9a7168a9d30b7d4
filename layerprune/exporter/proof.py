"""What an export checks with torch: the pruned config before anything is written, the logits of what was written.

The process that copies weights does not import this module: ``draw`` and ``compare_apart`` run in others (``apart``).
"""

from __future__ import annotations

import gc
import json
import math
from collections.abc import Set
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from layerprune.architecture import (
    Architecture,
    build_on_meta,
    check_weights,
    find_stack,
    load_config,
    read_architecture,
)
from layerprune.architecture.layer_patterns import NO_PATTERN
from layerprune.architecture.tiny import VOCABULARY, random_model, twin_config
from layerprune.artifacts import LogitsProof
from layerprune.checkpoint import contained
from layerprune.errors import CheckpointError, ExportError, ModelError, RefusedError, one_line
from layerprune.exporter.contents import read_json
from layerprune.models.bypass import bypassed
from layerprune.removal import LayerMap, Removal, layer_of, packed_axis

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PretrainedConfig

    from layerprune.models.model import LoadedModel


# What the pruned model will be: its config, built on the meta device and compared with the base, without a weight.


def draw(folder: str, layers: list[int], trust_remote_code: bool, shapes: str, name: str) -> dict[str, Any]:
    """Read, change and check; arguments and result as JSON has them, so that it can run in another process."""
    removal = Removal.from_layers(layers)
    if (tokenizer := Path(folder) / "tokenizer.json").exists():
        read_tokenizer(tokenizer)  # a damaged one is told of before anything is copied
    old = read_json(contained(Path(folder), "config.json"))
    config = load_config(folder, trust_remote_code=trust_remote_code)
    architecture = read_architecture(config, trust_remote_code=trust_remote_code)
    laid = {key: tuple(shape) for key, shape in read_json(Path(shapes)).items()}
    if laid:
        check_weights(name, laid, config, architecture, trust_remote_code=trust_remote_code)
    new = architecture.prune_config(old, removal)
    result = rebuilt(config, new)
    model = build_on_meta(config, trust_remote_code=trust_remote_code)
    pruned = build_on_meta(result, trust_remote_code=trust_remote_code)
    if find_stack(pruned, result) != architecture.stack:
        raise RefusedError(f"the pruned config builds another stack than {architecture.stack!r}")
    sources = LayerMap.after(removal, architecture.depth)
    check_signature(model, pruned, architecture.stack, sources, POSITION | _changed_patterns(config, result))
    return {
        "model_type": architecture.model_type, "depth": architecture.depth, "stack": architecture.stack,
        "sizes": layer_sizes(model, architecture.stack),
        "parameters": [architecture.parameters(), architecture.parameters(removal)], "config": new,
        "weights": list(model.state_dict()),
    }  # fmt: skip


def rebuilt(config: PretrainedConfig, content: dict[str, Any]) -> PretrainedConfig:
    """Return a config of the same class from new content of config.json; ``RefusedError`` when it is not accepted."""
    try:
        with TemporaryDirectory() as folder:  # read as a file, as everyone will: JSON has no infinity, config.json does
            (Path(folder) / "config.json").write_text(json.dumps(content), encoding="utf-8")
            return type(config).from_pretrained(folder)
    except Exception as error:  # strict config classes raise their own errors
        name = type(config).__name__
        raise RefusedError(f"the pruned config is not one that {name} accepts: {one_line(error)}") from error


def layer_sizes(model: nn.Module, stack: str) -> list[int]:
    """Return the elements of each decoder layer as it is in memory."""
    return [sum(value.numel() for value in layer.state_dict().values()) for layer in _layers(model, stack)]


def _layers(model: nn.Module, stack: str) -> list[nn.Module]:
    return list(model.get_submodule(stack).children())


# Where a layer stands and among how many; it must differ. Everything else a layer has must not.
POSITION = {"layer_idx", "layer_id", "layer_index", "layer_number", "block_idx", "num_hidden_layers"}
PLAIN = (bool, int, float, str, type(None))


def check_signature(before: nn.Module, after: nn.Module, stack: str, sources: LayerMap, ignored: Set[str]) -> None:
    """Raise ``RefusedError`` unless each layer of the result is built like the base layer it comes from.

    Compared are class names, parameter shapes and plain attributes, but those ``ignored``, of every module in a layer,
    and the shapes of all parameters outside the stack.
    """
    old, new = _layers(before, stack), _layers(after, stack)
    if len(new) != len(sources):
        raise RefusedError(f"the pruned config builds {len(new)} layers where {len(sources)} are left")
    for index, layer in enumerate(sources.layers):
        where = f"layer {layer} as the new layer {index}"
        _compare(_signature(old[layer], ignored), _signature(new[index], ignored), where)
    outside = _outside(before, stack, sources.depth, len(sources))
    _compare(outside, _outside(after, stack, 1, 1), "what stands outside the stack")


def _changed_patterns(base: PretrainedConfig, result: PretrainedConfig) -> set[str]:
    """Return the fields by which a config names a pattern, and that a removal has changed; layers may keep a copy."""
    before, after = (vars(config.get_text_config(decoder=True)) for config in (base, result))
    changed = {key for key in before if isinstance(before[key], int | str) and before[key] != after.get(key)}
    return changed - NO_PATTERN


def _signature(layer: nn.Module, ignored: Set[str]) -> dict[str, Any]:
    """Return what a layer is made of: class, parameter shapes and plain attributes of every module in it."""
    found: dict[str, Any] = {}
    for path, module in layer.named_modules():
        found[f"{path}:class"] = type(module).__name__
        for name, value in vars(module).items():
            if isinstance(value, PLAIN) and name not in ignored and not name.startswith("_"):
                found[f"{path}:{name}"] = value
    for name, parameter in layer.state_dict().items():
        found[f"{name}:shape"] = tuple(parameter.shape)
    return found


def _outside(model: nn.Module, stack: str, layers: int, left: int) -> dict[str, Any]:
    """Return the shapes outside the stack; those packed with a slice per layer as they are with ``left`` layers."""
    found: dict[str, Any] = {}
    for name, value in model.state_dict().items():
        if not name.startswith(f"{stack}."):
            shape = list(value.shape)
            axis = packed_axis(name)
            if axis is not None:
                shape[axis] = shape[axis] // layers * left
            found[f"{name}:shape"] = tuple(shape)
    return found


def _compare(before: dict[str, Any], after: dict[str, Any], where: str) -> None:
    for key in sorted(before.keys() | after.keys()):
        old, new = before.get(key, "nothing"), after.get(key, "nothing")
        both_floats = isinstance(old, float) and isinstance(new, float)
        if not (math.isclose(old, new, rel_tol=1e-9) if both_floats else old == new):
            path, _, what = key.partition(":")
            raise RefusedError(
                f"{where} would change: {what} of {path or 'the layer'} is {old!r} in the base and {new!r} in the "
                "result; the config cannot say otherwise"
            )


# The logits proof: the base with the removed layers bypassed against the checkpoint that was written, reloaded.


WINDOWS, WINDOW_TOKENS = 4, 32
# Same kernels on the same numbers: the difference is 0, but where a config scale had to be rounded (minicpm3).
TOLERANCE = {"torch.float32": 1e-4, "torch.float64": 1e-6, "torch.bfloat16": 2e-2, "torch.float16": 5e-3}
TEXT = (
    "The tower is 324 metres tall, about the same height as an 81-storey building, and the tallest structure in the "
    "city. Its base is square, measuring 125 metres on each side. During its construction it became the tallest "
    "man-made structure in the world, a title it held for 41 years until another one was finished in 1930. It was the "
    "first structure to reach a height of 300 metres. Because of an aerial added at the top in 1957, it is now taller "
    "by 5.2 metres. Not counting transmitters, it is the second tallest free-standing structure in the country."
)


@dataclass(frozen=True)
class Loaded:
    """What transformers said about a checkpoint it loaded."""

    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    mismatched: tuple[str, ...] = ()


class CannotLoadError(ModelError):
    """transformers cannot load the checkpoint on this machine: a quantisation kernel is missing, memory ends."""


def load(folder: Path, *, trust_remote_code: bool, device: str | None = None) -> tuple[nn.Module, Loaded]:
    """Load a checkpoint in its own dtype; raises ``CannotLoadError`` when transformers cannot."""
    from transformers import AutoModelForCausalLM

    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            folder, dtype="auto", output_loading_info=True, use_safetensors=True, trust_remote_code=trust_remote_code,
            **({} if device is None else {"device_map": device}),
        )  # fmt: skip
    except Exception as error:  # the loaders of 190 types raise what they like
        raise CannotLoadError(f"transformers cannot load {folder}: {one_line(error)}") from error
    keys = (tuple(sorted(map(str, info[key]))) for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval(), Loaded(*keys)


def prove_whole(
    base: Path, result: Path, architecture: Architecture, removal: Removal, *, trust_remote_code: bool = False
) -> tuple[LogitsProof, Loaded]:
    """Compare base-with-bypass and result on a few windows of tokens; both are loaded whole, one after the other.

    The base may lack weights that the removal takes away. Raises ``ModelError`` when it lacks others, ``ExportError``
    when a logit differs by more than rounding, or a key of the result is missing, unexpected or of another shape.
    """
    model, base_info = load(base, trust_remote_code=trust_remote_code)
    places = {key: layer_of(key, architecture.stack) for key in base_info.missing}
    lacking = [key for key, place in places.items() if place is None or place[0] not in removal]
    if lacking or base_info.mismatched:
        fault = (*lacking, *base_info.mismatched)[0]
        raise ModelError(f"the base {base} is itself incomplete: transformers does not find {fault}")
    tokens = windows(base, int(model.get_input_embeddings().weight.shape[0]))
    expected = bypassed_logits(model, architecture.stack, removal, tokens)
    del model
    gc.collect()
    model, info = load(result, trust_remote_code=trust_remote_code)
    check_keys(info, base_info)
    return compare_logits(expected, logits(model, tokens), "whole models", tokens), info


def check_keys(info: Loaded, base: Loaded) -> None:
    """Raise ``ExportError`` for keys that the result misses, or has and the model does not know."""
    stray = tuple(key for key in info.unexpected if key not in base.unexpected)
    for what, keys in (("missing", info.missing), ("unexpected", stray), ("mismatched", info.mismatched)):
        if keys:
            raise ExportError(f"the written checkpoint does not load: {len(keys)} {what} keys, {keys[0]} for one")


def check_loads(base: Path, result: Path, *, trust_remote_code: bool = False) -> Loaded:
    """Load a checkpoint and the one it was made from, but for their weights, and raise as ``check_keys`` does."""
    info, before = (load(path, trust_remote_code=trust_remote_code, device="meta")[1] for path in (result, base))
    check_keys(info, before)
    return info


def compare_logits(expected: torch.Tensor, actual: torch.Tensor, method: str, tokens: torch.Tensor) -> LogitsProof:
    """Return the proof; raises ``ExportError`` with both figures when the logits differ by more than rounding."""
    dtype = str(expected.dtype)
    scale = expected.double().abs().max().item()
    difference = (expected.double() - actual.double()).abs().max().item()
    if not torch.isfinite(expected).all():
        raise ExportError("the base without the removed layers gives logits that are not finite; nothing to prove")
    if not difference <= TOLERANCE[dtype] * max(scale, 1.0):
        raise ExportError(
            f"the written checkpoint is not the base without those layers: a logit differs by {difference:.3g} "
            f"(largest logit {scale:.3g}); please report the model type"
        )
    return LogitsProof(
        method=method, windows=tokens.shape[0], tokens=tokens.numel(), dtype=dtype.removeprefix("torch."),
        max_difference=difference, scale=scale,
    )  # fmt: skip


def logits(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Return the logits of token windows, (windows, tokens, vocabulary), without a cache."""
    with torch.no_grad():
        return model(tokens.to(model.device), use_cache=False).logits.cpu()


def windows(folder: Path, vocabulary: int) -> torch.Tensor:
    """Return token windows, (WINDOWS, WINDOW_TOKENS): English text where there is a tokenizer.json, else drawn."""
    needed, ids, file = WINDOWS * WINDOW_TOKENS, list[int](), folder / "tokenizer.json"
    if file.exists():
        ids = [token for token in read_tokenizer(file).encode(TEXT).ids if token < vocabulary]
    if len(ids) < needed:
        draws = torch.randint(vocabulary, (needed - len(ids),), generator=torch.Generator().manual_seed(0))
        ids += draws.tolist()
    return torch.tensor(ids[:needed]).view(WINDOWS, WINDOW_TOKENS)


def read_tokenizer(file: Path) -> Tokenizer:
    """Return a tokenizer.json read; raises ``CheckpointError`` for a damaged one."""
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises nothing narrower
        raise CheckpointError(f"{file} is no tokenizer that can be read: {one_line(error)}") from error


def bypassed_logits(model: nn.Module, stack: str, removal: Removal, tokens: torch.Tensor) -> torch.Tensor:
    """Return the logits, (windows, tokens, vocabulary), of a base model with the removed layers bypassed."""
    with bypassed(model, _layers(model, stack), removal):
        return logits(model, tokens)


# The checks after writing: whole models where they fit and run, else tiny ones with the same layers.


MEMORY_FACTOR = 1.2  # of a model's bytes on disk: what loading and running it on short windows takes


def compare_apart(base: str, result: str, nbytes: int, layers: list[int], trust_remote_code: bool) -> dict[str, Any]:
    """Load and compare; arguments and result as JSON has them, so that it can run in another process.

    ``nbytes`` is what the base's weights take. Returned are the receipt's fields ``proof``, ``missing_keys``,
    ``unexpected_keys`` and ``notes``, which say what was not compared.
    """
    import psutil

    removal = Removal.from_layers(layers)
    config = load_config(base, trust_remote_code=trust_remote_code)
    architecture = read_architecture(config, trust_remote_code=trust_remote_code)
    quantised = "quantization_config" in read_json(Path(result) / "config.json")
    needed, free = nbytes * MEMORY_FACTOR, psutil.virtual_memory().available
    reason, notes = "", []
    if needed > free:
        reason = f"the model takes {needed / 1e9:.1f} GB of memory and {free / 1e9:.1f} GB are free"
    else:
        try:
            paths = Path(base), Path(result)
            proof, info = prove_whole(*paths, architecture, removal, trust_remote_code=trust_remote_code)
        except CannotLoadError as error:
            if not quantised:
                raise
            reason = f"this machine cannot run the quantised model: {error}"
    if reason:
        notes.append(f"whole models were not compared: {reason}")
        if quantised:
            info = Loaded()
            notes.append("keys were not checked by loading: only the names on disk were")
        else:
            info = check_loads(Path(base), Path(result), trust_remote_code=trust_remote_code)
        proof = prove_on_twin(config, architecture, removal, trust_remote_code=trust_remote_code)
    return {"proof": proof.model_dump(mode="json"), "missing_keys": info.missing, "unexpected_keys": info.unexpected,
            "notes": notes}  # fmt: skip


# The logits proof for a model that does not fit or run here: on a tiny random model with the same layers.


METHOD = "tiny random model with the same layers, and the weights as bytes"


def prove_on_twin(
    config: PretrainedConfig, architecture: Architecture, removal: Removal, *, trust_remote_code: bool = False
) -> LogitsProof:
    """Prune a tiny twin of the model in memory, by the same config change, and compare logits as for whole models.

    Raises ``RefusedError`` when no twin can be built, ``ExportError`` when the logits differ.
    """
    try:
        small = twin_config(config, architecture.path)
        base = random_model(small, trust_remote_code=trust_remote_code)
    except Exception as error:  # strict config classes and modelling code raise what they like
        said = f"no tiny {config.model_type} could be built to prove the export on"
        raise RefusedError(f"{said}: {one_line(error)}") from error
    twin = read_architecture(small, trust_remote_code=trust_remote_code)
    pruned_config = rebuilt(small, twin.prune_config(small.to_diff_dict(), removal))
    pruned = random_model(pruned_config, trust_remote_code=trust_remote_code)
    hand_over(base, pruned, architecture.stack, LayerMap.after(removal, architecture.depth))
    tokens = torch.randint(3, VOCABULARY, (4, 32), generator=torch.Generator().manual_seed(0))
    expected = bypassed_logits(base, twin.stack, removal, tokens)
    return compare_logits(expected, logits(pruned, tokens), METHOD, tokens)


def hand_over(base: nn.Module, pruned: nn.Module, stack: str, sources: LayerMap, *, share: bool = False) -> None:
    """Give a pruned model the base's weights of the layers it keeps, and everything outside the stack.

    ``share``: the very tensors and no copies. Raises ``ExportError`` when they do not fit.
    """
    weights: dict[str, torch.Tensor] = {}
    for name, value in base.state_dict().items():
        new, axis = sources.renamed(name, stack), packed_axis(name)
        if axis is not None:
            chunks = value.chunk(sources.depth, dim=axis)
            weights[name] = torch.cat([chunks[layer] for layer in sources.layers], dim=axis)
        elif new is not None:
            weights[new] = value
    try:
        pruned.load_state_dict(weights, strict=True, assign=share)
    except RuntimeError as error:
        said = "the pruned model does not take the weights of the kept layers"
        raise ExportError(f"{said}: {one_line(error)}") from error


# The pruned model in memory, built as a user would load it, on the base's own weights: for timing it before export.


def sharing_weights(
    loaded: LoadedModel, folder: Path, removal: Removal, *, trust_remote_code: bool = False
) -> LoadedModel:
    """Return the model that ``export`` would write, without a copy of any weight; ``folder`` is the base's.

    Raises ``RefusedError`` or ``ExportError`` where it cannot be built so.
    """
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    from layerprune.models.model import LoadedModel

    base, architecture = loaded.model, loaded.architecture
    config = rebuilt(base.config, architecture.prune_config(read_json(folder / "config.json"), removal))
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(
            config,
            dtype=loaded.dtype,
            attn_implementation=base.config._attn_implementation,
            trust_remote_code=trust_remote_code,
        )
    hand_over(base, model, architecture.stack, LayerMap.after(removal, architecture.depth), share=True)
    model.to(loaded.device).eval()  # buffers; the weights are there already
    return LoadedModel(
        model, loaded.tokenizer, read_architecture(config, trust_remote_code=trust_remote_code), loaded.ref
    )
