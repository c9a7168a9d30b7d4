"""``read_architecture``: what can be removed from a model, read off its config."""

from __future__ import annotations

import copy
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property, reduce
from operator import getitem
from typing import TYPE_CHECKING, Any

from layerprune.architecture import compatibility, config_fields, layer_patterns
from layerprune.architecture.config_fields import ALSO_DEPTH, MTP_KEYS, SUPERSEDED, depth_key
from layerprune.architecture.stack import build_on_meta, find_stack, layer_index, reread
from layerprune.architecture.tiny import random_model, twin_config
from layerprune.errors import RefusedError, one_line
from layerprune.removal import LayerMap, Removal, packed_axis

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig


# How many parameters a model has, and would have without some of its layers: those of the model in memory.
#
# Counted are the tensors that the model reads from its files, buffers such as a router's correction among them, each
# once however often it is used or stored (a tied head that is on disk, too, an expert that layers share), a quantised
# one as what it stands for.


@dataclass(frozen=True)
class Counts:
    """Elements of the tensors of a model, by where they are used."""

    packed: int  # outside the stack, with one slice per layer
    used: Mapping[frozenset[int], int]  # by the layers that share them; by none what stands outside the stack

    def after(self, sources: LayerMap) -> int:
        """Return the parameters of what is left."""
        left = set(sources.layers)
        whole = sum(size for layers, size in self.used.items() if not layers or layers & left)
        return whole + self.packed // sources.depth * len(sources)


def count(model: nn.Module, stack: str) -> Counts:
    """Count the parameters of a model, on any device."""
    sizes, places, packed = {}, defaultdict(set), set()
    for name, weight in model.state_dict(keep_vars=True).items():
        sizes[id(weight)] = weight.numel()
        places[id(weight)].add(layer_index(name, stack))
        if packed_axis(name) is not None:
            packed.add(id(weight))
    used: Counter[frozenset[int]] = Counter()
    for key in sizes.keys() - packed:
        used[frozenset() if None in places[key] else frozenset(places[key])] += sizes[key]
    return Counts(sum(sizes[key] for key in packed), used)


NOTHING = Removal(())


