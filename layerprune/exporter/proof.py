"""The logits proof: the base with the removed layers bypassed against the checkpoint that was written, reloaded."""

from __future__ import annotations

import dataclasses
import gc
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from layerprune.architecture import Architecture, LayerMap, load_config, read_architecture
from layerprune.architecture.config_fields import PACKED
from layerprune.architecture.tiny import VOCABULARY, random_model, twin_config
from layerprune.artifacts import LogitsProof
from layerprune.checkpoint import Checkpoint
from layerprune.checkpoint.safetensors import INDEX
from layerprune.errors import ExportError, ModelError, RefusedError, one_line
from layerprune.exporter.contents import read_json, rebuilt
from layerprune.removal import Removal
from layerprune.util import apart

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PretrainedConfig

    from layerprune.models.model import LoadedModel


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
    lacking = [key for key in base_info.missing if not _removed(key, architecture, removal)]
    if lacking or base_info.mismatched:
        fault = (*lacking, *base_info.mismatched)[0]
        raise ModelError(f"the base {base} is itself incomplete: transformers does not find {fault}")
    tokens = windows(base, _vocabulary(model))
    with bypasser(architecture, removal)(model):
        expected = logits(model, tokens)
    del model
    gc.collect()
    model, info = load(result, trust_remote_code=trust_remote_code)
    check_keys(info, base_info)
    return compare_logits(expected, logits(model, tokens), "whole models", tokens), info


def _removed(key: str, architecture: Architecture, removal: Removal) -> bool:
    """Return whether a weight, named as in memory, belongs to a layer that is removed."""
    inside = key.startswith(f"{architecture.stack}.")
    return inside and int(key[len(architecture.stack) + 1 :].partition(".")[0]) in removal


def check_keys(info: Loaded, base: Loaded) -> None:
    """Raise ``ExportError`` for keys that the result misses, or has and the model does not know."""
    stray = tuple(key for key in info.unexpected if key not in base.unexpected)
    for what, keys in (("missing", info.missing), ("unexpected", stray), ("mismatched", info.mismatched)):
        if keys:
            raise ExportError(f"the written checkpoint does not load: {len(keys)} {what} keys, {keys[0]} for one")


def compare_logits(expected: torch.Tensor, actual: torch.Tensor, method: str, tokens: torch.Tensor) -> LogitsProof:
    """Return the proof; raises ``ExportError`` with both figures when the logits differ by more than rounding."""
    import torch

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
    import torch

    with torch.no_grad():
        return model(tokens.to(model.device), use_cache=False).logits.cpu()


def windows(folder: Path, vocabulary: int) -> torch.Tensor:
    """Return token windows, (WINDOWS, WINDOW_TOKENS): English text where there is a tokenizer.json, else drawn."""
    import torch

    needed = WINDOWS * WINDOW_TOKENS
    ids = _text_ids(folder, vocabulary)
    if len(ids) < needed:
        draws = torch.randint(vocabulary, (needed - len(ids),), generator=torch.Generator().manual_seed(0))
        ids = [*ids, *draws.tolist()]
    return torch.tensor(ids[:needed]).view(WINDOWS, WINDOW_TOKENS)


def _text_ids(folder: Path, vocabulary: int) -> list[int]:
    file = folder / "tokenizer.json"
    if not file.exists():
        return []
    from tokenizers import Tokenizer

    return [token for token in Tokenizer.from_file(str(file)).encode(TEXT).ids if token < vocabulary]


def _vocabulary(model: nn.Module) -> int:
    return int(model.get_input_embeddings().weight.shape[0])


def bypasser(architecture: Architecture, removal: Removal) -> Callable[[nn.Module], Any]:
    """Return a function from a loaded base model to the context in which the removed layers are bypassed."""
    from layerprune.models.bypass import bypassed

    return lambda model: bypassed(model, list(model.get_submodule(architecture.stack).children()), removal)


# The checks after writing: whole models where they fit and run, else tiny ones with the same layers.


MEMORY_FACTOR = 1.2  # of a model's bytes on disk: what loading and running it on short windows takes


@dataclass(frozen=True)
class ProofResult:
    """The outcome of the checks after writing."""

    logits: LogitsProof
    loaded: Loaded
    notes: tuple[str, ...]


def prove(base: Checkpoint, result: Path, removal: Removal, *, trust_remote_code: bool = False) -> ProofResult:
    """Compare the written checkpoint with the base without the removed layers; the notes say what was not compared.

    Raises ``ExportError`` when they differ or a key does not fit.
    """
    with loadable(base) as folder:
        told = apart(
            compare_apart, base=str(folder), result=str(result), nbytes=base.nbytes, layers=list(removal.layers),
            trust_remote_code=trust_remote_code,
        )  # fmt: skip
    keys = {name: tuple(value) for name, value in told["loaded"].items()}
    notes = [*told["notes"]]
    if base.absent:
        notes.append(
            f"{len(base.absent)} of the base's {len(base.files)} weight files hold only what is removed: they were "
            "sampled by byte ranges for the fingerprint, and not fetched"
        )
    return ProofResult(LogitsProof.model_validate(told["logits"]), Loaded(**keys), tuple(notes))


