"""What was gained: both models timed in turn in one process, and the memory their caches take."""

from __future__ import annotations

import time

import numpy as np
import torch

from layerprune.documents import Measured, Speed
from layerprune.progress import SILENT, Progress
from layerprune.subject import Subject

REPEATS = 7
PROMPT_TOKENS = 256
NEW_TOKENS = 32


def cache_bytes_per_token(subject: Subject) -> int | None:
    """Return the bytes one more token adds to the key-value cache; None where layers keep other state."""
    sizes = [_cache_bytes(subject, tokens) for tokens in (8, 16)]
    if sizes[0] is None or sizes[1] is None:
        return None
    return (sizes[1] - sizes[0]) // 8


@torch.no_grad()
def _cache_bytes(subject: Subject, tokens: int) -> int | None:
    ids = torch.zeros(1, tokens, dtype=torch.long, device=subject.device)
    layers = getattr(subject.model(input_ids=ids, use_cache=True).get("past_key_values"), "layers", None)
    if not layers or any(not isinstance(getattr(layer, "keys", None), torch.Tensor) for layer in layers):
        return None
    return sum(int(layer.keys.nbytes + layer.values.nbytes) for layer in layers)


def time_both(
    base: Subject,
    pruned: Subject,
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
        layers_kept=pruned.anatomy.depth / base.anatomy.depth,
    )


@torch.no_grad()
def _time(subject: Subject, prompt_tokens: int, new_tokens: int) -> dict[str, float]:
    """Return seconds to the first token and rates in tokens per second of one run."""
    ids = torch.arange(prompt_tokens, device=subject.device)[None] % subject.vocabulary
    start = _now(subject)
    out = subject.model(input_ids=ids, use_cache=True)
    token = out.logits[:, -1:].argmax(-1)
    first = _now(subject)
    for _ in range(new_tokens):
        out = subject.model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
        token = out.logits[:, -1:].argmax(-1)
    end = _now(subject)
    return {
        "first_token_s": first - start,
        "prefill_tokens_per_s": prompt_tokens / (first - start),
        "decode_tokens_per_s": new_tokens / (end - first),
    }


def _now(subject: Subject) -> float:
    if subject.device.type == "cuda":
        torch.cuda.synchronize(subject.device)
    return time.perf_counter()


def _peak(subject: Subject, prompt_tokens: int, new_tokens: int) -> int:
    """Return the accelerator memory of one run above what both models' weights take, plus this model's weights."""
    torch.cuda.reset_peak_memory_stats(subject.device)
    before = torch.cuda.memory_allocated(subject.device)
    _time(subject, prompt_tokens, new_tokens)
    weights = sum(parameter.nbytes for parameter in subject.model.parameters())
    return int(torch.cuda.max_memory_allocated(subject.device) - before + weights)


def _medians(runs: list[dict[str, float]]) -> dict[str, Measured]:
    def measured(name: str) -> Measured:
        low, median, high = np.quantile([run[name] for run in runs], [0.25, 0.5, 0.75]).tolist()
        return Measured(median=median, low=low, high=high)

    return {name: measured(name) for name in runs[0]}


def _device_name(subject: Subject) -> str:
    if subject.device.type == "cuda":
        return torch.cuda.get_device_name(subject.device)
    threads = torch.get_num_threads()
    return f"{subject.device.type}, {threads} thread{'s' if threads != 1 else ''}"