@dataclass(frozen=True)
class Architecture:
    """The decoder stack of one model, and what removing layers from it takes."""

    model_type: str
    depth: int
    stack: str  # module path in memory, e.g. "model.layers"
    config: PretrainedConfig = field(repr=False, compare=False)
    counts: Counts = field(repr=False, compare=False)
    path: tuple[str, ...] = field(default=(), repr=False)  # where the decoder's fields stand in config.json
    must_keep: frozenset[int] = frozenset()
    together: tuple[frozenset[int], ...] = ()  # layers that can only be removed as a group
    keep_one: tuple[frozenset[int], ...] = ()  # of each group at least one layer has to stay
    tail_only: bool = False  # layers cannot move: only the last ones can be removed
    remarks: tuple[str, ...] = ()  # the constraints and warnings in words
    untried: str = ""  # why no tiny model could show that it is causal; tried on the model itself once it is loaded

    @property
    def constrained(self) -> bool:
        """Whether some removals are refused."""
        return bool(self.must_keep or self.together or self.keep_one or self.tail_only)

    def parameters(self, removal: Removal = NOTHING) -> int:
        """Return how many parameters the model has without the removed layers: unique ones, as it is in memory."""
        return self.counts.after(LayerMap.after(removal, self.depth))

    def check(self, removal: Removal) -> None:
        """Raise ``RefusedError``, naming field or module, for a removal that cannot be exported; builds no model."""
        sources, name = LayerMap.after(removal, self.depth), self.model_type
        if not len(sources):
            raise RefusedError(f"removing all {self.depth} layers leaves no model; keep at least one")
        gone = set(removal)
        stuck = sorted(gone & self.must_keep)
        if stuck:
            raise RefusedError(f"layer {stuck[0]} of a {name} model has to stay: {self._why()}")
        if self.tail_only and sources.layers != tuple(range(len(sources))):
            raise RefusedError(f"only the last layers of a {name} model can be removed: {self._why()}")
        for group in self.together:
            if gone & group and not group <= gone:
                raise RefusedError(f"layers {sorted(group)} of a {name} model go together: {self._why()}")
        for group in self.keep_one:
            if group <= gone:
                raise RefusedError(f"one of layers {sorted(group)} of a {name} model has to stay: {self._why()}")
        self._edits(sources, {})

    def misread(self, removal: Removal) -> tuple[str, ...]:
        """Return warnings about readers (llama.cpp, vLLM, mlx-lm) that would take the result for another model."""
        found = tuple(text for text, _ in self.misreadings(removal))
        if self._rope is None:
            found += (
                f"the rotary embedding of this {self.model_type} model stands in rope_parameters of config.json and "
                "cannot be said in the fields that transformers 4 and mlx-lm read (rope_theta, rope_scaling): they "
                "would misread the result, as they misread the base",
            )
        return found

    def misreadings(self, removal: Removal) -> tuple[tuple[str, bool], ...]:
        """Return warnings about readers that guess at periods or depths, each with whether it reads the base right."""
        sources = LayerMap.after(removal, self.depth)
        return tuple(compatibility.misreadings(self.model_type, self.fields, sources))

    def left_behind(self, removal: Removal) -> dict[str, bool]:
        """Return the fields of single layers that a tool which changes the depth alone leaves as they are.

        Of each, whether a reader that goes by the new depth takes it right: a list whose first entries are those of the
        layers that are left, indices below the new depth that name the same ones.
        """
        sources = LayerMap.after(removal, self.depth)
        left, lists = len(sources), layer_patterns.lists_of(self.fields)
        found = {}
        for key, new in self._edits(sources, {}).items():
            old = self.fields.get(key)
            if key in (depth_key(self.fields), *ALSO_DEPTH, *MTP_KEYS):
                continue
            if key == "max_window_layers" and "layer_types" in lists:
                continue  # readers of layer_types do not ask it
            if isinstance(old, list) and config_fields.FIELDS.get(key) == "indices":
                found[key] = [layer for layer in old if layer < left] == new
            else:
                found[key] = isinstance(old, list) and old[:left] == new
        return found

    def heads(self) -> tuple[str, ...]:
        """Return a warning where the config speaks of multi-token-prediction heads, which a removal leaves out."""
        found = [f"{key} {self.fields[key]}" for key in MTP_KEYS if self.fields.get(key)]
        said = "is left out: it reads the intact stack"
        return tuple(f"its multi-token-prediction head ({name}) {said}" for name in found)

    def out_of_step(self, removal: Removal) -> tuple[str, ...]:
        """Return what no longer repeats from layer to layer as in the base, and which readers that leads astray."""
        sources = LayerMap.after(removal, self.depth)
        after = {**self.fields, **self._edits(sources, {})}
        remade = layer_patterns.derived(type(self._decoder), after) if any(it.follows for it in self._periods) else {}
        found = []
        for it in self._periods:
            if not it.kept([it.kinds[layer] for layer in sources.layers], remade):
                every = f" every {it.period} layers" if it.period else ""
                said = f"{it.name} of this {self.model_type} model repeats{every}"
                found.append(f"{said}, and would not without {removal}")
        return (*found, *(text for text, reads_base in self.misreadings(removal) if reads_base))

    def prune_config(self, config: dict[str, Any], removal: Removal) -> dict[str, Any]:
        """Return the content of config.json for the pruned model; ``config`` is the base's, and is not changed.

        Only fields that have to change differ. Raises ``RefusedError`` for a removal that ``check`` refuses.
        """
        self.check(removal)
        new = copy.deepcopy(config)
        if not removal:
            return new
        target = new
        for key in self.path:
            target = target.setdefault(key, {})
        sources, base = LayerMap.after(removal, self.depth), dict(target)
        for key in SUPERSEDED - self.fields.keys():
            target.pop(key, None)
        target.update(self._edits(sources, base))
        self._agree(base, target, len(sources))
        for alias, key in self.config.attribute_map.items():
            if alias in target and key in target and not self.path:
                del target[alias]
        return new

    def _agree(self, base: dict[str, Any], target: dict[str, Any], depth: int) -> None:
        """Say in the fields that other readers go by what a pruned decoder's fields say to transformers."""
        settled = dict(layer_patterns.consistent_patterns(type(self._decoder), base, target))
        read = layer_patterns.lists_of(reread(type(self._decoder), settled) or {})
        for key, period in compatibility.period_fields(self.model_type, {**settled, **read}, depth).items():
            settled.pop(key, None)
            settled.update({key: period} if period else {})
        if settled.get("rope_parameters"):
            settled.update(self._rope or {})
        target.clear()
        target.update(settled)

    @cached_property
    def fields(self) -> dict[str, Any]:
        """The decoder's config fields, with their defaults filled in and per-layer lists written out."""
        return reduce(getitem, self.path, self.config.to_dict())

    @cached_property
    def _decoder(self) -> Any:
        """The decoder's own config."""
        return reduce(getattr, self.path, self.config)

    @cached_property
    def _rope(self) -> dict[str, Any] | None:
        return compatibility.legacy_rope_fields(self._decoder)

    @cached_property
    def _periods(self) -> tuple[layer_patterns.LayerPeriod, ...]:
        return layer_patterns.layer_periods(type(self._decoder), self.fields, self.depth)

    def _edits(self, sources: LayerMap, written: Mapping[str, Any]) -> dict[str, Any]:
        """Return the fields that change.

        ``written`` are those of config.json: the class translates some and keeps others under another name. A list of
        layers is cut in the file's own words, which other readers know.
        """
        fields = self.fields
        told = {**written, **fields}
        words, read = layer_patterns.lists_of(written), layer_patterns.lists_of(fields)
        own = {key: words[key] for key in words.keys() & read.keys() if len(words[key]) == len(read[key])}
        changed = config_fields.edits({**told, **own}, sources)
        changed |= config_fields.type_edits(self.model_type, told, sources)
        key = depth_key(fields) or depth_key(written)  # a class may count its list (Nemotron-H), and other readers not
        if key is not None:
            changed[key] = len(sources)
        changed |= {key: len(sources) for key in ALSO_DEPTH if fields.get(key) == self.depth}
        return changed

    def _why(self) -> str:
        return "; ".join(self.remarks) or "its architecture needs it"


