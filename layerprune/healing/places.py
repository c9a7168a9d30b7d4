"""Which weights a training method trains: found from the anatomy, never from a table of architectures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from torch import nn

from layerprune.errors import RefusedError, UsageError
from layerprune.removal import Removal
from layerprune.subject import Subject

# What decoder layers call their attention, or what takes its place, and their MLP.
ATTENTION = {"self_attn", "self_attention", "attn", "attention", "linear_attn", "conv", "short_conv"}
MLP = {"mlp", "feed_forward", "ffn", "block_sparse_moe", "moe", "shared_mlp"}


@dataclass(frozen=True)
class Cut:
    """A place where something was removed."""

    after: int  # layer of the pruned model whose output now skips what is gone; -1: before its first layer
    resumes: int  # layer of the base whose input that output stands for; the base's depth: what follows the stack


def cuts(removal: Removal, depth: int) -> tuple[Cut, ...]:
    """Return the places of a removal, first to last; ``depth`` is the base's."""
    ends = pairwise((-1, *removal.kept(depth), depth))
    return tuple(Cut(place, resumes) for place, (layer, resumes) in enumerate(ends, -1) if resumes != layer + 1)


def seams(removal: Removal, depth: int, width: int) -> tuple[int, ...]:
    """Return the layers of the pruned model within ``width`` layers on either side of a cut."""
    left = depth - len(removal)
    near = {cut.after + step for cut in cuts(removal, depth) for step in range(1 - width, width + 1)}
    return tuple(sorted(near & set(range(left))))


def layer_weights(subject: Subject, layers: Sequence[int]) -> set[str]:
    """Return the names of all weights of some decoder layers."""
    chosen = {id(weight) for layer in layers for weight in subject.layers[layer].parameters()}
    return {name for name, weight in subject.model.named_parameters() if id(weight) in chosen}


def last_layers(subject: Subject, count: int) -> tuple[int, ...]:
    """Return the last ``count`` layers; ``UsageError`` for more than there are."""
    depth = len(subject.layers)
    if not 0 <= count <= depth:
        raise UsageError(f"the last {count} layers were asked for and the model has {depth}")
    return tuple(range(depth - count, depth))


def head_weights(subject: Subject) -> set[str]:
    """Return the names of what stands behind the stack: the output embeddings and the decoder's final norm.

    Output embeddings that are tied to the input's are trained as what they are, both.
    """
    model = subject.model
    wanted = {id(weight) for weight in model.get_output_embeddings().parameters()}
    return {name for name, weight in model.named_parameters() if id(weight) in wanted} | final_norm(subject)


def final_norm(subject: Subject) -> set[str]:
    """Return the names of the weights of the norm behind the last layer: outside the stack, and one-dimensional."""
    inside = {id(weight) for layer in subject.layers for weight in layer.parameters()}
    return {
        name
        for name, weight in subject.model.named_parameters()
        if id(weight) not in inside and weight.dim() == 1 and name.rpartition(".")[0].split(".")[-1] in FINAL_NORMS
    }


FINAL_NORMS = {"norm", "final_layernorm", "final_layer_norm", "ln_f", "norm_f", "final_norm", "embedding_norm"}


def projections(subject: Subject) -> tuple[str, ...]:
    """Return the paths of the linear maps inside the attention and the MLP of every layer.

    Where experts are fused into one tensor only the attention's: peft would stretch an adapter of an MLP to experts
    whose maps had its name before they were fused. Raises ``RefusedError`` where there is none.
    """
    from transformers.pytorch_utils import Conv1D

    parts = [
        (child, part) for layer in subject.layers for child, part in layer.named_children() if child in ATTENTION | MLP
    ]
    fused = any(child in MLP and weight.dim() > 2 for child, part in parts for weight in part.parameters())
    paths = {id(module): name for name, module in subject.model.named_modules()}
    found = [
        paths[id(module)]
        for child, part in parts
        if child in ATTENTION or not fused
        for module in part.modules()
        if isinstance(module, nn.Linear | Conv1D)
    ]
    if not found:
        raise RefusedError(
            f"a {subject.anatomy.model_type} model has no linear maps in its attention or MLP for an adapter; "
            "use partial, seams or distill"
        )
    return tuple(found)


def in_mlp(subject: Subject, targets: Sequence[str]) -> bool:
    """Return whether some of these paths lie in the MLP of a layer."""
    paths = {id(module): name for name, module in subject.model.named_modules()}
    children = [named for layer in subject.layers for named in layer.named_children()]
    homes = tuple(paths[id(part)] for child, part in children if child in MLP)
    return any(target == home or target.startswith(f"{home}.") for target in targets for home in homes)
