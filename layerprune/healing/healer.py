"""The step from a pruned checkpoint to a healed one: validate, read, heal, publish, measure what was written."""

from __future__ import annotations

import shutil
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from layerprune.architecture import build_on_meta, load_config, positions
from layerprune.artifacts import HealerRef, HealLog, HeldOut
from layerprune.auditor.inputs import ExportedFolder, check_folder, check_weights
from layerprune.checkpoint import Checkpoint, new_folder, try_new_folder
from layerprune.checkpoint.location import lies_at, source_of
from layerprune.config import HealConfig
from layerprune.data.corpus import WINDOW, Corpus, build_corpus
from layerprune.data.tasks import item_texts
from layerprune.errors import ExportError, UsageError
from layerprune.exporter import proof
from layerprune.files import check_plain, locked, refuse_link
from layerprune.healing import HEALERS
from layerprune.healing.base import Changed, HealContext, Healer, Record
from layerprune.healing.losses import mean_nats
from layerprune.healing.training import is_main_process
from layerprune.healing.writer import FOLDER, add_documents, carried_files, spooled, write_healed
from layerprune.models.model import LoadedModel, load_tokenizer
from layerprune.registry import Entry, build, options_of, spec_of
from layerprune.util import SILENT, Progress, tool_versions


def heal(checkpoint: Path, out: Path, *, progress: Progress = SILENT, **options: Any) -> HealLog | None:
    """Write the healed ``checkpoint`` to the new folder ``out`` and return its log; ``options`` are ``HealConfig``'s.

    Of several processes under ``accelerate launch`` the first one does; the others help to train and return None.

    The result has exactly the tensors, shapes and dtypes of the unhealed checkpoint. On any failure no folder is left;
    a method that was cut off may keep what it needs to go on in a hidden folder beside ``out``. Raises
    ``DocumentError`` for a folder that export did not write or a base that is not its own, ``RefusedError`` where the
    method cannot heal this model or removal, ``UsageError`` for an unusable corpus or option, or where another healing
    is at work on ``out``.
    """
    request = HealConfig.of(**options)
    entry, healer = build(HEALERS, request.method)
    out = Path(out).absolute()
    work = work_folder(out)
    refuse_link(work)
    if is_main_process():
        clear(out)
    _check_new(out)
    exported = ExportedFolder.read(checkpoint)
    if not is_main_process():
        deque(healer.heal(replace(_case(request, healer, exported, work, progress), progress=SILENT)), maxlen=0)
        return None
    try_new_folder(out, checkpoint, _base(request, healer, exported))
    with locked(work):
        _check_new(out)  # whoever held the lock until now may have written it
        case = _case(request, healer, exported, work, progress)
        if case.attachments.exists():  # of another method that was cut off before it was published
            shutil.rmtree(case.attachments)
        check_plain(work)  # what a method goes on from and writes over
        log = _published(entry, healer, case, exported, out)
        shutil.rmtree(work, ignore_errors=True)
    return log


def work_folder(out: Path) -> Path:
    """Return where a healing keeps its own files until ``out`` is there."""
    out = Path(out).absolute()
    return out.parent / f".{out.name}.healing"


def clear(out: Path) -> None:
    """Remove what is left of the healing that wrote ``out``, where it was killed between that and its own end."""
    work = work_folder(out)
    if work.is_dir() and (Path(out) / FOLDER / HealLog.filename).is_file():
        with locked(work):
            shutil.rmtree(work)


def _check_new(out: Path) -> None:
    if out.exists():
        raise ExportError(f"{out} exists already; choose a new folder or remove it")


def _published(entry: Entry, healer: Healer, case: HealContext, exported: ExportedFolder, out: Path) -> HealLog:
    """Let the method heal, write what it changed to ``out``, and measure what was written."""
    checkpoint, told, receipt = Checkpoint.open(exported.folder), case.record, exported.receipt
    healed = _timed(iter(healer.heal(case)), told)
    with spooled(checkpoint, case.work / "changed.bin", healed) as changed, new_folder(out) as new:
        carried = carried_files(exported, checkpoint, case.progress)
        files = write_healed(checkpoint, changed, carried, case.attachments, new, case.progress)
        proof.check_loads(exported.folder, new, trust_remote_code=case.trust_remote_code)
        result = {"id": out.name, "revision": None, "fingerprint": Checkpoint.open(new).fingerprint()}
        log = HealLog(
            method=HealerRef(
                name=entry.name,
                spec=spec_of(entry.name, healer),
                options=options_of(healer),
                gradients=healer.gradients,
                owner=entry.owner,
            ),
            base=receipt.base,
            unhealed=exported.result,
            result=exported.result.model_copy(update=result),
            plan_sha256=exported.plan.sha256(),
            receipt_sha256=receipt.sha256(),
            earlier=exported.heal,
            corpus=case.corpus.ref if case.corpus else None,
            changed=tuple(sorted(changed)),
            files=files,
            tokens=told.tokens,
            seconds=round(told.seconds, 3),
            curve=tuple(told.curve),
            found=told.found,
            notes=tuple(told.notes),
            heldout=_heldout(case, new),
            dtype=told.dtype,
            device=told.device,
            attention=told.attention,
            seed=case.seed,
            versions=tool_versions("torch", "transformers", "peft", "accelerate"),
        )
        add_documents(exported.folder, new, log)
    return log