def read_architecture(config: PretrainedConfig, *, trust_remote_code: bool = False) -> Architecture:
    """Read the anatomy off a config, building the model on the meta device (no weights, no memory).

    Raises ``ModelError`` when transformers cannot build the model or it has no decoder stack, ``RefusedError`` when the
    model is not causal or no layer of this type can be removed exactly.
    """
    architectures = config.architectures if config.is_encoder_decoder else None  # building may change the config
    model = build_on_meta(config, trust_remote_code=trust_remote_code)
    causal = type(model).__name__
    if architectures and causal not in architectures:  # its causal LM has weights that its checkpoint ties away
        raise RefusedError(
            f"architectures: {architectures[0]} is an encoder-decoder, and layers are removed from causal language "
            f"models; load its decoder as a {causal} and save that first"
        )
    stack = find_stack(model, config)
    depth, path = len(model.get_submodule(stack)), decoder_path(config)
    limits = config_fields.limits(config.model_type, reduce(getitem, path, config.to_dict()), depth)
    untried = check_causal(config, path, trust_remote_code=trust_remote_code)
    return Architecture(
        model_type=config.model_type, depth=depth, stack=stack, config=config, counts=count(model, stack), path=path,
        untried=untried, **vars(limits),
    )  # fmt: skip


def decoder_path(config: PretrainedConfig) -> tuple[str, ...]:
    """Return the keys that lead to the decoder's own config inside a composite one; empty for an ordinary one."""
    target = config.get_text_config(decoder=True)
    return next(((key,) for key in config.sub_configs if getattr(config, key, None) is target), ())


