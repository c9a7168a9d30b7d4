"""Where a training run stands, on disk: the weights it trains, the optimiser's moments, the curve so far.

A state is a folder that is renamed into place when it is complete: a run killed at any moment finds a whole one.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from layerprune.artifacts import LossPoint
from layerprune.errors import DocumentError, one_line
from layerprune.files import writing

Weights = Mapping[str, nn.Parameter]

SAMPLE = 1024  # elements of each weight that tell one model from another
WEIGHTS, OPTIMIZER, STANDING = "weights.safetensors", "optimizer.pt", "standing.json"


@dataclass
class TrainingState:
    """How far a run has come, in plain figures."""

    step: int = 0  # steps done
    tokens: int = 0
    seconds: float = 0.0  # of training, over all sittings
    curve: list[LossPoint] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)  # of the steps since the last measurement
    best: float | None = None  # lowest held-out loss so far, nats per token
    best_step: int = 0
    worse: int = 0  # measurements since the best one
    stopped: bool = False  # early, by the held-out loss

    def as_json(self) -> str:
        return json.dumps({**asdict(self), "curve": [point.model_dump() for point in self.curve]}, allow_nan=False)

    @classmethod
    def of_json(cls, text: str) -> TrainingState:
        content = json.loads(text)
        return cls(**{**content, "curve": [LossPoint(**point) for point in content["curve"]]})


def key_of(settings: Mapping[str, Any], goal: str, arrays: Iterable[np.ndarray[Any, Any]], weights: Weights) -> str:
    """Return a hash of all that decides what a run ends in; runs with different ones keep apart."""
    digest = hashlib.sha256(json.dumps([settings, goal], sort_keys=True).encode())
    for array in arrays:
        digest.update(np.ascontiguousarray(array).tobytes())
    for name, weight in weights.items():
        digest.update(f"{name} {tuple(weight.shape)}".encode())
        digest.update(weight.detach().cpu().flatten()[:SAMPLE].contiguous().numpy().tobytes())
    return digest.hexdigest()


class TrainingStates:
    """The states of one run in one folder: the last one, and the best weights by the held-out loss."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def last(self) -> Path:
        return self.folder / "last"

    @property
    def best(self) -> Path:
        return self.folder / "best"

    def save(self, standing: TrainingState, weights: Weights, optimizer: torch.optim.Optimizer) -> None:
        """Replace the last state."""
        with _replacing(self.last) as folder:
            _write_weights(weights, folder / WEIGHTS)
            # into a file of Python's: torch's own writer does not say that a disk is full
            with writing(folder / OPTIMIZER, RuntimeError), (folder / OPTIMIZER).open("wb") as file:
                torch.save(optimizer.state_dict(), file)
            with writing(folder / STANDING):
                (folder / STANDING).write_text(standing.as_json(), encoding="utf-8")

    def keep_best(self, weights: Weights) -> None:
        """Keep these weights as the best so far."""
        with _replacing(self.best) as folder:
            _write_weights(weights, folder / WEIGHTS)

    def standing(self) -> TrainingState | None:
        """Return where the run stood, None for a run that has not begun; ``DocumentError`` for a damaged state."""
        path = self._whole(self.last) / STANDING
        if not path.is_file():
            return None
        try:
            return TrainingState.of_json(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise DocumentError(f"{path} is damaged ({one_line(error)}); remove {self.folder} to begin anew") from error

    def restore(self, weights: Weights, optimizer: torch.optim.Optimizer) -> None:
        """Put the last state's weights and moments in place."""
        _read_weights(weights, self._whole(self.last) / WEIGHTS)
        optimizer.load_state_dict(torch.load(self.last / OPTIMIZER, map_location="cpu", weights_only=True))

    def restore_best(self, weights: Weights) -> None:
        """Put the best weights in place."""
        _read_weights(weights, self._whole(self.best) / WEIGHTS)

    def _whole(self, folder: Path) -> Path:
        """Finish a replacement that was cut off between its two renames."""
        old = _old(folder)
        if not folder.exists() and old.exists():
            old.rename(folder)
        return folder


class _replacing:
    """A folder to write into that takes the place of ``target`` when the block ends well."""

    def __init__(self, target: Path) -> None:
        self.target, self.fresh = target, target.with_name(target.name + ".partial")

    def __enter__(self) -> Path:
        shutil.rmtree(self.fresh, ignore_errors=True)
        with writing(self.fresh):
            self.fresh.mkdir(parents=True)
        return self.fresh

    def __exit__(self, kind: Any, *rest: Any) -> None:
        if kind is not None:
            shutil.rmtree(self.fresh, ignore_errors=True)
            return
        from layerprune.checkpoint.writer import flush_to_disk

        try:
            for path in self.fresh.iterdir():
                flush_to_disk(path)
        except BaseException:
            shutil.rmtree(self.fresh, ignore_errors=True)
            raise
        old = _old(self.target)
        if self.target.exists():
            shutil.rmtree(old, ignore_errors=True)
            self.target.rename(old)
        self.fresh.rename(self.target)
        shutil.rmtree(old, ignore_errors=True)


def _old(folder: Path) -> Path:
    return folder.with_name(folder.name + ".old")


def _write_weights(weights: Weights, path: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with writing(path, SafetensorError):
        save_file({name: weight.detach().cpu().contiguous() for name, weight in weights.items()}, path)


def _read_weights(weights: Weights, path: Path) -> None:
    from safetensors.torch import load_file

    saved = load_file(path)
    with torch.no_grad():
        for name, weight in weights.items():
            weight.copy_(saved[name])
