"""Where the decoder stack of a model is, what each config field means per layer, and what can be removed together.

Read from the config and a model on the meta device; no table of architectures stands between a new type and its export.
"""

from layerprune.architecture.architecture import Architecture, read_architecture
from layerprune.architecture.stack import build_on_meta, find_stack, load_config, positions
from layerprune.architecture.validation import check_weights
from layerprune.removal import LayerMap

__all__ = [
    "Architecture",
    "LayerMap",
    "build_on_meta",
    "check_weights",
    "find_stack",
    "load_config",
    "positions",
    "read_architecture",
]
