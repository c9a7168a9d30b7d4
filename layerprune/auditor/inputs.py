"""What an audit works on: an exported folder with documents that agree, and the two models, loaded and checked."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from layerprune.artifacts import PRUNED, UNHEALED, Audit, HealLog, ModelRef, Plan, Receipt
from layerprune.artifacts.receipt import audit_faults, chain_faults
from layerprune.checkpoint import Checkpoint, locate
from layerprune.checkpoint.location import learn, source_of
from layerprune.config import AuditConfig
from layerprune.data.items import Encoder, EvalSet, encode
from layerprune.errors import DocumentError, TaskError, UsageError
from layerprune.files import check_plain
from layerprune.models.model import LoadedModel
from layerprune.report.card import unlike_the_card
from layerprune.scoring.engine import Engine

# An exported folder's documents, the one check that they belong together, and what else an audit has to fit.


RESERVED = ("base", PRUNED, UNHEALED)


@dataclass(frozen=True)
class ExportedFolder:
    """The documents of an exported folder, found to belong together; there may be no healing and no audit yet."""

    folder: Path
    plan: Plan
    receipt: Receipt
    heal: HealLog | None = None
    audit: Audit | None = None

    @property
    def result(self) -> ModelRef:
        """The model whose weights lie in the folder."""
        return self.receipt.result if self.heal is None else self.heal.result

    @property
    def base(self) -> ModelRef:
        """The model that the layers were removed from."""
        return self.receipt.base

    @property
    def seen(self) -> frozenset[str]:
        """Every item that had a say, in this round of pruning or an earlier one, or stood in a text that healed."""
        return self.plan.seen | self.receipt.seen_before | (self.heal.met if self.heal else frozenset())

    @property
    def sizes(self) -> tuple[int, int]:
        """Bytes of the weights of base and export."""
        return self.receipt.bytes_before, self.receipt.bytes_after

    def base_source(self, given: str | None = None) -> tuple[str, str | None]:
        """Return (folder or Hub id, revision) of the base: ``given`` by the user, or where it was exported from."""
        return source_of(self.receipt.base, given)

    def load(self, loading: Loading) -> LoadedModel:
        """Load the model in the folder."""
        return loading.load_model(str(self.folder))

    @classmethod
    def read(cls, folder: Path) -> ExportedFolder:
        """Read the documents; every command that reads an exported folder does it here.

        Raises ``DocumentError`` for a folder export did not write, and where one document contradicts another or is not
        the one that the card names: something was edited or mixed up. Raises ``CheckpointError`` for a folder with
        links or special files: it would be read, or written, elsewhere.
        """
        folder = Path(folder)
        inside = folder / "layerprune"
        if not (inside / Receipt.filename).is_file():
            what = "has no layerprune/receipt.json" if folder.is_dir() else "does not exist"
            raise DocumentError(
                f"{folder} is not an exported checkpoint: it {what}; make one with layerprune export PLAN -o FOLDER"
            )
        check_plain(folder)
        learn(inside)
        plan, receipt = Plan.load(inside / Plan.filename), Receipt.load(inside / Receipt.filename)
        if receipt.plan_sha256 != plan.sha256():
            raise DocumentError(
                f"{inside / Plan.filename} is not the plan that was carried out: its sha256 is {short(plan.sha256())}, "
                f"the receipt says {short(receipt.plan_sha256)}; export the plan again"
            )
        log = HealLog.load(inside / HealLog.filename) if (inside / HealLog.filename).exists() else None
        if log is not None and log.receipt_sha256 != receipt.sha256():
            raise DocumentError(
                f"{inside / HealLog.filename} is not of this checkpoint: it names a receipt with sha256 "
                f"{short(log.receipt_sha256)}, not {short(receipt.sha256())}; heal the checkpoint again"
            )
        audit = Audit.load(inside / Audit.filename) if (inside / Audit.filename).exists() else None
        # not the audit: one that was cut off has renewed the card before its document
        for fault in (*chain_faults(plan, receipt, log), *unlike_the_card(folder, plan, receipt, log)):
            raise DocumentError(
                f"{folder}: {fault}; a document was edited: put it back, or make the checkpoint again "
                "(layerprune verify lists every problem)"
            )
        for fault in audit_faults(audit, plan, receipt, log) if audit else ():
            raise DocumentError(f"{inside / Audit.filename}: {fault}; put it back, or remove it to audit again")
        return cls(folder, plan, receipt, log, audit)


def check_unseen(eval_set: EvalSet, seen: Collection[str]) -> None:
    """Raise ``TaskError`` when an item had a say in a plan: an audit of such items would be no audit."""
    for task in eval_set.tasks.values():
        shared = [item.fingerprint for item in task.items if item.fingerprint in seen]
        if shared:
            raise TaskError(f"task {task.name!r}: {len(shared)} items have been seen by a plan, {shared[0]} for one")


def columns(compare: Mapping[str, Plan], base: ModelRef, unhealed: Plan | None = None) -> Mapping[str, Plan]:
    """Return the plans whose removals are examined beside the folder: those asked for, its own first if it was healed.

    ``unhealed`` is the plan of a folder that was healed: the base with its layers bypassed is the exported checkpoint
    before healing, and no other copy of it is needed. Raises ``DocumentError`` for a plan of another base,
    ``UsageError`` for a label that is taken.
    """
    for label, plan in compare.items():
        if label in RESERVED:
            raise UsageError(f"a compared plan cannot be called {label!r}; choose another label")
        if plan.model.fingerprint != base.fingerprint:
            raise DocumentError(
                f"the compared plan {label!r} is for another model: {plan.model.id} with weights "
                f"{short(plan.model.fingerprint)}, not {base.id} with {short(base.fingerprint)}"
            )
    return compare if unhealed is None else {UNHEALED: unhealed, **compare}


def short(digest: str) -> str:
    """Return the first 12 hex digits of a sha256 for a message."""
    return f"{digest.removeprefix('sha256:')[:12]}..."


# Loading the two models of an audit the way their users would, and proof that they are the right two.


@dataclass(frozen=True)
class Loading:
    """How models are loaded and run; both alike, or their difference would not be the removal's."""

    dtype: str = "auto"
    device: str = "auto"
    rows: int | None = None  # a fixed number of rows in a batch; None: the engine's own token budget
    memory: int | None = None  # bytes that evaluating may hold beside the weights
    trust_remote_code: bool = False
    attn_implementation: str = "auto"
    offload: str = "auto"

    @classmethod
    def of(cls, config: AuditConfig) -> Loading:
        """Return what an audit's options say."""
        return cls(
            config.dtype,
            config.device,
            config.batch_size if isinstance(config.batch_size, int) else None,
            config.memory,
            config.trust_remote_code,
            config.attn_implementation,
            config.offload,
        )

    def load_model(self, model: str, revision: str | None = None) -> LoadedModel:
        return LoadedModel.load(
            model,
            revision=revision,
            dtype=self.dtype,
            device=self.device,
            attn_implementation=self.attn_implementation,
            offload=self.offload,
            trust_remote_code=self.trust_remote_code,
        )

    def engine(self, loaded: LoadedModel) -> Engine:
        return Engine(loaded, rows=self.rows, memory=self.memory)


