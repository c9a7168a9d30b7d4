"""From documents to a corpus: what audits ask is left out, a part is held out, the rest is packed into windows."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from layerprune.corpus.chat import chat_passage
from layerprune.corpus.overlap import find_overlap
from layerprune.corpus.reading import Document, read_documents
from layerprune.corpus.windows import Passage, Windows, check_enough, pack
from layerprune.documents import CorpusRef
from layerprune.errors import UsageError
from layerprune.tasks.items import hash_share

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

WINDOW = 512  # tokens; as the audit's text, so that losses compare
HELD_OUT = 0.1  # share of the documents, by hash
HELDOUT_WINDOWS = 32  # that a held-out loss is measured on: 16,384 tokens, for three models in a healing


@dataclass(frozen=True)
class Corpus:
    """Windows to heal with and windows that no method reads but to choose an option or to stop."""

    train: Windows
    heldout: Windows
    ref: CorpusRef
    documents: tuple[Document, ...] = ()  # what ``train`` was packed from, in order


def build_corpus(
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    window: int = WINDOW,
    seed: int = 0,
    items: Mapping[str, tuple[str, Mapping[str, str]]] | None = None,
) -> Corpus:
    """Read ``source`` (see ``reading.read_documents``) and pack it for a model's tokenizer.

    ``items``: audit items to look for, by task (split, text by fingerprint); documents that hold one are left out.
    The order of documents and the held-out part depend on nothing but the documents' hashes and ``seed``. Raises
    ``UsageError`` when either part does not fill one window.
    """
    if window < 2:
        raise UsageError(f"a window of {window} tokens predicts nothing; use at least 2")
    name, documents = read_documents(source)
    overlap, holders = find_overlap(documents, items or {})
    kept = [document for number, document in enumerate(documents) if number not in holders]
    marked = sorted({_mark(document): document for document in kept}.items(), key=lambda entry: _place(entry[0], seed))
    heldout = [(mark, document) for mark, document in marked if hash_share(mark, "held out") < HELD_OUT]
    train = [(mark, document) for mark, document in marked if hash_share(mark, "held out") >= HELD_OUT]
    parts = [
        pack_documents([document for _, document in part], tokenizer, window, f"{source}, {what}")
        for part, what in ((train, "without what is held out,"), (heldout, "the held-out tenth,"))
    ]
    measured = parts[1].spread(HELDOUT_WINDOWS)
    ref = CorpusRef(
        source=name,
        fingerprint=_fingerprint([mark for mark, _ in (*train, *heldout)]),
        documents=len(train),
        heldout_documents=len(heldout),
        dropped_documents=len(holders),
        overlap=overlap,
        window=window,
        windows=len(parts[0]),
        heldout_windows=len(measured),
        counted=int(parts[0].counted.sum()),
        answers_only=any(document.text is None for document in kept),
    )
    return Corpus(parts[0], measured, ref, tuple(document for _, document in train))


def pack_documents(
    documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase, window: int, what: str
) -> Windows:
    """Tokenise documents and cut full windows; ``UsageError``, naming ``what``, where they do not fill one."""
    passages = [_passage(document, tokenizer) for document in documents]
    made = pack(passages, window)
    check_enough(made, what, sum(len(passage.ids) for passage in passages))
    return made


def _passage(document: Document, tokenizer: PreTrainedTokenizerBase) -> Passage:
    if document.text is None:
        return chat_passage(tokenizer, document.messages)
    ids = tokenizer(document.text, add_special_tokens=False, verbose=False)["input_ids"]
    return Passage.of_text(ids, _head(tokenizer))


def _head(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the token that stands before a text: as lm-eval has it, beginning of text, else end of text."""
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if isinstance(token, int):
            return token
    return None


def _mark(document: Document) -> str:
    return hashlib.sha256(document.key().encode()).hexdigest()


def _place(mark: str, seed: int) -> float:
    return hash_share(mark, f"order {seed}")


def _fingerprint(marks: Sequence[str]) -> str:
    return f"sha256:{hashlib.sha256(','.join(marks).encode()).hexdigest()}"
