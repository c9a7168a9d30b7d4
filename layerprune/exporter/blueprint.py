"""What the pruned model will be, read off the base's config and validated on the meta device; no weight is read."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from layerprune.anatomy import Sources, build_on_meta, check_weights, load_config, read_anatomy
from layerprune.checkpoint import Checkpoint, contained
from layerprune.exporter import quantisation
from layerprune.exporter.apart import apart
from layerprune.exporter.configs import read_json, rebuilt
from layerprune.exporter.extras import layer_renumberer
from layerprune.exporter.signature import check_signature
from layerprune.exporter.weights import find_disk_stack, plan_weights
from layerprune.removal import Removal

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig


@dataclass(frozen=True)
class Blueprint:
    """The result before its weights."""

    model_type: str
    depth: int  # of the base
    stack: str  # module path in memory, e.g. "model.layers"
    sizes: tuple[int, ...]  # elements of each layer of the base in memory
    parameters: tuple[int, int]  # of the base and of the result
    config: dict[str, Any]  # the new content of config.json
    weights: tuple[str, ...]  # names of the base's in memory

    def rules(self, sources: Sources, checkpoint: Checkpoint | None = None) -> Callable[[Any], Any]:
        """Return a function that rewrites quantisation rules, by the module names in memory and in the checkpoint."""
        pairs = [*quantisation.in_memory(self.weights, self.stack, sources)]
        if checkpoint is not None:
            stack = find_disk_stack(checkpoint, self.stack, self.sizes)
            plan = plan_weights(checkpoint, stack, sources)
            pairs += [(old, new) for new, old in plan.origin.items()]
            pairs += [(old, None) for old in plan.dropped]
        textual = layer_renumberer(self.stack, sources)
        return quantisation.rewriter(textual, sources, quantisation.module_names(pairs))


def blueprint(
    folder: Path,
    removal: Removal,
    *,
    checkpoint: Checkpoint | None = None,
    name: str = "",
    trust_remote_code: bool = False,
) -> Blueprint:
    """Return the blueprint of what a removal leaves of the model in ``folder``, of which only the config is read.

    ``checkpoint``: its weights, whose names and shapes are held against the config, and whose modules quantisation
    rules may name beside those in memory; ``name`` is what messages call it. Raises ``RefusedError`` for a removal
    that cannot be represented exactly, ``ModelError`` for a config that transformers cannot build.
    """
    with TemporaryDirectory() as place:  # names of 50,000 tensors do not fit among a process's arguments
        shapes = Path(place) / "shapes.json"
        shapes.write_text(json.dumps({} if checkpoint is None else checkpoint.shapes), encoding="utf-8")
        drawn = apart(
            draw, folder=str(folder), layers=list(removal.layers), trust_remote_code=trust_remote_code,
            shapes=str(shapes), name=name or str(folder),
        )  # fmt: skip
    found = Blueprint(**{**drawn, **{key: tuple(drawn[key]) for key in ("sizes", "parameters", "weights")}})
    sources = Sources.after(removal, found.depth)
    for part in (found.config, *(value for value in found.config.values() if isinstance(value, dict))):
        for key in quantisation.FIELDS:
            if removal and isinstance(part.get(key), dict):
                part[key] = found.rules(sources, checkpoint)(part[key])
    return found


def rehearse(folder: Path, removal: Removal, *, trust_remote_code: bool = False) -> None:
    """Raise ``RefusedError`` where ``export`` would refuse the removal before writing; seconds, no weights are read.

    Beyond ``Anatomy.check`` this builds base and result on the meta device and compares their layers.
    """
    checkpoint = Checkpoint.open(folder) if any(folder.glob("*.safetensors")) else None
    blueprint(folder, removal, checkpoint=checkpoint, trust_remote_code=trust_remote_code)


def draw(folder: str, layers: list[int], trust_remote_code: bool, shapes: str, name: str) -> dict[str, Any]:
    """Read, change and check; arguments and result as JSON has them, so that it can run in another process."""
    removal = Removal.from_layers(layers)
    old = read_json(contained(Path(folder), "config.json"))
    config = load_config(folder, trust_remote_code=trust_remote_code)
    anatomy = read_anatomy(config, trust_remote_code=trust_remote_code)
    laid = {key: tuple(shape) for key, shape in read_json(Path(shapes)).items()}
    if laid:
        check_weights(name, laid, config, anatomy, trust_remote_code=trust_remote_code)
    sources = Sources.after(removal, anatomy.depth)
    new = anatomy.prune_config(old, removal)
    check_signature(anatomy, config, rebuilt(config, new), sources, trust_remote_code=trust_remote_code)
    model = build_on_meta(config, trust_remote_code=trust_remote_code)
    parameters = [anatomy.parameters(), anatomy.parameters(removal)]
    return {"model_type": anatomy.model_type, "depth": anatomy.depth, "stack": anatomy.stack,
            "sizes": _sizes(model, anatomy.stack), "parameters": parameters, "config": new,
            "weights": list(model.state_dict())}  # fmt: skip


def layer_sizes(config: PretrainedConfig, stack: str, trust_remote_code: bool) -> list[int]:
    """Return the elements of each decoder layer as it is in memory."""
    return _sizes(build_on_meta(config, trust_remote_code=trust_remote_code), stack)


def _sizes(model: nn.Module, stack: str) -> list[int]:
    layers = model.get_submodule(stack).children()
    return [sum(value.numel() for value in layer.state_dict().values()) for layer in layers]
