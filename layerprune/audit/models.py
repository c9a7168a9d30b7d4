"""Loading the two models of an audit the way their users would, and proof that they are the right two."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from layerprune.audit.exported import short
from layerprune.documents import Receipt
from layerprune.engine import Engine
from layerprune.errors import DocumentError
from layerprune.subject import Subject
from layerprune.tasks import Questions
from layerprune.tasks.encoding import encode


@dataclass(frozen=True)
class Loading:
    """How models are loaded and run; both alike, or their difference would not be the removal's."""

    dtype: str = "auto"
    device: str = "auto"
    tokens: int | None = None  # token budget of a batch; None: the engine's own
    trust_remote_code: bool = False
    rows: int | None = None  # a fixed number of rows in a batch instead of a token budget

    def subject(self, model: str, revision: str | None = None) -> Subject:
        return Subject.load(
            model,
            revision=revision,
            dtype=self.dtype,
            device=self.device,
            trust_remote_code=self.trust_remote_code,
        )

    def engine(self, subject: Subject) -> Engine:
        return Engine(subject, tokens=self.tokens, rows=self.rows)

    def base(self, receipt: Receipt, where: str | None) -> Subject:
        """Load the base model from ``where``, or where it was exported from; any other model is a ``DocumentError``."""
        model, revision = (where, None) if where else (receipt.base.id, receipt.base.revision)
        subject = self.subject(model, revision)
        if subject.ref.fingerprint != receipt.base.fingerprint:
            raise DocumentError(
                f"{model} is not the model this checkpoint was made from: its weights' fingerprint is "
                f"{short(subject.ref.fingerprint)}, the receipt says {short(receipt.base.fingerprint)}"
            )
        return subject

    def pruned(self, receipt: Receipt, folder: Path) -> Subject:
        """Load the exported folder itself; weights other than those export wrote are a ``DocumentError``."""
        subject = self.subject(str(folder))
        if subject.ref.fingerprint != receipt.result.fingerprint:
            raise DocumentError(
                f"the weights in {folder} are not those export wrote: their fingerprint is "
                f"{short(subject.ref.fingerprint)}, the receipt says {short(receipt.result.fingerprint)}"
            )
        return subject


def check_same_tokens(questions: Questions, pruned: Subject) -> None:
    """Raise ``DocumentError`` when the folder's own tokenizer words a question in other tokens than the base's."""
    for task in questions.tasks.values():
        for item in task.items:
            own = tuple(encode(instance, pruned.encoder) for instance in item.key)
            if any(mine.parts != asked.parts for mine, asked in zip(own, item.queries, strict=True)):
                raise DocumentError(
                    f"the tokenizers of the base and the pruned folder differ on an item of {task.name!r}; "
                    "were tokenizer files changed after the export?"
                )
