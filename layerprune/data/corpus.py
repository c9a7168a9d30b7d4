"""Text for healing and for perplexity: documents, the benchmark items in them, token windows, a held-out part."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from layerprune.artifacts import CorpusOverlap, CorpusRef
from layerprune.data.items import hash_share
from layerprune.errors import UsageError, one_line
from layerprune.parsing import MOST_TEXT_BYTES, parse_json, read_text
from layerprune.util import time_limit

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


# Documents from where a user keeps them: a text, JSONL or parquet file, a folder of those, or a Hub dataset.
#
# A record is one of the forms that trainers take: ``{"text": ...}``, ``{"messages": [{"role", "content"}, ...]}`` or
# ``{"prompt": ..., "completion": ...}`` (strings or messages).


SUFFIXES = (".txt", ".md", ".jsonl", ".parquet")
PARAGRAPHS = "\n\n"
BUILTIN = "builtin"
FORMS = "'text', 'messages', or 'prompt' and 'completion'"


@dataclass(frozen=True)
class TextDocument:
    """One document: plain text, or a chat whose assistant's messages are the answers."""

    text: str | None = None
    messages: tuple[tuple[str, str], ...] = ()  # (role, content)

    @property
    def words(self) -> str:
        """All of its text, for looking things up in."""
        return self.text if self.text is not None else "\n".join(content for _, content in self.messages)

    def key(self) -> str:
        """What its hash stands for."""
        return self.text if self.text is not None else repr(self.messages)


def read_documents(source: str) -> tuple[str, list[TextDocument]]:
    """Return a name for the source, without the folders above it, and its documents in order.

    ``source``: ``builtin`` (the corpus in this package), a file or folder, or a Hub dataset, ``owner/name`` or
    ``owner/name:split``. Raises ``UsageError`` naming file and record.
    """
    files = find_source(source)
    name = source if files is None or source == BUILTIN else Path(source).name
    places = [(source, _hub_rows(source))] if files is None else ((str(file), _rows(file)) for file in files)
    return name, [_document(row, f"{place}, record {n}") for place, rows in places for n, row in enumerate(rows, 1)]


def find_source(source: str) -> list[Path] | None:
    """Return the files of a source, None for one that only the Hub can have; raises ``UsageError`` without reading."""
    if source == BUILTIN:
        return [Path(__file__).parent / "prose.jsonl"]
    path = Path(source).expanduser()
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix in SUFFIXES and file.is_file())
        if not files:
            raise UsageError(f"the folder {source} holds no text: none of {', '.join(SUFFIXES)}")
        return files
    if path.is_file():
        if path.suffix not in SUFFIXES:
            raise UsageError(f"{source} is none of {', '.join(SUFFIXES)}")
        return [path]
    if source.startswith((".", "/", "~")) or path.suffix in SUFFIXES:
        raise UsageError(f"the corpus {source} does not exist; give a file, a folder, a Hub dataset or {BUILTIN}")
    return None


def _rows(file: Path) -> list[Any]:
    """Return the records of a file; a plain text is one document a paragraph.

    What is held out must not be the whole of a file.
    """
    try:
        if file.suffix == ".parquet":
            import pyarrow.parquet

            return pyarrow.parquet.read_table(file).to_pylist()
        content = read_text(file, MOST_TEXT_BYTES)
        if file.suffix == ".jsonl":
            # Not splitlines: a string in JSON may hold U+2028, U+2029 and U+0085 as they are.
            return [parse_json(line) for line in content.split("\n") if line.strip()]
        return [{"text": part.strip()} for part in content.split(PARAGRAPHS) if part.strip()]
    except (OSError, ValueError) as error:  # pyarrow's own errors are these two
        raise UsageError(f"cannot read the corpus {file}: {one_line(error)}") from error


