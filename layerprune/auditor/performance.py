"""Both models on running text, and the memory that one more token takes in their caches."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from layerprune import parsing
from layerprune.artifacts import TextLoss
from layerprune.errors import UsageError
from layerprune.models.model import LoadedModel
from layerprune.parsing import MOST_TEXT_BYTES, parse_json
from layerprune.removal import Removal
from layerprune.stats import bootstrap_interval
from layerprune.util import SILENT, Progress


def cache_bytes_per_token(loaded: LoadedModel) -> int | None:
    """Return the bytes one more token adds to the key-value cache; None where layers keep other state."""
    small, large = (_cache_bytes(loaded, tokens) for tokens in (8, 16))
    return None if small is None or large is None else (large - small) // 8


@torch.no_grad()
def _cache_bytes(loaded: LoadedModel, tokens: int) -> int | None:
    ids = torch.zeros(1, tokens, dtype=torch.long, device=loaded.device)
    layers = getattr(loaded.model(input_ids=ids, use_cache=True).get("past_key_values"), "layers", None)
    if not layers or any(not isinstance(getattr(layer, "keys", None), torch.Tensor) for layer in layers):
        return None
    return sum(int(layer.keys.nbytes + layer.values.nbytes) for layer in layers)


# Both models on running text: perplexity, and how far their next-token distributions are apart.


WINDOW = 512  # tokens; each window starts anew, so a token has 255 tokens before it on average
WINDOWS = 64  # 32,768 tokens


def read_text(path: Path) -> str:
    """Read a text file, or the ``text`` fields of a JSONL file, one after the other; raises ``UsageError``."""
    path = Path(path)
    try:
        content = parsing.read_text(path, MOST_TEXT_BYTES)
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot read the text {path}: {error}") from error
    if path.suffix != ".jsonl":
        return content
    try:  # not splitlines: a string in JSON may hold U+2028, U+2029 and U+0085 as they are
        return "\n\n".join(parse_json(line)["text"] for line in content.split("\n") if line.strip())
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path}: each line of a .jsonl text is an object with a field 'text': {error}") from error


def windows_of(text: str, loaded: LoadedModel, window: int = WINDOW, most: int = WINDOWS) -> list[list[int]]:
    """Cut a text into windows of ``window`` tokens, evenly spread ones where there are more than ``most``.

    Each window is headed by the token that lm-eval puts before a text (the model's beginning-of-text token), and is
    shorter where the model reads no more.
    """
    window = window if loaded.positions is None else min(window, loaded.positions - 1)
    ids = loaded.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    cut = [ids[start : start + window] for start in range(0, len(ids) - window + 1, window)]
    if len(cut) < 2:
        raise UsageError(f"the text has {len(ids)} tokens; at least {2 * window} are needed to measure on it")
    chosen = np.unique(np.linspace(0, len(cut) - 1, min(most, len(cut))).round().astype(int))
    return [[loaded.encoder.prefix_token_id, *cut[index]] for index in chosen]


@torch.no_grad()
def text_loss(
    base: LoadedModel,
    pruned: LoadedModel,
    windows: Sequence[Sequence[int]],
    source: str,
    *,
    unhealed: Removal | None = None,
    seed: int = 0,
    progress: Progress = SILENT,
) -> TextLoss:
    """Measure both models on the windows; log-probabilities are taken in float32 whatever the models' dtype.

    ``unhealed``: what was removed from the base before ``pruned`` was healed; the base without it is measured, too.
    Where one model's vocabulary is padded or extended, all are measured on the tokens that both have.
    """
    width = min(base.vocabulary, pruned.vocabulary)
    before, after, between, kl, same = [], [], [], [], []
    with progress.task("reading text with both models", len(windows), "windows") as advance:
        for window in windows:
            ids = torch.tensor([list(window)])
            p, q = _logs(base, ids, width), _logs(pruned, ids, width)  # (tokens - 1, width)
            asked = ids[0, 1:, None].to(p.device)
            before.append(-float(p.gather(1, asked).mean()))
            after.append(-float(q.gather(1, asked).mean()))
            kl.append(float((p.exp() * (p - q)).sum(-1).mean()))
            same.append(float((p.argmax(-1) == q.argmax(-1)).float().mean()))
            if unhealed is not None:
                with base.without(unhealed):
                    between.append(-float(_logs(base, ids, width).gather(1, asked).mean()))
            advance(1)
    differences = np.subtract(after, before)
    return TextLoss(
        source=source,
        windows=len(windows),
        tokens=sum(len(window) - 1 for window in windows),
        base_nats=float(np.mean(before)),
        nats=float(np.mean(after)),
        unhealed_nats=float(np.mean(between)) if between else None,
        difference=float(differences.mean()),
        interval=bootstrap_interval([differences], seed=seed),
        kl=float(np.mean(kl)),
        top1_agreement=float(np.mean(same)),
    )


def _logs(loaded: LoadedModel, ids: torch.Tensor, width: int) -> torch.Tensor:
    logits: torch.Tensor = loaded.model(input_ids=ids.to(loaded.device), use_cache=False).logits[0, :-1, :width]
    return logits.float().log_softmax(-1)
