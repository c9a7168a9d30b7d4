"""Both models timed in turn in one process, their memory, and both on running text."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from layerprune import parsing
from layerprune.artifacts import MeasuredSpeed, Speed, TextLoss
from layerprune.errors import UsageError
from layerprune.models.model import LoadedModel
from layerprune.parsing import MOST_TEXT_BYTES, parse_json
from layerprune.removal import Removal
from layerprune.stats import bootstrap_interval
from layerprune.util import SILENT, Progress

# What was gained: both models timed in turn in one process, and the memory their caches take.


REPEATS = 7
PROMPT_TOKENS = 256
NEW_TOKENS = 32


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


def time_both(
    base: LoadedModel,
    pruned: LoadedModel,
    *,
    repeats: int = REPEATS,
    prompt_tokens: int = PROMPT_TOKENS,
    new_tokens: int = NEW_TOKENS,
    progress: Progress = SILENT,
) -> Speed:
    """Time prefill and greedy decoding of one sequence, base and pruned alternating, after a warm-up of each.

    The prompt is shorter where the model does not read as many tokens.
    """
    if base.positions is not None:
        prompt_tokens = max(1, min(prompt_tokens, base.positions - new_tokens))
    taken: dict[str, list[dict[str, float]]] = {"base": [], "pruned": []}
    subjects = {"base": base, "pruned": pruned}
    with progress.task("timing both models", 2 * (repeats + 1), "runs") as advance:
        for repeat in range(repeats + 1):
            # who goes first changes from round to round: a machine that warms up or slows down favours neither
            for name in sorted(subjects, reverse=bool(repeat % 2)):
                found = _time(subjects[name], prompt_tokens, new_tokens)
                if repeat:  # the first is the warm-up
                    taken[name].append(found)
                advance(1)
    return Speed(
        device=_device_name(base),
        dtype=str(base.dtype).removeprefix("torch."),
        repeats=repeats,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        base=_medians(taken["base"]),
        pruned=_medians(taken["pruned"]),
        peak_bytes={name: _peak(subjects[name], prompt_tokens, new_tokens) for name in subjects}
        if base.device.type == "cuda"
        else None,
        layers_kept=pruned.architecture.depth / base.architecture.depth,
    )


@torch.no_grad()
def _time(loaded: LoadedModel, prompt_tokens: int, new_tokens: int) -> dict[str, float]:
    """Return seconds to the first token and rates in tokens per second of one run."""
    ids = torch.arange(prompt_tokens, device=loaded.device)[None] % loaded.vocabulary
    start = _now(loaded)
    out = loaded.model(input_ids=ids, use_cache=True)
    token = out.logits[:, -1:].argmax(-1)
    first = _now(loaded)
    for _ in range(new_tokens):
        out = loaded.model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
        token = out.logits[:, -1:].argmax(-1)
    end = _now(loaded)
    return {
        "first_token_s": first - start,
        "prefill_tokens_per_s": prompt_tokens / (first - start),
        "decode_tokens_per_s": new_tokens / (end - first),
    }


def _now(loaded: LoadedModel) -> float:
    if loaded.device.type == "cuda":
        torch.cuda.synchronize(loaded.device)
    return time.perf_counter()


def _peak(loaded: LoadedModel, prompt_tokens: int, new_tokens: int) -> int:
    """Return the accelerator memory of one run above what both models' weights take, plus this model's weights."""
    torch.cuda.reset_peak_memory_stats(loaded.device)
    before = torch.cuda.memory_allocated(loaded.device)
    _time(loaded, prompt_tokens, new_tokens)
    weights = sum(parameter.nbytes for parameter in loaded.model.parameters())
    return int(torch.cuda.max_memory_allocated(loaded.device) - before + weights)


def _medians(runs: list[dict[str, float]]) -> dict[str, MeasuredSpeed]:
    found = {name: np.quantile([run[name] for run in runs], [0.25, 0.5, 0.75]).tolist() for name in runs[0]}
    return {name: MeasuredSpeed(median=median, low=low, high=high) for name, (low, median, high) in found.items()}


def _device_name(loaded: LoadedModel) -> str:
    if loaded.device.type == "cuda":
        return torch.cuda.get_device_name(loaded.device)
    threads = torch.get_num_threads()
    return f"{loaded.device.type}, {threads} thread{'s' if threads != 1 else ''}"


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
    """
    before, after, between, kl, same = [], [], [], [], []
    with progress.task("reading text with both models", len(windows), "windows") as advance:
        for window in windows:
            ids = torch.tensor([list(window)])
            p, q = _logs(base, ids), _logs(pruned, ids)  # (tokens - 1, vocabulary)
            asked = ids[0, 1:, None].to(p.device)
            before.append(-float(p.gather(1, asked).mean()))
            after.append(-float(q.gather(1, asked).mean()))
            kl.append(float((p.exp() * (p - q)).sum(-1).mean()))
            same.append(float((p.argmax(-1) == q.argmax(-1)).float().mean()))
            if unhealed is not None:
                with base.without(unhealed):
                    between.append(-float(_logs(base, ids).gather(1, asked).mean()))
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


def _logs(loaded: LoadedModel, ids: torch.Tensor) -> torch.Tensor:
    logits: torch.Tensor = loaded.model(input_ids=ids.to(loaded.device), use_cache=False).logits[0, :-1]
    return logits.float().log_softmax(-1)