def _hub_rows(source: str) -> Iterable[Any]:
    import datasets

    name, _, split = source.partition(":")
    try:
        return datasets.load_dataset(name, split=split or "train")
    except Exception as error:  # datasets raises anything from FileNotFoundError to httpx errors
        raise UsageError(
            f"the corpus {source} is no file or folder here, and the Hub does not give it: {one_line(error)}"
        ) from error


def _document(record: Any, where: str) -> TextDocument:
    if not isinstance(record, Mapping):
        raise UsageError(f"{where} is a {type(record).__name__}; expected an object with {FORMS}")
    if isinstance(record.get("text"), str):
        return TextDocument(text=record["text"])
    messages, prompt, answer = (record.get(name) for name in ("messages", "prompt", "completion"))
    if messages is None and (prompt is None or answer is None):
        known = ", ".join(map(str, record)) or "nothing"
        raise UsageError(f"{where} has the keys {known}; expected {FORMS}")
    try:
        if messages is None:
            asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
            said = [{"role": "assistant", "content": answer}] if isinstance(answer, str) else answer
            messages = [*asked, *said]
        found = tuple((str(entry["role"]), entry["content"]) for entry in messages)
    except (TypeError, KeyError) as error:
        raise UsageError(f"{where}: messages are objects with role and content: {one_line(error)}") from error
    if not all(isinstance(content, str) for _, content in found):
        raise UsageError(f"{where}: a message's content is not text")
    if not any(role == "assistant" for role, _ in found):
        raise UsageError(f"{where}: no message has the role 'assistant', so there is no answer to learn")
    return TextDocument(messages=found)


# Text as full windows of token ids: packed, so that there is no padding, with a mask of the tokens that count.


IGNORED = -100  # the label that transformers and torch leave out of a loss


@dataclass(frozen=True)
class Passage:
    """One document as token ids; ``counted`` says of each token whether predicting it is part of the loss."""

    ids: tuple[int, ...]
    counted: tuple[bool, ...]

    @classmethod
    def of_text(cls, ids: Iterable[int], head: int | None) -> Passage:
        """Return a plain text, all of it counted but the token that stands before it, where there is one."""
        before, ids = () if head is None else (head,), tuple(ids)
        return cls((*before, *ids), (False,) * len(before) + (True,) * len(ids))


@dataclass(frozen=True)
class Windows:
    """Windows of equal length; every place holds a token of the text."""

    ids: NDArray[np.int64]  # (windows, tokens)
    counted: NDArray[np.bool_]  # (windows, tokens)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def window(self) -> int:
        """Tokens of a window."""
        return int(self.ids.shape[1])

    @property
    def tokens(self) -> int:
        """Tokens of all windows together."""
        return int(self.ids.size)

    @property
    def labels(self) -> NDArray[np.int64]:
        """Token ids as transformers takes labels (unshifted), IGNORED where the loss does not count."""
        return np.where(self.counted, self.ids, IGNORED)

    def first(self, count: int) -> Windows:
        """Return at most ``count`` windows from the beginning."""
        return Windows(self.ids[:count], self.counted[:count])

    def spread(self, count: int) -> Windows:
        """Return at most ``count`` windows, evenly spread from the first to the last."""
        chosen = np.unique(np.linspace(0, len(self) - 1, min(count, len(self))).round().astype(int))
        return Windows(self.ids[chosen], self.counted[chosen])


def pack(passages: Iterable[Passage], window: int) -> Windows:
    """Join passages and cut full windows; what is left over at the end is dropped.

    Windows in which nothing counts are left out.
    """
    ids: list[int] = []
    counted: list[bool] = []
    for passage in passages:
        ids.extend(passage.ids)
        counted.extend(passage.counted)
    whole = len(ids) // window * window
    found = Windows(
        np.array(ids[:whole], dtype=np.int64).reshape(-1, window),
        np.array(counted[:whole], dtype=bool).reshape(-1, window),
    )
    keep = found.counted[:, 1:].any(axis=1)  # the first token of a window is predicted from nothing
    return Windows(found.ids[keep], found.counted[keep])


