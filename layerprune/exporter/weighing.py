"""What export would write, in parameters and bytes, without writing it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from layerprune.anatomy import Sources, load_config, read_anatomy
from layerprune.checkpoint import Checkpoint
from layerprune.exporter.blueprint import layer_sizes
from layerprune.exporter.weights import Weight, find_disk_stack, plan_weights
from layerprune.removal import Removal


def weigh(folder: Path, removals: Sequence[Removal], *, trust_remote_code: bool = False) -> list[Weight]:
    """Return the size each removal leaves; from headers alone, whether or not export would refuse it."""
    checkpoint = Checkpoint.open(folder)
    config = load_config(str(folder), trust_remote_code=trust_remote_code)
    anatomy = read_anatomy(config, trust_remote_code=trust_remote_code)
    stack = find_disk_stack(checkpoint, anatomy.stack, layer_sizes(config, anatomy.stack, trust_remote_code))
    weights = []
    for removal in removals:
        sources = Sources.after(removal, anatomy.depth)
        planned = plan_weights(checkpoint, stack, sources)
        weights.append(Weight(anatomy.parameters(removal), sum(part.nbytes for part in planned.parts), planned.heads))
    return weights
