"""Items of benchmarks in a corpus, found by 13-grams of words as GPT-3's authors did (arXiv:2005.14165)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

from layerprune.corpus.reading import Document
from layerprune.documents import Overlap

LENGTH = 13  # words; arXiv:2005.14165, appendix C
SHORTEST = 8  # words; a shorter item is found whole or not at all, below this not looked for (ibid.)
WORD = re.compile(r"\w+")


def find_overlap(
    documents: Sequence[Document], items: Mapping[str, tuple[str, Mapping[str, str]]]
) -> tuple[dict[str, Overlap], frozenset[int]]:
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
        for task, mark in _hits(words, lengths, owners):
            found[task].add(mark)
            holders.add(number)
    overlap = {
        task: Overlap(split=split, items=len(texts), unlooked=unlooked[task], found=tuple(sorted(found[task])))
        for task, (split, texts) in items.items()
    }
    return overlap, frozenset(holders)


def _hits(
    words: Sequence[str], lengths: Iterable[int], owners: Mapping[int, list[tuple[str, str]]]
) -> Iterator[tuple[str, str]]:
    for size in lengths:
        for gram in _grams(words, size):
            yield from owners.get(gram, ())


def _words(text: str) -> list[str]:
    return WORD.findall(text.lower())


def _grams(words: Sequence[str], size: int) -> Iterator[int]:
    """Yield a hash of each run of ``size`` words (the same within one process; a collision is a 2^-64 chance)."""
    return (hash((size, *words[start : start + size])) for start in range(len(words) - size + 1))
