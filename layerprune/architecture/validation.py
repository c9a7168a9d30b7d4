"""Whether a config and its weights are those of a causal language model; no weight is read."""

from __future__ import annotations

import copy
import re
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from layerprune.architecture.architecture import Architecture
from layerprune.architecture.config_fields import MTP_KEYS, depth_key, full_lists
from layerprune.architecture.stack import build_on_meta, layer_index, quiet
from layerprune.errors import ModelError, RefusedError, one_line

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig


Shape = tuple[int, ...]

LANGUAGE_MODEL = re.compile(r"(CausalLM|LMHead\w*|LMModel|MaskedLM|ForPreTraining|ForConditionalGeneration)$")
OTHER_TASK = re.compile(r"Classif|Regress|Reward|Rank|QuestionAnswering|MultipleChoice|NextSentence|Retriev|Embedding")
# Names of heads that are no language model's: classifiers, reward and value models, extractive question answering.
HEAD = re.compile(r"(^|[._])(scores?|\w*classif\w*|\w*reward\w*|\w*regress\w*|v_head|\w*value_head|qa_outputs)[._]")
FEW = 64  # outputs; a matrix from hidden states to fewer is a head of scores or labels, whatever its name
MTP = re.compile(r"(^|\.)(mtp\w*|eh_proj|enorm|hnorm|shared_head)\.")
WIDTHS = ("hidden_size", "n_embd", "d_model", "vocab_size", "intermediate_size", "n_inner", "ffn_dim", "head_dim",
          "num_attention_heads", "n_head", "num_key_value_heads", "num_experts", "num_local_experts",
          "n_routed_experts", "moe_intermediate_size", "max_position_embeddings", "n_positions")  # fmt: skip


@dataclass(frozen=True)
class CheckpointFit:
    """What transformers would find in these weights, by names in memory."""

    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    mismatched: tuple[tuple[str, Shape, Shape], ...]  # name, shape on disk, shape in the model


def check_weights(
    where: str,
    shapes: Mapping[str, Shape],
    config: PretrainedConfig,
    architecture: Architecture,
    *,
    trust_remote_code: bool = False,
) -> tuple[str, ...]:
    """Raise ``RefusedError`` unless tensors of these names and shapes are the causal language model of the config.

    ``where`` is what messages call the model. Nothing is read but names: the tensors are laid out on the meta device
    and loaded there by transformers itself, which knows how its types rename and fuse them. Returns remarks.
    """
    named = list(config.architectures or [])  # building may change the config
    model = build_on_meta(config, trust_remote_code=trust_remote_code)
    fit = _fit(model, shapes)
    quantisation = getattr(config, "quantization_config", None)
    if quantisation is not None:
        _check_quantisation(where, quantisation)
        fit = _as_quantised(fit)
    hidden = getattr(config.get_text_config(decoder=True), "hidden_size", 0)
    _check_task(where, named, model, config, _heads(fit, shapes, architecture, hidden))
    _check_depth(where, fit, model, architecture)
    _check_shapes(where, fit, config)
    _check_missing(where, named, fit, model, shapes)
    return tuple(_remarks(named, fit, model, architecture))


def _fit(model: nn.Module, shapes: Mapping[str, Shape]) -> CheckpointFit:
    import torch
    from transformers.utils import logging

    config = copy.deepcopy(model.config)
    for part in (config, config.get_text_config(decoder=True)):  # type: ignore[operator, union-attr]
        if hasattr(part, "quantization_config"):
            del part.quantization_config  # else its kernels are asked for, and nothing is computed here
    laid = {name: torch.empty(shape, device="meta", dtype=torch.bfloat16) for name, shape in shapes.items()}
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with quiet(level=logging.CRITICAL):
            _, info = type(model).from_pretrained(  # type: ignore[attr-defined]
                None, config=config, state_dict=laid, device_map="meta", output_loading_info=True,
                ignore_mismatched_sizes=True,
            )  # fmt: skip
    except Exception as error:  # the loaders of 190 types raise what they like
        raise ModelError(f"transformers cannot compare the weights with their config: {one_line(error)}") from error
    finally:
        if shown:
            logging.enable_progress_bar()
    mismatched = [(str(name), tuple(disk), tuple(made)) for name, disk, made in info["mismatched_keys"]]
    missing, unexpected = (_in_order(info[key]) for key in ("missing_keys", "unexpected_keys"))
    return CheckpointFit(missing, unexpected, tuple(sorted(mismatched)))


