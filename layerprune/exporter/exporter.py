"""``export``: list the jobs, validate them all, write, check, prove, publish."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from layerprune.architecture import LayerMap, load_config, read_architecture
from layerprune.artifacts import Earlier, FileEntry, ModelRef, Plan, PlanLimits, Receipt, as_removal
from layerprune.checkpoint import (
    Checkpoint,
    Folder,
    contained,
    fetch,
    fetch_documents,
    locate,
    new_folder,
    plan_shards,
    try_new_folder,
    write_shards,
)
from layerprune.checkpoint.companions import left_out
from layerprune.checkpoint.location import record, reference, source_of
from layerprune.checkpoint.safetensors import INDEX
from layerprune.checkpoint.writer import Shard, entry_of, following, write_file
from layerprune.errors import CheckpointError, DocumentError, ExportError, UsageError
from layerprune.exporter.contents import (
    Extras,
    Weight,
    WeightPlan,
    config_changes,
    find_disk_stack,
    plan_extras,
    plan_weights,
    read_json,
)
from layerprune.exporter.proof import prove
from layerprune.exporter.pruned_config import PrunedConfig, layer_sizes, pruned_config
from layerprune.files import check_plain
from layerprune.removal import Removal, parse_layers
from layerprune.util import SILENT, Progress, tool_versions

SPARE_BYTES = 64 * 2**20  # left free on the disk beside the weights: tokenizer, documents, file-system overhead
FOLDER = "layerprune"  # of the documents, inside the exported folder
CHANGED = "the base was pruned before, and its weights were changed by other tools since: what they did is not known"


@dataclass(frozen=True)
class ExportJob:
    """Everything that is going to happen, decided and validated before the first byte is written."""

    plan: Plan
    base: Folder
    checkpoint: Checkpoint
    pruned_config: PrunedConfig
    removal: Removal
    sources: LayerMap
    old_config: dict[str, Any]
    weights: WeightPlan
    shards: tuple[Shard, ...]
    extras: Extras
    earlier: Earlier | None  # the round of pruning that the base came from
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
    (default 5 GB). The model is never built to write it: tensors are copied as byte ranges, and what needs torch runs
    in processes of its own before the copy and after it (``apart``). At last the folder is loaded, compared with the
    base with the removed layers bypassed, and only then given its name; on any failure nothing is left. Raises
    ``DocumentError`` when the base is not the plan's model, ``RefusedError`` when the removal cannot be represented
    exactly, ``CheckpointError`` for a damaged base and ``ExportError`` when writing fails.
    """
    out = Path(out).absolute()
    source = source_of(plan.model, base)
    try_new_folder(out, source[0])
    job = _plan_job(plan, source, max_shard_size, trust_remote_code, progress)
    _check_space(job, out)
    _tell(job.extras, progress)
    with new_folder(out) as partial:
        hashes = _write(job, partial, progress)
        return _finish(job, partial, out, hashes, progress)


def removal_plan(
    model: str,
    layers: str,
    *,
    revision: str | None = None,
    progress: Progress = SILENT,
    trust_remote_code: bool = False,
) -> Plan:
    """Return the plan that removes exactly ``layers`` of ``model``: ``"21-24"`` or ``"3,-1"``; no metric, no items.

    ``model`` is a local folder or a Hub id. Only its config and the headers and samples of its weights are read. Raises
    ``UsageError`` for layers that the model does not have or of which none would stay, ``RefusedError`` for a removal
    that cannot be represented exactly and ``ModelError`` for a model that is not found.
    """
    folder = locate(model, revision)
    checkpoint = folder.open()
    with progress.task("reading the model", None):
        drawn = pruned_config(
            folder.path, Removal(()), checkpoint=checkpoint, name=folder.id, trust_remote_code=trust_remote_code
        )
    named = parse_layers(layers, drawn.depth, "--remove")
    if not named:
        raise UsageError(f"--remove {layers!r} names no layer; write 3,7 or 21-24")
    if len(named) == drawn.depth:
        raise UsageError(f"--remove {layers!r}: all {drawn.depth} layers would go, and at least one stays")
    units = tuple(sorted(named))
    return Plan(
        model=reference(
            folder, checkpoint, model_type=drawn.model_type, layers=drawn.depth, parameters=drawn.parameters[0]
        ),
        metric=None, search=None, limits=PlanLimits(), requested=f"--remove {layers}", removal=units, order=units,
        ranking=(), scores_sha256=None, data=(), seed=0, versions=tool_versions("torch", "transformers", "safetensors"),
    )  # fmt: skip


