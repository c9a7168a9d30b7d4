"""The checks after writing: whole models where they fit and run, else tiny ones with the same layers."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from layerprune.anatomy import load_config, read_anatomy
from layerprune.checkpoint import Checkpoint
from layerprune.documents import LogitsProof
from layerprune.exporter import proof
from layerprune.exporter.apart import apart
from layerprune.exporter.configs import read_json
from layerprune.exporter.fetched import loadable
from layerprune.exporter.twin import prove_on_twin
from layerprune.removal import Removal

MEMORY_FACTOR = 1.2  # of a model's bytes on disk: what loading and running it on short windows takes


@dataclass(frozen=True)
class Proven:
    """The outcome of the checks after writing."""

    logits: LogitsProof
    loaded: proof.Loaded
    notes: tuple[str, ...]


def prove(base: Checkpoint, result: Path, removal: Removal, *, trust_remote_code: bool = False) -> Proven:
    """Compare the written checkpoint with the base without the removed layers; the notes say what was not compared.

    Raises ``ExportError`` when they differ or a key does not fit.
    """
    with loadable(base) as folder:
        told = apart(
            compare, base=str(folder), result=str(result), nbytes=base.nbytes, layers=list(removal.layers),
            trust_remote_code=trust_remote_code,
        )  # fmt: skip
    keys = {name: tuple(value) for name, value in told["loaded"].items()}
    notes = [*told["notes"]]
    if base.absent:
        notes.append(
            f"{len(base.absent)} of the base's {len(base.files)} weight files hold only what is removed: they were "
            "sampled by byte ranges for the fingerprint, and not fetched"
        )
    return Proven(LogitsProof.model_validate(told["logits"]), proof.Loaded(**keys), tuple(notes))


def compare(base: str, result: str, nbytes: int, layers: list[int], trust_remote_code: bool) -> dict[str, Any]:
    """Load and compare; arguments and result as JSON has them, so that it can run in another process.

    ``nbytes`` is what the base's weights take.
    """
    found = _compared(Path(base), Path(result), nbytes, Removal.from_layers(layers), trust_remote_code)
    loaded = dataclasses.asdict(found.loaded)
    return {"logits": found.logits.model_dump(mode="json"), "loaded": loaded, "notes": list(found.notes)}


def _compared(base: Path, result: Path, nbytes: int, removal: Removal, trust_remote_code: bool) -> Proven:
    import psutil

    config = load_config(str(base), trust_remote_code=trust_remote_code)
    anatomy = read_anatomy(config, trust_remote_code=trust_remote_code)
    quantised = "quantization_config" in read_json(result / "config.json")
    needed, free = nbytes * MEMORY_FACTOR, psutil.virtual_memory().available
    if needed > free:
        reason = f"the model takes {needed / 1e9:.1f} GB of memory and {free / 1e9:.1f} GB are free"
    else:
        try:
            logits, loaded = proof.prove(base, result, anatomy, removal, trust_remote_code=trust_remote_code)
        except proof.CannotLoadError as error:
            if not quantised:
                raise
            reason = f"this machine cannot run the quantised model: {error}"
        else:
            return Proven(logits, loaded, ())
    notes = (f"whole models were not compared: {reason}",)
    if not quantised:
        _, loaded = proof.load(result, trust_remote_code=trust_remote_code, device="meta")
        proof.check_keys(loaded, proof.load(base, trust_remote_code=trust_remote_code, device="meta")[1])
    else:
        loaded = proof.Loaded()
        notes += ("keys were not checked by loading: only the names on disk were",)
    return Proven(prove_on_twin(config, anatomy, removal, trust_remote_code=trust_remote_code), loaded, notes)