# Whether a model is causal: change the last token of a text, and the logits of the tokens before it must not move.
#
# Tried on a tiny random model with the same config, so that an encoder is refused before any weight is read.


TOKENS = 8
# Largest change of an earlier logit, as a share of the largest change at the last token. Over the causal-LM types of
# transformers 5.23 (tiny, random): at most 1.5e-4 where attention is causal, at least 1.4e-2 where it is not.
MOVED = 2e-3
# In half precision rounding alone moves logits: experts whose share of the tokens changes multiply in other groups.
MOVED_HALF = 5e-2
# Config fields that make attention bidirectional, with the value that does.
FLAGS = {"is_decoder": False, "is_causal": False, "use_bidirectional_attention": True, "bidirectional": True,
         "attn_type": "bi", "causal": False}  # fmt: skip
# Whether a tiny model sees ahead, and why it could not be tried: the same class and content is tried once a process.
TRIED: dict[tuple[Any, ...], tuple[bool, str]] = {}


def sees_ahead(model: nn.Module) -> bool:
    """Return whether the logits of a token depend on tokens behind it; the model is run on two short texts.

    One at a time: rows of one batch may be multiplied in blocks of another size, which rounds otherwise.
    """
    import torch

    table = model.get_input_embeddings()  # type: ignore[operator]
    draw = torch.Generator().manual_seed(0)
    row = torch.randint(3, int(table.weight.shape[0]) - 1, (TOKENS,), generator=draw)
    other = row.clone()
    other[-1] += 1
    with torch.no_grad():
        before, after = (model(text[None].to(table.weight.device), use_cache=False).logits[0] for text in (row, other))
    moved = (before.double() - after.double()).abs().amax(-1)  # (tokens,), over the vocabulary
    share = MOVED_HALF if before.dtype in (torch.float16, torch.bfloat16) else MOVED
    return bool(moved[:-1].max() > share * moved[-1])


def require_causal(model: nn.Module, config: PretrainedConfig) -> None:
    """Raise ``RefusedError`` for a model, loaded or tiny, that ``sees_ahead``."""
    if sees_ahead(model):
        raise RefusedError(_not_causal(config))


def check_causal(config: PretrainedConfig, path: tuple[str, ...] = (), *, trust_remote_code: bool = False) -> str:
    """Raise ``RefusedError`` for the config of a model that is not causal.

    ``path`` leads to the decoder's config inside a composite one. Returns why it could not be tried, empty when it
    was: some configs suit no tiny model, and are tried when the model is loaded.
    """
    import torch

    key = (type(config), config.to_json_string(use_diff=False), path, trust_remote_code)
    if key not in TRIED:
        try:
            with torch.random.fork_rng(devices=[]):  # the state of torch's random numbers is put back
                twin = random_model(twin_config(config, path), trust_remote_code=trust_remote_code)
                TRIED[key] = sees_ahead(twin), ""
        except Exception as error:  # noqa: BLE001  strict config classes and modelling code raise what they like
            TRIED[key] = False, one_line(error)
    seen, untried = TRIED[key]
    if seen:
        raise RefusedError(_not_causal(config))
    return untried


def _not_causal(config: PretrainedConfig) -> str:
    said = f"this {config.model_type} model is not causal: changing the last token moves the logits of earlier ones"
    decoder: Any = config.get_text_config(decoder=True)
    flags = [name for name, value in FLAGS.items() if getattr(decoder, name, None) == value]
    named = f" ({flags[0]} is {getattr(decoder, flags[0])!r})" if flags else ""
    if flags[:1] == ["is_decoder"]:
        advice = 'only a model trained as a decoder can be pruned, with "is_decoder": true in its config.json'
    else:
        advice = "layers are removed from causal language models only"
    return f"{said}{named}, so it would see the answers that it is asked for; {advice}"
