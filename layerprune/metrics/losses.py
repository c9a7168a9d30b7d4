"""The loss on text under many removals: what ``perplexity`` and ``shapley`` ask."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from layerprune.engine import Engine
from layerprune.metrics.base import Data
from layerprune.removal import Removal
from layerprune.subject import Subject
from layerprune.tasks import Request

INTACT = Removal(())


def text_losses(
    subject: Subject, texts: Sequence[tuple[int, ...]], removals: Sequence[Removal], data: Data, label: str
) -> np.ndarray:
    """Return the loss of every text under every removal, in nats summed over its tokens; (removals, texts).

    Every token but a text's first is predicted. What removals have in common is computed once.
    """
    engine = Engine(subject, rows=data.rows, memory=data.memory)
    requests = [Request(tuple(text), len(text) - 1) for text in texts]
    with data.progress.task(label, len(texts) * len(removals), "texts") as advance:
        sums, _ = engine.measure(requests, [[i] for i in range(len(texts))], removals, advance)
    return -sums


def predicted_tokens(texts: Sequence[tuple[int, ...]]) -> int:
    """Return how many tokens of the texts are predicted."""
    return sum(len(text) - 1 for text in texts)
