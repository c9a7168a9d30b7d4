"""``read_anatomy``: what can be removed from a model, read off its config."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from layerprune.anatomy import patterns, readers, rope, special
from layerprune.anatomy.causality import check_causal
from layerprune.anatomy.counting import Counts, count
from layerprune.anatomy.fields import ALSO_DEPTH, DEPTH_KEYS, FIELDS, MTP_KEYS, SUPERSEDED, edits
from layerprune.anatomy.reread import reread
from layerprune.anatomy.sources import Sources
from layerprune.anatomy.stack import build_on_meta, find_stack, text_config
from layerprune.errors import RefusedError
from layerprune.removal import Removal

if TYPE_CHECKING:
    from transformers import PretrainedConfig


NOTHING = Removal(())


@dataclass(frozen=True)
class Anatomy:
    """The decoder stack of one model, and what removing layers from it takes."""

    model_type: str
    depth: int
    stack: str  # module path in memory, e.g. "model.layers"
    must_keep: frozenset[int] = frozenset()
    together: tuple[frozenset[int], ...] = ()  # layers that can only be removed as a group
    keep_one: tuple[frozenset[int], ...] = ()  # of each group at least one layer has to stay
    tail_only: bool = False  # layers cannot move: only the last ones can be removed
    remarks: tuple[str, ...] = ()  # the constraints and warnings in words
    untried: str = ""  # why no tiny model could show that it is causal; tried on the model itself once it is loaded
    config: PretrainedConfig | None = field(default=None, repr=False, compare=False)
    counts: Counts | None = field(default=None, repr=False, compare=False)
    path: tuple[str, ...] = field(default=(), repr=False)  # where the decoder's fields stand in config.json

    @property
    def constrained(self) -> bool:
        """Whether some removals are refused."""
        return bool(self.must_keep or self.together or self.keep_one or self.tail_only)

    def parameters(self, removal: Removal = NOTHING) -> int:
        """Return how many parameters the model has without the removed layers: unique ones, as it is in memory."""
        assert self.counts is not None  # read_anatomy counts
        return self.counts.after(Sources.after(removal, self.depth))

    def check(self, removal: Removal) -> None:
        """Raise ``RefusedError``, naming field or module, for a removal that cannot be exported; builds no model."""
        sources, name = Sources.after(removal, self.depth), self.model_type
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
        self._edits(sources)

    def misread(self, removal: Removal) -> tuple[str, ...]:
        """Return warnings about readers (llama.cpp, vLLM, mlx-lm) that would take the result for another model."""
        found = readers.misread(self.model_type, self.fields, Sources.after(removal, self.depth))
        return found if self._rope is not None else (*found, rope.unsaid(self.model_type))

    def heads(self) -> tuple[str, ...]:
        """Return a warning where the config speaks of multi-token-prediction heads, which a removal leaves out."""
        found = [f"{key} {self.fields[key]}" for key in MTP_KEYS if self.fields.get(key)]
        said = "is left out: it reads the intact stack"
        return tuple(f"its multi-token-prediction head ({name}) {said}" for name in found)

    def out_of_step(self, removal: Removal) -> tuple[str, ...]:
        """Return what no longer repeats from layer to layer as in the base, and which readers that leads astray."""
        sources = Sources.after(removal, self.depth)
        after = {**self.fields, **self._edits(sources)}
        remade = patterns.derived(type(self._decoder), after) if any(it.follows for it in self._rhythms) else {}
        found = []
        for it in self._rhythms:
            if not it.kept([it.kinds[layer] for layer in sources.layers], remade):
                every = f" every {it.period} layers" if it.period else ""
                said = f"{it.name} of this {self.model_type} model repeats{every}"
                found.append(f"{said}, and would not without {removal}")
        return (*found, *readers.led_astray(self.model_type, self.fields, sources))

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
        sources, base = Sources.after(removal, self.depth), dict(target)
        for key in SUPERSEDED - self.fields.keys():
            target.pop(key, None)
        target.update(self._edits(sources, base))
        self._agree(base, target, len(sources))
        for alias, key in (self.config.attribute_map if self.config is not None else {}).items():
            if alias in target and key in target and not self.path:
                del target[alias]
        return new

    def _agree(self, base: dict[str, Any], target: dict[str, Any], depth: int) -> None:
        """Say in the fields that other readers go by what a pruned decoder's fields say to transformers."""
        if self.config is None:
            return
        settled = dict(patterns.settled(type(self._decoder), base, target))
        read = patterns.lists_of(reread(type(self._decoder), settled) or {})
        for key, period in readers.fitting(self.model_type, {**settled, **read}, depth).items():
            settled.pop(key, None)
            settled.update({key: period} if period else {})
        if settled.get("rope_parameters"):
            settled.update(self._rope or {})
        target.clear()
        target.update(settled)

    @cached_property
    def fields(self) -> dict[str, Any]:
        """The decoder's config fields, with their defaults filled in."""
        return {} if self.config is None else _fields(self.config, self.path)

    @cached_property
    def _decoder(self) -> Any:
        """The decoder's own config."""
        config: Any = self.config
        for key in self.path:
            config = getattr(config, key)
        return config

    @cached_property
    def _rope(self) -> dict[str, Any] | None:
        return {} if self.config is None else rope.mirrored(self._decoder)

    @cached_property
    def _rhythms(self) -> tuple[patterns.Rhythm, ...]:
        if self.config is None:
            return ()
        steps = special.repeating(self.fields, self.depth)
        own = [patterns.Rhythm(name, tuple(kinds), patterns.repeats(kinds), False) for name, kinds in steps.items()]
        return (*patterns.rhythms(type(self._decoder), self.fields, self.depth), *(it for it in own if it.period > 1))

    def _edits(self, sources: Sources, written: Mapping[str, Any] = MappingProxyType({})) -> dict[str, Any]:
        """Return the fields that change.

        ``written`` are those of config.json: the class translates some and keeps others under another name. A list of
        layers is cut in the file's own words, which other readers know.
        """
        fields = self.fields
        told = {**written, **fields}
        own = {key: written[key] for key in written.keys() & FIELDS.keys() if _as_long(written[key], fields.get(key))}
        changed = {**edits({**told, **own}, sources), **special.edits(self.model_type, told, sources)}
        key = next((key for key in DEPTH_KEYS if key in fields), None)
        if key is None:  # a class that counts its list (Nemotron-H); other readers go by what the file says
            key = next((key for key in DEPTH_KEYS if key in written), None)
        if key is not None:
            changed[key] = len(sources)
        changed.update({key: len(sources) for key in ALSO_DEPTH if fields.get(key) == self.depth})
        return changed

    def _why(self) -> str:
        return "; ".join(self.remarks) or "its architecture needs it"


