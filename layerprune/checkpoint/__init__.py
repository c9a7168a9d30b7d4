"""Weights on disk: where they are, what the safetensors headers say, and how a folder is written whole or not at all.

A tensor is a name, a dtype, a shape and a byte range of a file; only ``values`` decodes one, to compare it.
"""

from layerprune.checkpoint.location import Folder, fetch, fetch_documents, locate
from layerprune.checkpoint.safetensors import Checkpoint, Tensor, read_header
from layerprune.checkpoint.writer import new_folder, plan_shards, try_new_folder, write_shards
from layerprune.files import contained

__all__ = [
    "Checkpoint",
    "Folder",
    "Tensor",
    "contained",
    "fetch",
    "fetch_documents",
    "locate",
    "new_folder",
    "plan_shards",
    "read_header",
    "try_new_folder",
    "write_shards",
]