# From documents to a corpus: what audits ask is left out, a part is held out, the rest is packed into windows.


WINDOW = 512  # tokens; as the audit's text, so that losses compare
HELD_OUT = 0.1  # share of the documents, by hash
HELDOUT_WINDOWS = 32  # that a held-out loss is measured on: 16,384 tokens, for three models in a healing


@dataclass(frozen=True)
class Corpus:
    """Windows to heal with and windows that no method reads but to choose an option or to stop."""

    train: Windows
    heldout: Windows
    ref: CorpusRef
    documents: tuple[TextDocument, ...] = ()  # what ``train`` was packed from, in order


def build_corpus(
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    window: int = WINDOW,
    seed: int = 0,
    items: Mapping[str, tuple[str, Mapping[str, str]]] | None = None,
) -> Corpus:
    """Read ``source`` (see ``read_documents``) and pack it for a model's tokenizer.

    ``items``: audit items to look for, by task (split, text by fingerprint); documents that hold one are left out.
    The order of documents and the held-out part depend on nothing but the documents' hashes and ``seed``. Raises
    ``UsageError`` when either part does not fill one window.
    """
    if window < 2:
        raise UsageError(f"a window of {window} tokens predicts nothing; use at least 2")
    name, documents = read_documents(source)
    overlap, holders = find_overlap(documents, items or {})
    kept = [document for number, document in enumerate(documents) if number not in holders]
    by_mark = {hashlib.sha256(document.key().encode()).hexdigest(): document for document in kept}
    order = sorted(by_mark, key=lambda mark: hash_share(mark, f"order {seed}"))
    heldout = [mark for mark in order if hash_share(mark, "held out") < HELD_OUT]
    train = [mark for mark in order if hash_share(mark, "held out") >= HELD_OUT]
    parts = [
        pack_documents([by_mark[mark] for mark in part], tokenizer, window, f"{source}, {what}")
        for part, what in ((train, "without what is held out,"), (heldout, "the held-out tenth,"))
    ]
    measured = parts[1].spread(HELDOUT_WINDOWS)
    ref = CorpusRef(
        source=name,
        fingerprint=f"sha256:{hashlib.sha256(','.join([*train, *heldout]).encode()).hexdigest()}",
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
    return Corpus(parts[0], measured, ref, tuple(by_mark[mark] for mark in train))


def pack_documents(
    documents: Sequence[TextDocument], tokenizer: PreTrainedTokenizerBase, window: int, what: str
) -> Windows:
    """Tokenise documents and cut full windows; ``UsageError``, naming ``what``, where they do not fill one."""
    # As lm-eval has it: beginning of text, else end of text, stands before a text.
    head = next((mark for mark in (tokenizer.bos_token_id, tokenizer.eos_token_id) if isinstance(mark, int)), None)
    passages = []
    for document in documents:
        if document.text is None:
            passages.append(chat_passage(tokenizer, document.messages))
        else:
            ids = tokenizer(document.text, add_special_tokens=False, verbose=False)["input_ids"]
            passages.append(Passage.of_text(ids, head))
    made = pack(passages, window)
    if not len(made):
        tokens = sum(len(passage.ids) for passage in passages)
        raise UsageError(f"{what} has {tokens} tokens, not one full window; give more text or a smaller window")
    return made


# A chat as the model's own template renders it, with the assistant's tokens marked.


def chat_passage(tokenizer: PreTrainedTokenizerBase, messages: tuple[tuple[str, str], ...]) -> Passage:
    """Render and tokenise a chat; only the assistant's tokens count, with what ends its turn.

    An answer's text is what the rendered chat gains by it: the rendering up to and with the answer, less the rendering
    up to the point where the template asks the assistant to speak. Raises ``UsageError`` for a tokenizer without a
    template or one whose template rewrites earlier messages.
    """
    if not tokenizer.is_fast:
        raise UsageError(f"{type(tokenizer).__name__} gives no character offsets; chats need a fast tokenizer")
    turns = [{"role": role, "content": content} for role, content in messages]
    text = render(tokenizer, turns, False)
    spans: list[tuple[int, int]] = []
    for place, turn in enumerate(turns):
        if turn["role"] == "assistant":
            before = render(tokenizer, turns[:place], True)
            after = render(tokenizer, turns[: place + 1], False)
            if not after.startswith(before) or not text.startswith(after):
                raise UsageError("the model's chat template rewrites earlier messages; answers cannot be told apart")
            spans.append((len(before), len(after)))
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ends = [stop for _, stop in encoded["offset_mapping"]]
    counted = tuple(any(start < stop <= last for start, last in spans) for stop in ends)
    return Passage(tuple(encoded["input_ids"]), counted)


TEMPLATE_SECONDS = 10  # that rendering one chat may take; it takes milliseconds


def render(tokenizer: PreTrainedTokenizerBase, turns: list[dict[str, str]], asked: bool) -> str:
    """Return a chat as the template renders it; ``asked``: up to where the assistant is to speak. ``UsageError``."""
    if not turns:
        raise UsageError("a chat begins with the assistant; put the user's message before it")
    with chat_template():
        return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=asked))


