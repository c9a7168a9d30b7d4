"""Text for healing and for perplexity: documents, what benchmarks stand in them, token windows, a held-out part."""

from layerprune.corpus.building import WINDOW, Corpus, build_corpus, pack_documents
from layerprune.corpus.overlap import find_overlap
from layerprune.corpus.reading import BUILTIN, Document, find_source, read_documents
from layerprune.corpus.windows import IGNORED, Passage, Windows, pack

__all__ = [
    "BUILTIN",
    "IGNORED",
    "WINDOW",
    "Corpus",
    "Document",
    "Passage",
    "Windows",
    "build_corpus",
    "find_overlap",
    "find_source",
    "pack",
    "pack_documents",
    "read_documents",
]