def compare_apart(base: str, result: str, nbytes: int, layers: list[int], trust_remote_code: bool) -> dict[str, Any]:
    """Load and compare; arguments and result as JSON has them, so that it can run in another process.

    ``nbytes`` is what the base's weights take.
    """
    found = _compared(Path(base), Path(result), nbytes, Removal.from_layers(layers), trust_remote_code)
    loaded = dataclasses.asdict(found.loaded)
    return {"logits": found.logits.model_dump(mode="json"), "loaded": loaded, "notes": list(found.notes)}


def _compared(base: Path, result: Path, nbytes: int, removal: Removal, trust_remote_code: bool) -> ProofResult:
    import psutil

    config = load_config(str(base), trust_remote_code=trust_remote_code)
    architecture = read_architecture(config, trust_remote_code=trust_remote_code)
    quantised = "quantization_config" in read_json(result / "config.json")
    needed, free = nbytes * MEMORY_FACTOR, psutil.virtual_memory().available
    if needed > free:
        reason = f"the model takes {needed / 1e9:.1f} GB of memory and {free / 1e9:.1f} GB are free"
    else:
        try:
            logits, loaded = prove_whole(base, result, architecture, removal, trust_remote_code=trust_remote_code)
        except CannotLoadError as error:
            if not quantised:
                raise
            reason = f"this machine cannot run the quantised model: {error}"
        else:
            return ProofResult(logits, loaded, ())
    notes = (f"whole models were not compared: {reason}",)
    if not quantised:
        _, loaded = load(result, trust_remote_code=trust_remote_code, device="meta")
        check_keys(loaded, load(base, trust_remote_code=trust_remote_code, device="meta")[1])
    else:
        loaded = Loaded()
        notes += ("keys were not checked by loading: only the names on disk were",)
    return ProofResult(prove_on_twin(config, architecture, removal, trust_remote_code=trust_remote_code), loaded, notes)


# The logits proof for a model that does not fit or run here: on a tiny random model with the same layers.


METHOD = "tiny random model with the same layers, and the weights as bytes"


def prove_on_twin(
    config: PretrainedConfig, architecture: Architecture, removal: Removal, *, trust_remote_code: bool = False
) -> LogitsProof:
    """Prune a tiny twin of the model in memory, by the same config change, and compare logits as for whole models.

    Raises ``RefusedError`` when no twin can be built, ``ExportError`` when the logits differ.
    """
    import torch

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
    with bypasser(twin, removal)(base):
        expected = logits(base, tokens)
    return compare_logits(expected, logits(pruned, tokens), METHOD, tokens)


def _slices(value: torch.Tensor, axis: int, sources: LayerMap) -> torch.Tensor:
    import torch

    chunks = value.chunk(sources.depth, dim=axis)
    return torch.cat([chunks[layer] for layer in sources.layers], dim=axis)


def hand_over(base: nn.Module, pruned: nn.Module, stack: str, sources: LayerMap, *, share: bool = False) -> None:
    """Give a pruned model the base's weights of the layers it keeps, and everything outside the stack.

    ``share``: the very tensors and no copies. Raises ``ExportError`` when they do not fit.
    """
    weights: dict[str, torch.Tensor] = {}
    for name, value in base.state_dict().items():
        if not name.startswith(f"{stack}."):
            axis = next((axis for end, axis in PACKED.items() if name.endswith(end)), None)
            weights[name] = value if axis is None else _slices(value, axis, sources)
            continue
        layer, _, rest = name[len(stack) + 1 :].partition(".")
        if int(layer) in sources.layers:
            weights[f"{stack}.{sources.layers.index(int(layer))}.{rest}"] = value
    try:
        pruned.load_state_dict(weights, strict=True, assign=share)
    except RuntimeError as error:
        said = "the pruned model does not take the weights of the kept layers"
        raise ExportError(f"{said}: {one_line(error)}") from error


# A base of which only the needed weight files were fetched from the Hub, as a folder that transformers can load.


@contextmanager
def loadable(checkpoint: Checkpoint) -> Iterator[Path]:
    """Yield the checkpoint's folder, or one of links in which the index lists no file that was not fetched.

    What such a folder lacks are tensors of removed layers: transformers makes some up, and the bypass asks none.
    """
    if not checkpoint.absent:
        yield checkpoint.path
        return
    with TemporaryDirectory(prefix="layerprune-base-") as name:
        folder = Path(name)
        for path in checkpoint.path.iterdir():
            if path.name != INDEX:
                (folder / path.name).symlink_to(path.resolve())
        files = {tensor.name: tensor.file for tensor in checkpoint.tensors.values()}
        root = checkpoint.path
        here = {name: file.relative_to(root).as_posix() for name, file in files.items() if isinstance(file, Path)}
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": here}))
        yield folder


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
