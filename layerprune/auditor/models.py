"""Loading the two models of an audit the way their users would, and proof that they are the right two."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from layerprune.auditor.exported import Exported, short
from layerprune.checkpoint import Checkpoint, locate
from layerprune.checkpoint.locator import source_of
from layerprune.engine import Engine
from layerprune.errors import DocumentError
from layerprune.subject import Subject
from layerprune.tasks import Questions
from layerprune.tasks.encoding import Encoder, encode


@dataclass(frozen=True)
class Loading:
    """How models are loaded and run; both alike, or their difference would not be the removal's."""

    dtype: str = "auto"
    device: str = "auto"
    rows: int | None = None  # a fixed number of rows in a batch; None: the engine's own token budget
    memory: int | None = None  # bytes that evaluating may hold beside the weights
    trust_remote_code: bool = False

    def subject(self, model: str, revision: str | None = None) -> Subject:
        return Subject.load(
            model,
            revision=revision,
            dtype=self.dtype,
            device=self.device,
            trust_remote_code=self.trust_remote_code,
        )

    def engine(self, subject: Subject) -> Engine:
        return Engine(subject, rows=self.rows, memory=self.memory)


def check_weights(exported: Exported, where: str | None) -> None:
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


def check_folder(exported: Exported) -> None:
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


def check_same_tokens(questions: Questions, encoder: Encoder) -> None:
    """Raise ``DocumentError`` when another tokenizer would put the questions into other tokens."""
    for task in questions.tasks.values():
        for item in task.items:
            own = tuple(encode(instance, encoder) for instance in item.key)
            if any(mine.parts != asked.parts for mine, asked in zip(own, item.queries, strict=True)):
                raise DocumentError(
                    f"the tokenizers of the base and the pruned folder differ on an item of {task.name!r}; "
                    "were tokenizer files changed after the export?"
                )
