"""What ``layerprune inspect`` tells: the stack of a model, its layers, and which of them can be removed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from layerprune.architecture import Architecture, build_on_meta, check_weights, load_config, read_architecture
from layerprune.checkpoint import Checkpoint, locate
from layerprune.errors import RefusedError
from layerprune.exporter.contents import config_changes
from layerprune.lineage import Lineage, trace
from layerprune.removal import Removal
from layerprune.util import SILENT, Progress


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
    """A model seen from its config and the headers of its weights; no weight was read but to compare it with a base."""

    model: str
    architecture: Architecture
    layers: tuple[Layer, ...]
    parameters: int
    nbytes: int  # of the weights on disk
    changes: tuple[str, ...]  # config fields that a removal rewrites
    remarks: tuple[str, ...]
    lineage: Lineage | None = None  # what it is beside its base, where one was given

    @property
    def removable(self) -> int:
        """How many layers can go, one at a time or in their groups."""
        return sum(not layer.refusal for layer in self.layers)


def inspect_model(
    model: str,
    *,
    revision: str | None = None,
    base: str | None = None,
    trust_remote_code: bool = False,
    progress: Progress = SILENT,
) -> Inspection:
    """Look at a local folder or a Hub model; of weights only headers are read, from the Hub by byte ranges.

    With a ``base`` its weights are compared with that model's; those of a Hub model are downloaded for that. What the
    weights lack is then a remark, and no error: the comparison says what became of it.

    Raises ``ModelError`` for a model that cannot be read and ``RefusedError`` for one that cannot be pruned: one that
    is no causal language model, whose weights are not those its config describes, or of which nothing can be removed.
    """
    from transformers import PretrainedConfig

    folder = locate(model, revision, weights=base is not None, shards=base is not None)
    where = str(folder.path)
    config = load_config(where, trust_remote_code=trust_remote_code)
    checkpoint = folder.open()
    architecture = read_architecture(config, trust_remote_code=trust_remote_code)
    lineage = None if base is None else trace(folder, locate(base), progress=progress)
    remarks, unfit = (), ""
    try:
        remarks = check_weights(folder.id, checkpoint.shapes, config, architecture, trust_remote_code=trust_remote_code)
    except RefusedError as error:
        if lineage is None:
            raise
        unfit = f"it cannot be pruned as it is: {error}"
    content, _ = PretrainedConfig.get_config_dict(where)
    built = build_on_meta(config, trust_remote_code=trust_remote_code)
    stack = list(built.get_submodule(architecture.stack).children())
    kinds = getattr(config.get_text_config(decoder=True), "layer_types", None)
    groups = {layer: group for group in architecture.together for layer in group}
    layers = tuple(
        Layer(
            index=index,
            kind=kinds[index] if kinds and len(kinds) == len(stack) else type(module).__name__,
            parameters=sum(weight.numel() for weight in module.state_dict().values()),
            goes_with=tuple(sorted(groups.get(index, frozenset()) - {index})),
            refusal="its weights do not fit its config"
            if unfit
            else _refusal(architecture, groups.get(index, frozenset({index}))),
        )
        for index, module in enumerate(stack)
    )
    return Inspection(
        model=model,
        architecture=architecture,
        layers=layers,
        parameters=architecture.parameters(),
        nbytes=checkpoint.nbytes,
        changes=_changes(architecture, content, layers, groups),
        remarks=(*architecture.remarks, *remarks, *_not_listed(checkpoint), *([unfit] if unfit else [])),
        lineage=lineage,
    )


def _not_listed(checkpoint: Checkpoint) -> list[str]:
    """Return a remark on weight files in a local folder that belong to no index: nobody reads them."""
    strays = sorted({path.name for path in checkpoint.path.glob("*.safetensors")} - checkpoint.names)
    if not strays:
        return []
    return [f"no index names {', '.join(strays)}: not read, and not carried along by export"]


def _refusal(architecture: Architecture, layers: frozenset[int]) -> str:
    try:
        architecture.check(Removal.from_layers(layers))
    except RefusedError as error:
        return str(error)
    return ""


def _changes(
    architecture: Architecture, content: dict[str, Any], layers: tuple[Layer, ...], groups: dict[int, frozenset[int]]
) -> tuple[str, ...]:
    """Return the fields that differ after removing any one layer (or group) that can go."""
    changed: set[str] = set()
    for layer in layers:
        if not layer.refusal:
            removal = Removal.from_layers(groups.get(layer.index, frozenset({layer.index})))
            changed |= config_changes(content, architecture.prune_config(content, removal)).keys()
    return tuple(sorted(changed))