@contextmanager
def chat_template() -> Iterator[None]:
    """A block that renders a chat by a model's template: that it fails, or does not end, is a ``UsageError``."""
    try:
        with time_limit(TEMPLATE_SECONDS, "the model's chat template"):
            yield
    except UsageError:
        raise
    except Exception as error:  # a jinja template raises what it likes
        raise UsageError(f"the model's chat template does not take this chat: {one_line(error)}") from error


# Items of benchmarks in a corpus, found by 13-grams of words as GPT-3's authors did (arXiv:2005.14165).


LENGTH = 13  # words; arXiv:2005.14165, appendix C
SHORTEST = 8  # words; a shorter item is found whole or not at all, below this not looked for (ibid.)
WORD = re.compile(r"\w+")


def find_overlap(
    documents: Sequence[TextDocument], items: Mapping[str, tuple[str, Mapping[str, str]]]
) -> tuple[dict[str, CorpusOverlap], frozenset[int]]:
    """Return what was found of each task and the numbers of the documents that hold an item.

    ``items``: by task, (split, text by item fingerprint). Words are compared without case and punctuation.
    """
    owners: dict[int, list[tuple[str, str]]] = {}
    unlooked = dict.fromkeys(items, 0)
    lengths: set[int] = set()
    for task, (_, texts) in items.items():
        for mark, text in texts.items():
            words = _words(text)
            if len(words) < SHORTEST:
                unlooked[task] += 1
                continue
            size = min(LENGTH, len(words))
            lengths.add(size)
            for gram in set(_grams(words, size)):
                owners.setdefault(gram, []).append((task, mark))
    found: dict[str, set[str]] = {task: set() for task in items}
    holders: set[int] = set()
    for number, document in enumerate(documents):
        words = _words(document.words)
        for task, mark in (hit for size in lengths for gram in _grams(words, size) for hit in owners.get(gram, ())):
            found[task].add(mark)
            holders.add(number)
    overlap = {
        task: CorpusOverlap(split=split, items=len(texts), unlooked=unlooked[task], found=tuple(sorted(found[task])))
        for task, (split, texts) in items.items()
    }
    return overlap, frozenset(holders)


def _words(text: str) -> list[str]:
    return WORD.findall(text.lower())


def _grams(words: Sequence[str], size: int) -> Iterator[int]:
    """Yield a hash of each run of ``size`` words (the same within one process; a collision is a 2^-64 chance)."""
    return (hash((size, *words[start : start + size])) for start in range(len(words) - size + 1))
