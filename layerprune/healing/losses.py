"""The loss of a model on windows of text: the figure that healing is measured by."""

from __future__ import annotations

import torch
from torch import nn

from layerprune.corpus import Windows
from layerprune.progress import SILENT, Progress

BATCH_TOKENS = 4096


def batches(windows: Windows, most: int = BATCH_TOKENS) -> list[Windows]:
    """Split windows into batches of up to ``most`` tokens, at least one window each."""
    rows = max(1, most // windows.window)
    return [
        Windows(windows.ids[start : start + rows], windows.counted[start : start + rows])
        for start in range(0, len(windows), rows)
    ]


def id_batches(windows: Windows, most: int = BATCH_TOKENS) -> list[torch.Tensor]:
    """Return the token ids of windows in batches, each (windows, tokens)."""
    return [torch.from_numpy(batch.ids) for batch in batches(windows, most)]


@torch.no_grad()
def mean_nats(model: nn.Module, windows: Windows, progress: Progress = SILENT, label: str = "reading text") -> float:
    """Return the mean negative log-likelihood of the counted tokens, nats per token.

    Log-probabilities are taken in float32 whatever the model's dtype, sums in float64. The first token of a window is
    predicted from nothing and does not count.
    """
    total, count = 0.0, 0
    with progress.task(label, windows.tokens, "tokens") as advance:
        for batch in batches(windows):
            ids = torch.from_numpy(batch.ids).to(model.device)  # type: ignore[arg-type]
            wanted = torch.from_numpy(batch.counted[:, 1:]).to(ids.device)  # (windows, tokens - 1)
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1][wanted]  # (counted, vocabulary)
            nats = nn.functional.cross_entropy(logits.float(), ids[:, 1:][wanted], reduction="none")
            total += float(nats.double().sum())
            count += len(nats)
            advance(batch.tokens)
    return total / count