def check_weights(exported: ExportedFolder, where: str | None) -> None:
    """Raise ``DocumentError`` unless base and exported folder hold the weights the documents name; loads neither.

    ``where`` the base is; None: where it was exported from.
    """
    model, revision = source_of(exported.receipt.base, where)
    check_folder(exported)
    found = Checkpoint.open(locate(model, revision).path).fingerprint()
    if found != exported.receipt.base.fingerprint:
        raise DocumentError(
            f"{model} is not the model this checkpoint was made from: its weights' fingerprint is {short(found)}, "
            f"the receipt says {short(exported.receipt.base.fingerprint)}"
        )


def check_folder(exported: ExportedFolder) -> None:
    """Raise ``DocumentError`` unless the folder holds the files that its receipt, or its healing log, names.

    Weights by fingerprint, which reads their headers; config, tokenizer and what else goes along by hash.
    """
    writer = exported.heal or exported.receipt
    wrote, document = ("export wrote", "receipt") if exported.heal is None else ("heal wrote", "healing log")
    checkpoint, said = Checkpoint.open(exported.folder), exported.result.fingerprint
    found = checkpoint.fingerprint()
    if found != said:
        raise DocumentError(
            f"the weights in {exported.folder} are not those {wrote}: their fingerprint is {short(found)}, "
            f"the {document} says {short(said)}"
        )
    for name, entry in writer.files.items():
        if name in checkpoint.names:
            continue
        path = exported.folder / name
        if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != entry.sha256:
            raise DocumentError(f"{path} is not the file {wrote}: put that back; verify lists all that was changed")


TOKENS_CHANGED = "the pruned folder differ on an item of {task!r}; were tokenizer files changed after the export?"


def check_same_tokens(eval_set: EvalSet, encoder: Encoder, said: str = TOKENS_CHANGED) -> None:
    """Raise ``DocumentError`` when another tokenizer would put the questions into other tokens.

    ``said`` is how the message goes on after "the tokenizers of the base and".
    """
    for task in eval_set.tasks.values():
        for item in task.items:
            own = tuple(encode(instance, encoder) for instance in item.key)
            if any(mine.parts != asked.parts for mine, asked in zip(own, item.queries, strict=True)):
                raise DocumentError(f"the tokenizers of the base and {said.format(task=task.name)}")