def _timed(changed: Iterator[Changed], record: Record) -> Iterator[Changed]:
    """Count the time spent in a method's own code, not in writing what it yields."""
    start = time.monotonic()
    for pair in changed:
        record.seconds += time.monotonic() - start
        yield pair
        start = time.monotonic()
    record.seconds += time.monotonic() - start


def _case(request: HealConfig, healer: Healer, exported: ExportedFolder, work: Path, progress: Progress) -> HealContext:
    """See that everything belongs together and is at hand, and read the corpus."""
    if "text" in healer.needs and request.corpus is None:
        raise UsageError(f"{request.method} reads text: give a corpus, such as --corpus FILE or --corpus builtin")
    base = _base(request, healer, exported)
    check_folder(exported) if base is None else check_weights(exported, request.base)
    corpus = None
    if request.corpus is not None:
        corpus = _corpus(request, exported)
        overlap = {task: len(found.found) for task, found in corpus.ref.overlap.items() if found.found}
        if overlap:
            said = ", ".join(f"{count} items of {task}" for task, count in overlap.items())
            progress.note(f"the corpus holds {said}: {corpus.ref.dropped_documents} documents left out")
    return HealContext(
        folder=exported.folder,
        plan=exported.plan,
        receipt=exported.receipt,
        work=work,
        name=exported.result.id,
        corpus=corpus,
        base=base,
        base_revision=None if base is None or request.base else exported.receipt.base.revision,
        dtype=request.dtype,
        device=request.device,
        seed=request.seed,
        trust_remote_code=request.trust_remote_code,
        attn_implementation=request.attn_implementation,
        offload=request.offload,
        progress=progress,
    )


def _base(request: HealConfig, healer: Healer, exported: ExportedFolder) -> str | None:
    """Return where the base is: as told, or where it was exported from when it is needed or still a folder there."""
    if request.base is not None:
        return request.base
    base = exported.receipt.base
    if "base" in healer.needs:
        return source_of(base)[0]
    home = lies_at(base)
    return None if home is None else str(home)


def _corpus(request: HealConfig, exported: ExportedFolder) -> Corpus:
    window, tasks = _window(request, exported), request.tasks
    if tasks is None:
        tasks = tuple(dict.fromkeys(data.task for data in exported.plan.data))
    items = item_texts(tasks, include_path=request.include_path, data_dir=request.data_dir) if tasks else {}
    tokenizer = load_tokenizer(exported.folder, str(exported.folder), trust_remote_code=request.trust_remote_code)
    return build_corpus(str(request.corpus), tokenizer, window=window, seed=request.seed, items=items)


def _window(request: HealConfig, exported: ExportedFolder) -> int:
    config = load_config(str(exported.folder), trust_remote_code=request.trust_remote_code)
    most = positions(build_on_meta(config, trust_remote_code=request.trust_remote_code))
    if request.window is None:
        return WINDOW if most is None else min(WINDOW, most)
    if most is not None and request.window > most:
        what = f"a window of {request.window} tokens is more than the {most} that the model reads"
        raise UsageError(f"{what}; use --window {most} or less")
    return request.window


def _heldout(case: HealContext, folder: Path) -> HeldOut | None:
    """Measure the unhealed checkpoint, the healed one as it was written and, where it is at hand, the base."""
    if case.corpus is None:
        return None
    windows = case.corpus.heldout

    def nats(loaded: LoadedModel, which: str) -> float:
        return mean_nats(loaded.model, windows, case.progress, f"held-out loss of the {which} model")

    before, after = (
        nats(told.load_model(streams=True), said)
        for told, said in ((case, "unhealed"), (replace(case, folder=folder), "healed"))
    )
    return HeldOut(before=before, after=after, base=None if case.base is None else nats(case.load_base(), "base"))
