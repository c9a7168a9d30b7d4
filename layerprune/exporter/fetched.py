"""A base of which only the needed weight files were fetched from the Hub, as a folder that transformers can load."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from layerprune.checkpoint import Checkpoint
from layerprune.checkpoint.opened import INDEX


@contextmanager
def loadable(checkpoint: Checkpoint) -> Iterator[Path]:
    """Yield the checkpoint's folder, or one of links in which the index lists no file that was not fetched.

    What such a folder lacks are tensors of removed layers: transformers makes some up, and the bypass asks none.
    """
    if not checkpoint.absent:
        yield checkpoint.path
        return
    with TemporaryDirectory(prefix="layerprune-base-") as name:
        folder = Path(name)
        for path in checkpoint.path.iterdir():
            if path.name != INDEX:
                (folder / path.name).symlink_to(path.resolve())
        files = {tensor.name: tensor.file for tensor in checkpoint.tensors.values()}
        root = checkpoint.path
        here = {name: file.relative_to(root).as_posix() for name, file in files.items() if isinstance(file, Path)}
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": here}))
        yield folder
