"""What ``layerprune inspect`` tells: the stack of a model, its layers, and which of them can be removed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from layerprune.anatomy import Anatomy, build_on_meta, load_config, read_anatomy
from layerprune.checkpoint import Checkpoint, locate
from layerprune.errors import RefusedError
from layerprune.removal import Removal


@dataclass(frozen=True)
class Layer:
    """One decoder layer."""

    index: int
    kind: str  # its entry in the config's layer_types, or its class
    parameters: int
    goes_with: tuple[int, ...]  # the layers it can only be removed together with
    refusal: str  # why it has to stay; empty when it can be removed


@dataclass(frozen=True)
class Inspection:
    """A model seen from its config; no weight was read."""

    model: str
    anatomy: Anatomy
    layers: tuple[Layer, ...]
    parameters: int
    nbytes: int | None  # of the weights on disk; None for a Hub model, whose weights are not fetched for this
    changes: tuple[str, ...]  # config fields that a removal rewrites

    @property
    def removable(self) -> int:
        """How many layers can go, one at a time or in their groups."""
        return sum(not layer.refusal for layer in self.layers)


def inspect_model(model: str, *, revision: str | None = None, trust_remote_code: bool = False) -> Inspection:
    """Look at a local folder or a Hub model; raises ``ModelError``, or ``RefusedError`` when nothing can be removed."""
    from transformers import PretrainedConfig

    local = _is_path(model)
    where = str(locate(model, revision).path) if local else model  # a Hub model's weights are not fetched for this
    config = load_config(where, revision=revision, trust_remote_code=trust_remote_code)
    anatomy = read_anatomy(config, trust_remote_code=trust_remote_code)
    content, _ = PretrainedConfig.get_config_dict(where, revision=revision)
    built = build_on_meta(config, trust_remote_code=trust_remote_code)
    stack = list(built.get_submodule(anatomy.stack).children())
    kinds = getattr(config.get_text_config(decoder=True), "layer_types", None)
    groups = {layer: group for group in anatomy.together for layer in group}
    layers = tuple(
        Layer(
            index=index,
            kind=kinds[index] if kinds and len(kinds) == len(stack) else type(module).__name__,
            parameters=sum(weight.numel() for weight in module.parameters()),
            goes_with=tuple(sorted(groups.get(index, frozenset()) - {index})),
            refusal=_refusal(anatomy, groups.get(index, frozenset({index}))),
        )
        for index, module in enumerate(stack)
    )
    return Inspection(
        model=model,
        anatomy=anatomy,
        layers=layers,
        parameters=sum(weight.numel() for weight in built.parameters()),
        nbytes=Checkpoint.open(Path(where)).nbytes if local else None,
        changes=_changes(anatomy, content, layers, groups),
    )


def _is_path(model: str) -> bool:
    """Return whether ``model`` can only be a path; a Hub id has at most one slash and no leading dot or tilde."""
    path = Path(model).expanduser()
    return path.exists() or path.is_absolute() or model.startswith((".", "~")) or model.count("/") > 1


def _refusal(anatomy: Anatomy, layers: frozenset[int]) -> str:
    try:
        anatomy.check(Removal.from_units(layers))
    except RefusedError as error:
        return str(error)
    return ""


def _changes(
    anatomy: Anatomy, content: dict[str, Any], layers: tuple[Layer, ...], groups: dict[int, frozenset[int]]
) -> tuple[str, ...]:
    """Return the fields that differ after removing any one layer (or group) that can go."""
    changed: set[str] = set()
    for layer in layers:
        if not layer.refusal:
            removal = Removal.from_units(groups.get(layer.index, frozenset({layer.index})))
            changed |= _different(content, anatomy.prune_config(content, removal))
    return tuple(sorted(changed))


def _different(before: dict[str, Any], after: dict[str, Any], prefix: str = "") -> set[str]:
    found: set[str] = set()
    for key in {*before, *after}:
        old, new = before.get(key), after.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            found |= _different(old, new, f"{prefix}{key}.")
        elif old != new:
            found.add(prefix + key)
    return found