def _in_order(names: Collection[str]) -> tuple[str, ...]:
    """Sort names as people count: layer 2 before layer 10."""
    return tuple(sorted(map(str, names), key=lambda name: [(len(part), part) for part in name.split(".")]))


def _as_quantised(fit: CheckpointFit) -> CheckpointFit:
    """Leave out what packing explains: other shapes, and a weight in whose place its module has other tensors."""
    packed = {name.rpartition(".")[0] for name in fit.unexpected}
    packed |= {place.rpartition(".experts.")[0] + ".experts" for place in packed if ".experts." in place}
    packed |= {re.sub(r"_(blocks|scales|packed)$", "", name) for name in fit.unexpected}
    missing = [name for name in fit.missing if not {name, name.rpartition(".")[0]} & packed]
    return CheckpointFit(tuple(missing), fit.unexpected, ())


def _check_quantisation(where: str, settings: Any) -> None:
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING as known

    method = settings.get("quant_method") if isinstance(settings, dict) else settings.quant_method
    method = str(getattr(method, "value", method))
    if method not in known and not method.startswith("bitsandbytes"):
        raise RefusedError(
            f"{where}: its weights are quantised by {method!r}, which this transformers does not read; take the model "
            "that it was made from"
        )


def _heads(fit: CheckpointFit, shapes: Mapping[str, Shape], architecture: Architecture, hidden: int) -> list[str]:
    """Return the unexpected tensors that are a head of another kind, with their shapes."""
    found = []
    for name in fit.unexpected:
        shape = shapes.get(name, ())
        outside = layer_index(name, architecture.stack) is None and not MTP.search(name)
        few = len(shape) == 2 and shape[1] == hidden and shape[0] < min(FEW, hidden)
        if outside and (HEAD.search(name) or few):
            found.append(f"{name} {list(shape)}" if shape else name)
    return sorted(found, key=lambda name: ".bias" in name)


def _check_task(
    where: str, named: Sequence[str], model: nn.Module, config: PretrainedConfig, heads: Sequence[str]
) -> None:
    other = named[0] if named and OTHER_TASK.search(named[0]) and not LANGUAGE_MODEL.search(named[0]) else ""
    if other == type(model).__name__ or "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {}):
        other = ""
    if not heads and not other:
        return
    holds = f"its weights hold {heads[0]}, a head that is not a language model's" if heads else ""
    says = f"config.json names {other}, {_task(other)}" if other else ""
    raise RefusedError(
        f"{where} is not a plain causal language model: {' and '.join(part for part in (says, holds) if part)}; layers "
        f"are removed by what the next tokens lose: take the {type(model).__name__} that it was made from"
    )


def _task(named: str) -> str:
    """Return what a model class is for, by transformers' own lists: "a model for sequence classification"."""
    from transformers.models.auto import modeling_auto

    for name, entries in vars(modeling_auto).items():
        match = re.fullmatch(r"MODEL_FOR_(\w+)_MAPPING_NAMES", name)
        if match and any(named == entry or (isinstance(entry, tuple) and named in entry) for entry in entries.values()):
            return f"a model for {match[1].replace('_', ' ').lower()}"
    return "which predicts something else than the next token"