def _plan_job(
    plan: Plan, base: tuple[str, str | None], max_shard_size: int | None, trust_remote_code: bool, progress: Progress
) -> ExportJob:
    folder = locate(*base, shards=False)
    checkpoint = folder.open()
    removal = as_removal(plan.removal)
    with progress.task("checking that the removal can be written down", None):
        drawn = pruned_config(
            folder.path, removal, checkpoint=checkpoint, name=folder.id, trust_remote_code=trust_remote_code
        )
    _check_planned(plan, folder, f"{plan.model.parameters} parameters", f"{drawn.parameters[0]} parameters")
    sources = LayerMap.after(removal, drawn.depth)
    weights = _plan_weights(checkpoint, drawn, sources)
    needed = {checkpoint.tensors[name].file for name in weights.origin.values()} & set(checkpoint.absent)
    if needed:
        with progress.task(f"fetching {len(needed)} of {len(checkpoint.files)} weight files", None):
            fetch(folder, needed)
        checkpoint = folder.open()
        weights = _plan_weights(checkpoint, drawn, sources)
    found = reference(
        folder, checkpoint, model_type=drawn.model_type, layers=drawn.depth, parameters=drawn.parameters[0]
    )
    _check_planned(plan, folder, f"weights {plan.model.fingerprint}", f"weights {found.fingerprint}")
    fetch_documents(folder)
    earlier = _earlier(folder.path, plan.model)
    if earlier is not None and earlier.changed:
        progress.note(CHANGED)
    return ExportJob(
        plan=plan, base=folder, checkpoint=checkpoint, pruned_config=drawn, removal=removal, sources=sources,
        old_config=read_json(contained(folder.path, "config.json")), weights=weights,
        shards=tuple(plan_shards(weights.parts, max_shard_size)),
        extras=plan_extras(folder.path, checkpoint.names, drawn.rules(sources, checkpoint), sources),
        earlier=earlier, trust_remote_code=trust_remote_code,
    )  # fmt: skip


def _earlier(base: Path, model: ModelRef) -> Earlier | None:
    """Return the round of pruning that left the base; None where no export wrote it.

    Raises ``CheckpointError`` where its documents are links or special files, ``DocumentError`` where they contradict
    each other or are not those that its card names.
    """
    from layerprune.report.card import OURS, unlike_the_card

    check_plain(base, [name for name in OURS if name.startswith(f"{FOLDER}/")])
    earlier = Earlier.read(base / FOLDER, model)
    if earlier is None or _readable_card(base, SILENT) is None:  # such a card is told of when the new one is written
        return earlier
    for fault in unlike_the_card(base, earlier.plan, earlier.receipt, earlier.heal, earlier.audit):
        raise DocumentError(f"{base}: {fault}; put it back, or take the folder {FOLDER} away")
    return earlier


def _check_planned(plan: Plan, folder: Folder, planned: str, found: str) -> None:
    if found != planned:
        raise DocumentError(
            f"the plan is for {plan.model.id} with {planned[:27]}, but {folder.path} holds {found[:27]}; "
            "make a plan for this model or name its base"
        )


def _plan_weights(checkpoint: Checkpoint, drawn: PrunedConfig, sources: LayerMap) -> WeightPlan:
    stack = find_disk_stack(checkpoint, drawn.stack, drawn.sizes)
    return plan_weights(checkpoint, stack, sources)


def _check_space(job: ExportJob, out: Path) -> None:
    needed = sum(part.nbytes for part in job.weights.parts) + SPARE_BYTES
    place = next(folder for folder in out.parents if folder.exists())
    free = shutil.disk_usage(place).free
    if free < needed:
        raise ExportError(f"{place} has {free / 1e9:.1f} GB free, and the pruned model takes {needed / 1e9:.1f} GB")


