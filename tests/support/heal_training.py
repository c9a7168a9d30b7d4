"""Tiny models to train, the text to train them on, and the slow, obvious way to train."""

from __future__ import annotations

import numpy as np
import torch

from families import tiny_model
from layerprune.data.corpus import Corpus, Windows
from layerprune.healing.training import Training, make_trainable

VOCABULARY = 96


def windows_of(count: int, window: int = 16, seed: int = 0, uncounted: float = 0.2) -> Windows:
    """Text with something to learn: each token is most often the one before plus three."""
    rng = np.random.default_rng(seed)
    steps = np.where(rng.random((count, window)) < 0.95, 3, rng.integers(0, VOCABULARY, (count, window)))
    ids = (rng.integers(0, VOCABULARY, (count, 1)) + np.cumsum(steps, axis=1)) % VOCABULARY
    return Windows(ids.astype(np.int64), rng.random((count, window)) >= uncounted)


def text_of(count: int = 20, **kwargs) -> Corpus:
    return Corpus(windows_of(count, **kwargs), windows_of(6, seed=1), None)


def trainee(kind: str = "llama", frozen: tuple[str, ...] = ()):
    """A tiny model whose weights are all trained but those whose name holds a word of ``frozen``."""
    torch.manual_seed(0)
    model = tiny_model(kind).float().eval()
    names = {name for name, _ in model.named_parameters() if not any(word in name for word in frozen)}
    make_trainable(model, names)
    return model


def options_of(**changed) -> Training:
    given = {"steps": 6, "lr": 3e-3, "batch": 4, "micro": 2, "warmup": 2, "measures": 3, "precision": "float32"}
    return Training(**{**given, **changed})


def weights_of(model) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


def text_loss(model, windows: Windows) -> float:
    """Mean loss of the counted tokens, nats, by the model's own forward, window by window."""
    total, count = 0.0, 0
    with torch.no_grad():
        for ids, counted in zip(windows.ids, windows.counted, strict=True):
            logits = model(input_ids=torch.tensor(ids)[None]).logits[0, :-1].double()
            logs = logits.log_softmax(-1).gather(1, torch.tensor(ids)[1:, None])[:, 0]
            total -= float(logs[torch.tensor(counted)[1:]].sum())
            count += int(counted[1:].sum())
    return total / count


def plain_training(model, text: Corpus, options: Training, picks: list[list[int]]) -> list[float]:
    """Whole logits, whole batches, one optimiser: the loss of each step, nats per token."""
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=options.lr, betas=(0.9, 0.95), weight_decay=options.decay)
    losses = []
    for step, rows in enumerate(picks):
        ids, counted = torch.tensor(text.train.ids[rows]), torch.tensor(text.train.counted[rows])
        labels = ids.masked_fill(~counted, -100)
        logits = model(input_ids=ids).logits[:, :-1].flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, options.clip)
        for group in optimizer.param_groups:
            group["lr"] = options.rate(step)
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses
