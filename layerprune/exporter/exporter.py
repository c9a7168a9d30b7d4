"""``export``: read and validate, write, check, prove, publish."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from layerprune.artifacts import Earlier, FileEntry, ModelRef, Plan, PlanLimits, Receipt, as_removal
from layerprune.artifacts.base import write_atomically
from layerprune.checkpoint import Checkpoint, Folder, contained, fetch, fetch_documents, locate, writer
from layerprune.checkpoint.companions import left_out
from layerprune.checkpoint.location import record, reference, source_of
from layerprune.checkpoint.safetensors import INDEX
from layerprune.errors import CheckpointError, DocumentError, ExportError, UsageError
from layerprune.exporter import contents, interchange
from layerprune.exporter.contents import Extras, PrunedConfig, Weight, WeightPlan
from layerprune.files import check_plain
from layerprune.removal import LayerMap, Removal, parse_layers
from layerprune.report.card import OURS, own_code, read_card, unlike_the_card, write_card
from layerprune.util import SILENT, Progress, apart, tool_versions

SPARE_BYTES = 64 * 2**20  # left free on the disk beside the weights: tokenizer, documents, file-system overhead
FOLDER = "layerprune"  # of the documents, inside the exported folder
CHANGED = "the base was pruned before, and its weights were changed by other tools since: what they did is not known"
TOOLS = ("torch", "transformers", "safetensors")


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
    writer.try_new_folder(out, source[0])

    # everything that is going to happen, decided and validated before the first byte is written
    folder = locate(*source, shards=False)
    checkpoint = folder.open()
    removal = as_removal(plan.removal)
    with progress.task("checking that the removal can be written down", None):
        pruned = contents.pruned_config(
            folder.path, removal, checkpoint=checkpoint, name=folder.id, trust_remote_code=trust_remote_code
        )
    _check_planned(plan, folder, f"{plan.model.layers} layers", f"{pruned.sources.depth} layers")
    _check_planned(plan, folder, f"{plan.model.parameters} parameters", f"{pruned.parameters[0]} parameters")
    checkpoint, weights = _fetched(folder, checkpoint, pruned, progress)
    found = _reference(folder, checkpoint, pruned)
    _check_planned(plan, folder, f"weights {plan.model.fingerprint}", f"weights {found.fingerprint}")
    fetch_documents(folder)
    earlier = _earlier(folder.path, plan.model)
    changed = [CHANGED] if earlier is not None and earlier.changed else []
    for note in changed:
        progress.note(note)
    given = [f"the layers were given ({plan.requested}): nothing was measured"] if plan.metric is None else []
    old_config = contents.read_json(contained(folder.path, "config.json"))
    shards = writer.plan_shards(weights.parts, max_shard_size)
    extras = contents.plan_extras(folder.path, checkpoint, pruned)
    own_code(folder.path)  # which the card will ask for: a file that cannot be read is told of now
    _check_space(weights, out)
    for note in _remarks(extras):
        progress.note(note)

    with writer.new_folder(out) as partial:
        files = _write(partial, shards, checkpoint.metadata, folder.path, extras, progress)
        written = Checkpoint.open(partial)
        with progress.task("comparing logits with the base", None):
            proven = prove(checkpoint, partial, removal, trust_remote_code=trust_remote_code)
        receipt = Receipt(
            base=plan.model,
            result=ModelRef(
                id=out.name, revision=None, fingerprint=written.fingerprint(), model_type=pruned.model_type,
                layers=len(pruned.sources), parameters=pruned.parameters[1],
            ),
            removal=plan.removal, plan_sha256=plan.sha256(), files=files,
            dropped_tensors=sum(name is None for name in weights.names.values()), dropped_files=extras.dropped,
            bytes_before=checkpoint.nbytes, bytes_after=written.nbytes,
            config_changes=contents.config_changes(old_config, pruned.config) | extras.changes,
            missing_keys=proven["missing_keys"], unexpected_keys=proven["unexpected_keys"], proof=proven["proof"],
            notes=(*proven["notes"], *changed, *given), dropped_heads=weights.heads, earlier=earlier,
            versions=tool_versions(*TOOLS),
        )  # fmt: skip
        plan.save(partial / FOLDER / Plan.filename)
        receipt.save(partial / FOLDER / Receipt.filename)
        record(partial / FOLDER, plan.model)
        write_card(partial, _readable_card(folder.path, progress))
    return receipt


def _check_planned(plan: Plan, folder: Folder, planned: str, found: str) -> None:
    if found != planned:
        raise DocumentError(
            f"the plan is for {plan.model.id} with {planned[:27]}, but {folder.path} holds {found[:27]}; "
            "make a plan for this model or name its base"
        )


def _fetched(
    folder: Folder, checkpoint: Checkpoint, pruned: PrunedConfig, progress: Progress
) -> tuple[Checkpoint, WeightPlan]:
    """Fetch those of a Hub model's weight files that hold something to write; return checkpoint and plan with them."""
    weights = pruned.plan_weights(checkpoint)
    kept = {checkpoint.tensors[name].file for name, new in weights.names.items() if new is not None}
    needed = kept & set(checkpoint.absent)
    if not needed:
        return checkpoint, weights
    with progress.task(f"fetching {len(needed)} of {len(checkpoint.files)} weight files", None):
        fetch(folder, needed)
    checkpoint = folder.open()
    return checkpoint, pruned.plan_weights(checkpoint)


def _reference(folder: Folder, checkpoint: Checkpoint, pruned: PrunedConfig) -> ModelRef:
    depth, parameters = pruned.sources.depth, pruned.parameters[0]
    return reference(folder, checkpoint, model_type=pruned.model_type, layers=depth, parameters=parameters)


def _earlier(base: Path, model: ModelRef) -> Earlier | None:
    """Return the round of pruning that left the base; None where no export wrote it.

    Raises ``CheckpointError`` where its documents are links or special files, ``DocumentError`` where they contradict
    each other or are not those that its card names.
    """
    check_plain(base, [name for name in OURS if name.startswith(f"{FOLDER}/")])
    earlier = Earlier.read(base / FOLDER, model)
    if earlier is None or _readable_card(base, SILENT) is None:  # such a card is told of when the new one is written
        return earlier
    for fault in unlike_the_card(base, earlier.plan, earlier.receipt, earlier.heal, earlier.audit):
        raise DocumentError(f"{base}: {fault}; put it back, or take the folder {FOLDER} away")
    return earlier


def _readable_card(base: Path, progress: Progress) -> Path | None:
    """Return the base's folder, None where its card cannot be read: what is exported does not hang on it."""
    try:
        read_card(base / "README.md")
    except (CheckpointError, DocumentError) as error:
        progress.note(f"{error}; the new card says nothing of the base's licence and language, add them by hand")
        return None
    return base


def _check_space(weights: WeightPlan, out: Path) -> None:
    needed = sum(part.nbytes for part in weights.parts) + SPARE_BYTES
    place = next(folder for folder in out.parents if folder.exists())
    free = shutil.disk_usage(place).free
    if free < needed:
        raise ExportError(f"{place} has {free / 1e9:.1f} GB free, and the pruned model takes {needed / 1e9:.1f} GB")


def _remarks(extras: Extras) -> Iterator[str]:
    """Say which files are left behind, which are rewritten, and why."""
    yield from extras.notes
    if extras.dropped:
        yield left_out(extras.dropped)
    for field, change in extras.changes.items():
        yield f"{field} {change.before} is {'left out' if change.after is None else change.after} now"


def _write(
    folder: Path,
    shards: Sequence[writer.Shard],
    metadata: dict[str, str],
    base: Path,
    extras: Extras,
    progress: Progress,
) -> dict[str, FileEntry]:
    """Write weights, config and the files carried along; return the hash of each."""
    with writer.following([folder / shard.filename for shard in shards]) as followed:
        for name in writer.write_shards(folder, shards, {"format": "pt", **metadata}, progress):
            if name != INDEX:  # which is written at once, and flushed
                followed.complete(folder / name)
        for name in extras.copied:
            write_atomically(folder / name, (base / name).read_bytes())
        for name, content in extras.rewritten.items():
            write_atomically(folder / name, content)
        entries = {path.name: entry for path, entry in followed.entries().items()}
    written = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return {name: entries.get(name) or writer.entry_of(folder / name) for name in sorted(written)}


def prove(base: Checkpoint, result: Path, removal: Removal, *, trust_remote_code: bool = False) -> dict[str, Any]:
    """Compare the written checkpoint with the base without the removed layers; return what the receipt says of it.

    Its notes say what was not compared. Raises ``ExportError`` when they differ or a key does not fit.
    """
    with _loadable(base) as folder:
        told = apart(
            "layerprune.exporter.proof:compare_apart", base=str(folder), result=str(result), nbytes=base.nbytes,
            layers=list(removal.layers), trust_remote_code=trust_remote_code,
        )  # fmt: skip
    if base.absent:
        told["notes"].append(
            f"{len(base.absent)} of the base's {len(base.files)} weight files hold only what is removed: they were "
            "sampled by byte ranges for the fingerprint, and not fetched"
        )
    return told


@contextmanager
def _loadable(checkpoint: Checkpoint) -> Iterator[Path]:
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


# Plans of layers that are named by hand, and what export would write, in parameters and bytes, without writing it.


def removal_plan(
    model: str,
    layers: str,
    *,
    revision: str | None = None,
    weights: bool = True,
    progress: Progress = SILENT,
    trust_remote_code: bool = False,
) -> Plan:
    """Return the plan that removes exactly ``layers`` of ``model``: ``"21-24"`` or ``"3,-1"``; no metric, no items.

    ``layers`` may be the path of a mergekit config (.yaml) of a passthrough merge; the layers that it leaves out go.
    ``model`` is a local folder or a Hub id. Only its config and the headers and samples of its weights are read; of a
    Hub model they are fetched all the same, for an export, unless ``weights`` is false. Raises
    ``UsageError`` for layers that the model does not have or of which none would stay, ``RefusedError`` for a removal
    that cannot be represented exactly and ``ModelError`` for a model that is not found.
    """
    theirs = interchange.read_mergekit(Path(layers)) if interchange.is_file(layers) else None
    if theirs is not None:
        revision = theirs.revision_of(model, revision)
    folder = locate(model, revision, shards=weights, weights=weights)
    checkpoint = folder.open()
    with progress.task("reading the model", None):
        intact = contents.pruned_config(
            folder.path, Removal(()), checkpoint=checkpoint, name=folder.id, trust_remote_code=trust_remote_code
        )
    depth = intact.sources.depth
    if theirs is not None:
        for note in theirs.remarks(model, {tensor.dtype for tensor in checkpoint.tensors.values()}):
            progress.note(note)
        layers = ",".join(map(str, theirs.removal(depth)))  # a plan says the same however its layers were named
    named = parse_layers(layers, depth, "--remove")
    if not named:
        raise UsageError(f"--remove {layers!r} names no layer; write 3,7 or 21-24")
    if len(named) == depth:
        raise UsageError(f"--remove {layers!r}: all {depth} layers would go, and at least one stays")
    units = tuple(sorted(named))
    return Plan(
        model=_reference(folder, checkpoint, intact),
        metric=None, search=None, limits=PlanLimits(), requested=f"--remove {layers}", removal=units, order=units,
        ranking=(), scores_sha256=None, data=(), seed=0, versions=tool_versions(*TOOLS),
    )  # fmt: skip


def translated(
    plan: Plan, form: str, *, base: str | None = None, progress: Progress = SILENT, trust_remote_code: bool = False
) -> str:
    """Return the removal of ``plan`` as another tool takes it: "mergekit", "minitron", "llama-quantize" or "list".

    Of the base only the config and the headers and samples of its weights are read, and nothing for a list. Raises
    ``RefusedError`` where the tool's result would not be the base without these layers, and ``DocumentError`` when
    the base is not the plan's model.
    """
    from layerprune.architecture import load_config, read_architecture

    removal, depth = as_removal(plan.removal), plan.model.layers
    if form == "list":
        return interchange.write(form, removal, depth)
    folder = locate(*source_of(plan.model, base), shards=False, weights=False)
    checkpoint = folder.open()
    with progress.task("reading the model", None):
        config = load_config(str(folder.path), trust_remote_code=trust_remote_code)
        architecture = read_architecture(config, trust_remote_code=trust_remote_code)
    _check_planned(plan, folder, f"{depth} layers", f"{architecture.depth} layers")
    _check_planned(plan, folder, f"weights {plan.model.fingerprint}", f"weights {checkpoint.fingerprint()}")
    for note in interchange.check_form(form, architecture, removal, checkpoint.tensors):
        progress.note(f"warning: {note}")
    if form == "mergekit":
        return interchange.write_mergekit(removal, depth, folder, checkpoint)
    return interchange.write(form, removal, depth)


def weigh(folder: Path, removals: Sequence[Removal], *, trust_remote_code: bool = False) -> list[Weight]:
    """Return the size each removal leaves; from headers alone, whether or not export would refuse it."""
    from layerprune.architecture import build_on_meta, load_config, read_architecture
    from layerprune.exporter.proof import layer_sizes

    checkpoint = Checkpoint.open(folder)
    config = load_config(str(folder), trust_remote_code=trust_remote_code)
    architecture = read_architecture(config, trust_remote_code=trust_remote_code)
    model = build_on_meta(config, trust_remote_code=trust_remote_code)
    stack = contents.find_disk_stack(checkpoint, architecture.stack, layer_sizes(model, architecture.stack))
    weights = []
    for removal in removals:
        planned = contents.plan_weights(checkpoint, stack, LayerMap.after(removal, architecture.depth))
        nbytes = sum(part.nbytes for part in planned.parts)
        weights.append(Weight(architecture.parameters(removal), nbytes, planned.heads))
    return weights