def read_anatomy(config: PretrainedConfig, *, trust_remote_code: bool = False) -> Anatomy:
    """Read the anatomy off a config, building the model on the meta device (no weights, no memory).

    Raises ``ModelError`` when transformers cannot build the model or it has no decoder stack, ``RefusedError`` when the
    model is not causal or no layer of this type can be removed exactly.
    """
    whole = config.architectures if config.is_encoder_decoder else None  # building may change the config
    model = build_on_meta(config, trust_remote_code=trust_remote_code)
    _refuse_encoder_decoder(whole, type(model).__name__)
    stack = find_stack(model, config)
    layers = list(model.get_submodule(stack).children())
    depth, path = len(layers), decoder_path(config)
    fields = _fields(config, path)
    limits = special.limits(config.model_type, fields, depth)
    untried = check_causal(config, path, trust_remote_code=trust_remote_code)
    return Anatomy(
        model_type=config.model_type, depth=depth, stack=stack, must_keep=frozenset(limits.must_keep),
        together=tuple(limits.together), keep_one=tuple(limits.keep_one), tail_only=limits.tail_only,
        remarks=tuple(limits.remarks), untried=untried, config=config, path=path,
        counts=count(model, stack),
    )  # fmt: skip


def _refuse_encoder_decoder(architectures: list[str] | None, causal: str) -> None:
    """Raise ``RefusedError`` for a whole encoder-decoder: its causal LM has weights that its checkpoint ties away."""
    if architectures and causal not in architectures:
        raise RefusedError(
            f"architectures: {architectures[0]} is an encoder-decoder, and layers are removed from causal language "
            f"models; load its decoder as a {causal} and save that first"
        )


def _fields(config: PretrainedConfig, path: tuple[str, ...]) -> dict[str, Any]:
    """Return the decoder's fields with their defaults filled in and per-layer lists written out."""
    fields: dict[str, Any] = config.to_dict()
    for key in path:
        fields = fields[key]
    return fields


def _as_long(written: Any, read: Any) -> bool:
    return isinstance(written, list) and isinstance(read, list) and len(written) == len(read)


def decoder_path(config: PretrainedConfig) -> tuple[str, ...]:
    """Return the keys that lead to the decoder's own config inside a composite one; empty for an ordinary one."""
    target = text_config(config)
    for key in getattr(config, "sub_configs", {}):
        part = getattr(config, key, None)
        if part is target:
            return (key,)
    return ()
