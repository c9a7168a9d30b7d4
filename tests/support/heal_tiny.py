"""What tests of healing stand on: a tiny pruned checkpoint, prose to read, and a method that is easy to check."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path

import audit_tiny
import families
from layerprune.exporter import export
from layerprune.healing.base import Healer, StoredWeights
from layerprune.removal import Removal

WORDS = ("river", "stone", "moves", "slowly", "under", "bright", "winter", "light", "and", "carries", "grain")


@dataclass(frozen=True)
class Scaling(Healer):
    """Multiplies one parameter by a factor."""

    factor: float = field(default=2.0, metadata={"help": "what the weights are multiplied by"})
    parameter: str = "model.layers.0.mlp.down_proj.weight"
    needs = ()
    cost = "none"
    source = "a test"

    def heal(self, case):
        loaded = case.load_model()
        stored = StoredWeights.of(loaded.model, case.folder, [self.parameter])
        case.record.found["factor"] = self.factor
        yield from stored.changed(self.parameter, loaded.model.get_parameter(self.parameter) * self.factor)


def prose(path: Path, documents: int = 60, words: int = 60, seed: int = 0) -> Path:
    """Write random prose as paragraphs."""
    rng = random.Random(seed)
    path.write_text("\n\n".join(" ".join(rng.choices(WORDS, k=words)) + "." for _ in range(documents)) + "\n")
    return path


def pruned(home: Path, *layers: int) -> Path:
    """Return a checkpoint exported from the tiny six-layer llama in ``home/base``; what is not there is made."""
    base, out = home / "base", home / ("pruned-" + "-".join(map(str, layers)))
    if not base.exists():
        audit_tiny.base_model(base)
    if not out.exists():
        export(families.make_plan(base, Removal.of(*layers)), out)
    return out
