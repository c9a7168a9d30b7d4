"""``export``: list the jobs, validate them all, write, check, prove, publish."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layerprune import __version__
from layerprune.anatomy import Anatomy, Sources, build_on_meta, halves, load_config, read_anatomy
from layerprune.checkpoint import Checkpoint, Folder, contained, locate, new_folder, plan_shards, write_shards
from layerprune.checkpoint.writer import Shard, flush_to_disk, write_file
from layerprune.documents import FileEntry, LogitsProof, ModelRef, Plan, Receipt, as_removal
from layerprune.errors import DocumentError, ExportError
from layerprune.export import proof
from layerprune.export.configs import config_changes, read_json, rebuilt
from layerprune.export.extras import Extras, layer_renumberer, plan_extras
from layerprune.export.signature import check_signature
from layerprune.export.twin import prove_on_twin
from layerprune.export.weights import DiskStack, HalfOf, WeightPlan, find_disk_stack, plan_weights
from layerprune.progress import SILENT, Progress
from layerprune.removal import Removal

if TYPE_CHECKING:
    from transformers import PretrainedConfig

SPARE_BYTES = 64 * 2**20  # left free on the disk beside the weights: tokenizer, documents, file-system overhead
MEMORY_FACTOR = 1.2  # of a model's bytes on disk: what loading and running it on short windows takes
FOLDER = "layerprune"  # of the documents, inside the exported folder


@dataclass(frozen=True)
class Proven:
    """The outcome of the checks after writing."""

    logits: LogitsProof
    loaded: proof.Loaded
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Job:
    """Everything that is going to happen, decided and validated before the first byte is written."""

    plan: Plan
    base: Folder
    checkpoint: Checkpoint
    config: PretrainedConfig
    anatomy: Anatomy
    removal: Removal
    sources: Sources
    old_config: dict[str, Any]
    new_config: dict[str, Any]
    weights: WeightPlan
    shards: tuple[Shard, ...]
    extras: Extras
    trust_remote_code: bool


def export(
    plan: Plan,
    out: Path,
    *,
    base: str | None = None,
    max_shard_size: int | None = None,
    progress: Progress = SILENT,
    trust_remote_code: bool = False,
) -> Receipt:
    """Write the pruned checkpoint to the new folder ``out`` and return its receipt.

    ``base`` is where the base model is, when not where the plan says. ``max_shard_size`` is in bytes of tensor data
    (default 5 GB). The model is never built to write it: tensors are copied as byte ranges. Afterwards the folder is
    loaded, compared with the base with the removed layers bypassed, and only then given its name; on any failure
    nothing is left. Raises ``DocumentError`` when the base is not the plan's model, ``RefusedError`` when the removal
    cannot be represented exactly, ``CheckpointError`` for a damaged base and ``ExportError`` when writing fails.
    """
    out = Path(out).absolute()
    if out.exists():
        raise ExportError(f"{out} exists already; choose a new folder or remove it")
    job = _plan_job(plan, base, max_shard_size, trust_remote_code)
    _check_space(job, out)
    with new_folder(out) as partial:
        hashes = _write(job, partial, progress)
        return _finish(job, partial, out, hashes, progress)


def rehearse(folder: Path, removal: Removal, *, trust_remote_code: bool = False) -> None:
    """Raise ``RefusedError`` where ``export`` would refuse the removal before writing; seconds, no weights are read.

    Beyond ``Anatomy.check`` this builds base and result on the meta device and compares their layers.
    """
    config = load_config(str(folder), trust_remote_code=trust_remote_code)
    anatomy = read_anatomy(config, trust_remote_code=trust_remote_code)
    new = anatomy.prune_config(read_json(contained(folder, "config.json")), removal)
    sources = Sources.after(removal, anatomy.depth)
    check_signature(anatomy, config, rebuilt(config, new), sources, trust_remote_code=trust_remote_code)


def _plan_job(plan: Plan, base: str | None, max_shard_size: int | None, trust_remote_code: bool) -> Job:
    folder = locate(base) if base is not None else locate(plan.model.id, plan.model.revision)
    checkpoint = Checkpoint.open(folder.path)
    fingerprint = checkpoint.fingerprint()
    if fingerprint != plan.model.fingerprint:
        raise DocumentError(
            f"the plan is for {plan.model.id} with weights {plan.model.fingerprint[:19]}…, but {folder.path} holds "
            f"{fingerprint[:19]}…; make a plan for this model or name its base"
        )
    config = load_config(str(folder.path), trust_remote_code=trust_remote_code)
    anatomy = read_anatomy(config, trust_remote_code=trust_remote_code)
    removal = as_removal(plan.removal)
    sources = Sources.after(removal, anatomy.depth)
    old = read_json(contained(folder.path, "config.json"))
    new = anatomy.prune_config(old, removal)
    renumber = layer_renumberer(anatomy.stack, sources)
    if "quantization_config" in new:
        new["quantization_config"] = renumber(new["quantization_config"])
    check_signature(anatomy, config, rebuilt(config, new), sources, trust_remote_code=trust_remote_code)
    weights = _plan_weights(checkpoint, anatomy, config, sources, trust_remote_code)
    shards = plan_shards(weights.parts, max_shard_size)
    names = {file.relative_to(folder.path).as_posix() for file in checkpoint.files}
    extras = plan_extras(folder.path, names, renumber)
    return Job(
        plan=plan, base=folder, checkpoint=checkpoint, config=config, anatomy=anatomy, removal=removal,
        sources=sources, old_config=old, new_config=new, weights=weights, shards=tuple(shards), extras=extras,
        trust_remote_code=trust_remote_code,
    )  # fmt: skip


def _plan_weights(
    checkpoint: Checkpoint, anatomy: Anatomy, config: PretrainedConfig, sources: Sources, trust_remote_code: bool
) -> WeightPlan:
    layers = build_on_meta(config, trust_remote_code=trust_remote_code).get_submodule(anatomy.stack).children()
    sizes = [sum(value.numel() for value in layer.state_dict().values()) for layer in layers]
    stack = find_disk_stack(checkpoint, anatomy.stack, sizes)
    return plan_weights(checkpoint, stack, sources, half_of=_half_of(checkpoint, stack, sources))


def _half_of(checkpoint: Checkpoint, stack: DiskStack, sources: Sources) -> HalfOf:
    """Return the function that tells a layer's attention tensors from its MLP's, by the names on disk."""
    if sources.whole:
        return lambda rest: "attention"
    places = [stack.split(name) for name in checkpoint.tensors]
    children: dict[int, set[str]] = {}
    for layer, rest in (place for place in places if place is not None and place[0] < stack.depth):
        children.setdefault(layer, set()).add(rest.partition(".")[0])
    half = {child: which for names in children.values() for child, which in halves.split(names).half.items()}
    return lambda rest: half[rest.partition(".")[0]]


def _check_space(job: Job, out: Path) -> None:
    needed = sum(part.nbytes for part in job.weights.parts) + SPARE_BYTES
    place = next(folder for folder in out.parents if folder.exists())
    free = shutil.disk_usage(place).free
    if free < needed:
        raise ExportError(f"{place} has {free / 1e9:.1f} GB free, and the pruned model takes {needed / 1e9:.1f} GB")


def _write(job: Job, folder: Path, progress: Progress) -> dict[str, FileEntry]:
    """Write weights, config and the files carried along; return the hash of each."""
    metadata = {"format": "pt", **job.checkpoint.metadata}
    with ThreadPoolExecutor(1) as hasher:  # hashes and flushes each finished shard while the next is written
        hashes = {}
        for shard in write_shards(folder, job.shards, metadata, progress):
            hashes[shard] = hasher.submit(_entry, folder / shard)
        for name in job.extras.copied:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            write_file(folder / name, (job.base.path / name).read_bytes())
        for name, content in job.extras.rewritten.items():
            write_file(folder / name, content)
        write_file(folder / "config.json", (json.dumps(job.new_config, indent=2, ensure_ascii=False) + "\n").encode())
        small = [name for name in _files(folder) if name not in hashes]
        entries = {name: _entry(folder / name) for name in small}
        entries.update({name: future.result() for name, future in hashes.items()})
    return dict(sorted(entries.items()))


def _files(folder: Path) -> Iterator[str]:
    return (path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file())


def _entry(path: Path) -> FileEntry:
    with path.open("rb") as file:  # out of the page cache, before the flush lets it go
        digest = hashlib.file_digest(file, "sha256")
    flush_to_disk(path)
    return FileEntry(sha256=digest.hexdigest(), bytes=path.stat().st_size)


def _finish(job: Job, folder: Path, out: Path, hashes: dict[str, FileEntry], progress: Progress) -> Receipt:
    """Check and prove what was written, and add the documents and the card."""
    from layerprune.report.card import write_card

    written = Checkpoint.open(folder)
    with progress.task("comparing logits with the base", None):
        proven = prove(job, folder)
    receipt = Receipt(
        base=job.plan.model,
        result=ModelRef(
            id=out.name, revision=None, fingerprint=written.fingerprint(), model_type=job.anatomy.model_type,
            layers=len(job.sources), parameters=written.parameters,
        ),
        removal=job.plan.removal,
        plan_sha256=job.plan.sha256(),
        files=hashes,
        dropped_tensors=len(job.weights.dropped),
        dropped_files=job.extras.dropped,
        bytes_before=job.checkpoint.nbytes,
        bytes_after=written.nbytes,
        config_changes=config_changes(job.old_config, job.new_config),
        missing_keys=proven.loaded.missing,
        unexpected_keys=proven.loaded.unexpected,
        proof=proven.logits,
        notes=proven.notes,
        versions=_versions(),
    )  # fmt: skip
    job.plan.save(folder / FOLDER / Plan.filename)
    receipt.save(folder / FOLDER / Receipt.filename)
    write_card(folder, job.base.path)
    return receipt


def prove(job: Job, folder: Path) -> Proven:
    """Compare whole models where they fit and run, else tiny ones with the same layers; the notes say why."""
    import psutil

    quantised = "quantization_config" in job.new_config
    needed, free = job.checkpoint.nbytes * MEMORY_FACTOR, psutil.virtual_memory().available
    if needed > free:
        reason = f"the model takes {needed / 1e9:.1f} GB of memory and {free / 1e9:.1f} GB are free"
    else:
        try:
            logits, loaded = proof.prove(
                job.base.path, folder, job.anatomy, proof.bypasser(job.anatomy, job.removal),
                trust_remote_code=job.trust_remote_code,
            )  # fmt: skip
        except proof.CannotLoadError as error:
            if not quantised:
                raise
            reason = f"this machine cannot run the quantised model: {error}"
        else:
            return Proven(logits, loaded, ())
    notes = (f"whole models were not compared: {reason}",)
    if not quantised:
        _, loaded = proof.load(folder, trust_remote_code=job.trust_remote_code, device="meta")
        proof.check_keys(loaded, proof.load(job.base.path, trust_remote_code=job.trust_remote_code, device="meta")[1])
    else:
        loaded = proof.Loaded()
        notes += ("keys were not checked by loading: only the names on disk were",)
    twin = prove_on_twin(job.config, job.anatomy, job.removal, trust_remote_code=job.trust_remote_code)
    return Proven(twin, loaded, notes)


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {"layerprune": __version__, **{name: version(name) for name in ("torch", "transformers", "safetensors")}}