def _write(job: ExportJob, folder: Path, progress: Progress) -> dict[str, FileEntry]:
    """Write weights, config and the files carried along; return the hash of each."""
    metadata = {"format": "pt", **job.checkpoint.metadata}
    with following([folder / shard.filename for shard in job.shards]) as followed:
        for name in write_shards(folder, job.shards, metadata, progress):
            if name != INDEX:  # which is written at once, and flushed
                followed.complete(folder / name)
        for name in job.extras.copied:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            write_file(folder / name, (job.base.path / name).read_bytes())
        for name, content in job.extras.rewritten.items():
            write_file(folder / name, content)
        config = json.dumps(job.pruned_config.config, indent=2, ensure_ascii=False) + "\n"
        write_file(folder / "config.json", config.encode())
        shards = {path.name: entry for path, entry in followed.entries().items()}
    entries = {name: entry_of(folder / name) for name in _files(folder) if name not in shards} | shards
    return dict(sorted(entries.items()))


def _tell(extras: Extras, progress: Progress) -> None:
    """Say which files are left behind, which are rewritten, and why."""
    for note in [*extras.notes, *([left_out(extras.dropped)] if extras.dropped else [])]:
        progress.note(note)
    for field, change in extras.changes.items():
        progress.note(f"{field} {change.before} is {'left out' if change.after is None else change.after} now")


def _files(folder: Path) -> Iterator[str]:
    return (path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file())


def _finish(job: ExportJob, folder: Path, out: Path, hashes: dict[str, FileEntry], progress: Progress) -> Receipt:
    """Check and prove what was written, and add the documents and the card."""
    from layerprune.report.card import write_card

    written = Checkpoint.open(folder)
    with progress.task("comparing logits with the base", None):
        proven = prove(job.checkpoint, folder, job.removal, trust_remote_code=job.trust_remote_code)
    receipt = Receipt(
        base=job.plan.model,
        result=ModelRef(
            id=out.name, revision=None, fingerprint=written.fingerprint(), model_type=job.pruned_config.model_type,
            layers=len(job.sources), parameters=job.pruned_config.parameters[1],
        ),
        removal=job.plan.removal,
        plan_sha256=job.plan.sha256(),
        files=hashes,
        dropped_tensors=len(job.weights.dropped),
        dropped_files=job.extras.dropped,
        bytes_before=job.checkpoint.nbytes,
        bytes_after=written.nbytes,
        config_changes=config_changes(job.old_config, job.pruned_config.config) | job.extras.changes,
        missing_keys=proven.loaded.missing,
        unexpected_keys=proven.loaded.unexpected,
        proof=proven.logits,
        notes=(*proven.notes, *([CHANGED] if job.earlier and job.earlier.changed else [])),
        dropped_heads=job.weights.heads,
        earlier=job.earlier,
        versions=tool_versions("torch", "transformers", "safetensors"),
    )  # fmt: skip
    job.plan.save(folder / FOLDER / Plan.filename)
    receipt.save(folder / FOLDER / Receipt.filename)
    record(folder / FOLDER, job.plan.model)
    write_card(folder, _readable_card(job.base.path, progress))
    return receipt


def _readable_card(base: Path, progress: Progress) -> Path | None:
    """Return the base's folder, None where its card cannot be read: what is exported does not hang on it."""
    from layerprune.report.card import read_card

    try:
        read_card(base / "README.md")
    except (CheckpointError, DocumentError) as error:
        progress.note(f"{error}; the new card says nothing of the base's licence and language, add them by hand")
        return None
    return base


# What export would write, in parameters and bytes, without writing it.


def weigh(folder: Path, removals: Sequence[Removal], *, trust_remote_code: bool = False) -> list[Weight]:
    """Return the size each removal leaves; from headers alone, whether or not export would refuse it."""
    checkpoint = Checkpoint.open(folder)
    config = load_config(str(folder), trust_remote_code=trust_remote_code)
    architecture = read_architecture(config, trust_remote_code=trust_remote_code)
    stack = find_disk_stack(checkpoint, architecture.stack, layer_sizes(config, architecture.stack, trust_remote_code))
    weights = []
    for removal in removals:
        sources = LayerMap.after(removal, architecture.depth)
        planned = plan_weights(checkpoint, stack, sources)
        weights.append(
            Weight(architecture.parameters(removal), sum(part.nbytes for part in planned.parts), planned.heads)
        )
    return weights
