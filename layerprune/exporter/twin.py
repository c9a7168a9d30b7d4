"""The logits proof for a model that does not fit or run here: on a tiny random model with the same layers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from layerprune.anatomy import Anatomy, Sources, read_anatomy
from layerprune.anatomy.causality import tiny_twin
from layerprune.anatomy.fields import PACKED
from layerprune.anatomy.tiny import VOCABULARY, twin_config
from layerprune.documents import LogitsProof
from layerprune.errors import ExportError, RefusedError, one_line
from layerprune.exporter.configs import rebuilt
from layerprune.exporter.proof import bypasser, compare, logits
from layerprune.removal import Removal

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PretrainedConfig

METHOD = "tiny random model with the same layers, and the weights as bytes"


def prove_on_twin(
    config: PretrainedConfig, anatomy: Anatomy, removal: Removal, *, trust_remote_code: bool = False
) -> LogitsProof:
    """Prune a tiny twin of the model in memory, by the same config change, and compare logits as for whole models.

    Raises ``RefusedError`` when no twin can be built, ``ExportError`` when the logits differ.
    """
    import torch

    try:
        small = twin_config(config, anatomy.path)
        base = tiny_twin(small, trust_remote_code)
    except Exception as error:  # strict config classes and modelling code raise what they like
        said = f"no tiny {config.model_type} could be built to prove the export on"
        raise RefusedError(f"{said}: {one_line(error)}") from error
    twin = read_anatomy(small, trust_remote_code=trust_remote_code)
    pruned_config = rebuilt(small, twin.prune_config(small.to_diff_dict(), removal))
    pruned = tiny_twin(pruned_config, trust_remote_code)
    hand_over(base, pruned, anatomy.stack, Sources.after(removal, anatomy.depth))
    tokens = torch.randint(3, VOCABULARY, (4, 32), generator=torch.Generator().manual_seed(0))
    with bypasser(twin, removal)(base):
        expected = logits(base, tokens)
    return compare(expected, logits(pruned, tokens), METHOD, tokens)


def _slices(value: torch.Tensor, axis: int, sources: Sources) -> torch.Tensor:
    import torch

    chunks = value.chunk(sources.depth, dim=axis)
    return torch.cat([chunks[layer] for layer in sources.layers], dim=axis)


def hand_over(base: nn.Module, pruned: nn.Module, stack: str, sources: Sources, *, share: bool = False) -> None:
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