def _check_depth(where: str, fit: CheckpointFit, model: nn.Module, architecture: Architecture) -> None:
    fields, depth, stack = architecture.fields, architecture.depth, architecture.stack
    key = depth_key(fields) or "num_hidden_layers"
    wanted: dict[int, set[str]] = defaultdict(set)
    for name in model.state_dict():
        if (layer := layer_index(name, stack)) is not None:
            wanted[layer].add(name)
    absent = [layer for layer, names in sorted(wanted.items()) if names <= {*fit.missing}]
    lists = full_lists(fields)
    if absent and absent[0] > 0 and absent == list(range(absent[0], depth)):
        also = f" and cut {', '.join(lists)} to the layers that are there" if lists else ""
        raise RefusedError(
            f"{where}: config.json says {key} is {depth}, and the weights hold {absent[0]} layers (0 to "
            f"{absent[0] - 1}): set {key} to {absent[0]}{also}, or put the missing weights back"
        )
    if absent and len(absent) < depth:
        raise RefusedError(
            f"{where}: the weights hold nothing of layers {', '.join(map(str, absent))} of the {depth} that "
            f"config.json speaks of ({key}): put them back, or number the layers that are there from 0 and set {key} "
            f"to {depth - len(absent)}"
        )
    heads = {layer_index(name, stack) for name in fit.unexpected if MTP.search(name)}
    others = {layer_index(name, stack) for name in fit.unexpected if not MTP.search(name)}
    allowed = sum(int(fields.get(name) or 0) for name in MTP_KEYS)
    extra = sorted(layer for layer in others - heads if layer is not None and layer >= depth)
    if len(extra) > allowed:
        raise RefusedError(
            f"{where}: config.json says {key} is {depth}, and the weights hold layers up to {extra[-1]}, which "
            f"transformers would leave out in silence: set {key} to {extra[-1] + 1}, or delete the tensors of layers "
            f"{depth} to {extra[-1]}"
        )


def _check_shapes(where: str, fit: CheckpointFit, config: PretrainedConfig) -> None:
    if not fit.mismatched:
        return
    pairs = [(name, disk, made) for name, disk, made in fit.mismatched if len(disk) == len(made)]
    name, disk, made = (pairs or fit.mismatched)[0]
    advice = "take the config.json that belongs to these weights"
    if getattr(config, "quantization", None) is not None:
        advice = "its weights are quantised by MLX; take the model that it was made from"
    else:
        decoder: Any = config.get_text_config(decoder=True)
        changed = {(old, new) for _, ours, theirs in pairs for new, old in zip(ours, theirs, strict=True) if new != old}
        fields = [(key, new) for key in WIDTHS for old, new in sorted(changed) if getattr(decoder, key, None) == old]
        if fields:
            advice += f", or set {fields[0][0]} to {fields[0][1]} if that is all that differs"
    raise RefusedError(
        f"{where}: config.json makes {name} {list(made)} and the file holds {list(disk)} "
        f"({len(fit.mismatched)} tensors differ): {advice}"
    )


def _check_missing(
    where: str, named: Sequence[str], fit: CheckpointFit, model: nn.Module, shapes: Mapping[str, Shape]
) -> None:
    if not fit.missing:
        return
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    output = getattr(head, "weight", None)
    heads = {name for name, value in model.named_parameters(remove_duplicate=False) if value is output}
    if {*fit.missing} <= heads | {name.replace("weight", "bias") for name in heads}:
        what = f"{named[0]}, as config.json names it," if named and named[0].endswith("Model") else "it"
        raise RefusedError(
            f"{where} has no language-model head ({fit.missing[0]}): {what} ends in hidden states, as embedding and "
            f"base models do; take the {type(model).__name__} that it was made from, or set tie_word_embeddings to "
            "true if its head is its embedding"
        )
    if len(fit.missing) >= len(model.state_dict()):
        raise RefusedError(
            f"{where}: none of the {len(shapes)} tensors is named as those of a {type(model).__name__} are "
            f"({next(iter(shapes))} for one): config.json is of another model"
        )
    raise RefusedError(
        f"{where} lacks {len(fit.missing)} of its weights, {fit.missing[0]} for one: transformers would make them up; "
        "download or save it again, whole"
    )


def _remarks(named: Sequence[str], fit: CheckpointFit, model: nn.Module, architecture: Architecture) -> list[str]:
    found = []
    if architecture.untried:
        found.append(
            "whether it is causal could not be tried on a tiny model, and is tried when it is loaded "
            f"({architecture.untried})"
        )
    base = bool(named) and named[0].endswith("Model") and not LANGUAGE_MODEL.search(named[0])
    if base and model.config.tie_word_embeddings:
        found.append(
            f"config.json names {named[0]}, a base or embedding model; its head is its embedding, and it is taken for "
            f"a {type(model).__name__}"
        )
    strays = [name for name in fit.unexpected if not MTP.search(name)]
    if strays and not hasattr(model.config, "quantization_config"):
        found.append(
            f"a {type(model).__name__} does not read {len(strays)} of its tensors, {strays[0]} for one; export carries "
            "them along"
        )
    return found
