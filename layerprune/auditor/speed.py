"""Both models timed in turn, at several batch sizes, by the engine that the user names: transformers or vLLM."""

from __future__ import annotations

import gc
import inspect
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from layerprune.architecture import load_config
from layerprune.artifacts import BatchSpeed, MeasuredSpeed, Speed
from layerprune.errors import ModelError, one_line
from layerprune.models.model import LoadedModel
from layerprune.models.placement import free_memory, out_of_memory
from layerprune.util import SILENT, Progress

REPEATS = 7
CPU_REPEATS = 3  # of a larger batch on a CPU, where 32 prompts take minutes and vary less than one does
PROMPT_TOKENS = 256
NEW_TOKENS = 32
LARGER = (8, 32)  # batch sizes of an audit beside one sequence: a few users, and a small server

Clock = Callable[[int], dict[str, float]]  # times one run of so many sequences; seconds and tokens per second by name


def time_both(
    base: LoadedModel,
    pruned: LoadedModel,
    *,
    repeats: int = REPEATS,
    prompt_tokens: int = PROMPT_TOKENS,
    new_tokens: int = NEW_TOKENS,
    larger: Sequence[int] | None = None,
    progress: Progress = SILENT,
) -> Speed:
    """Time prefill and greedy decoding of one sequence, base and pruned alternating, after a warm-up of each.

    The prompt is shorter where the model does not read as many tokens. ``larger``: batch sizes to time as well, in
    ascending order; those for which there is no room are left out, and the result says so.
    """
    prompt_tokens = _prompt_tokens(prompt_tokens, new_tokens, base.positions)
    subjects = {"base": base, "pruned": pruned}
    clocks = {name: _clock(loaded, prompt_tokens, new_tokens) for name, loaded in subjects.items()}
    fewer = min(repeats, CPU_REPEATS) if base.device.type == "cpu" else repeats
    return Speed(
        **_alternate(clocks, 1, repeats, progress),
        batches=_batches(clocks, larger, fewer, progress),
        device=_devices(base, pruned),
        dtype=str(base.dtype).removeprefix("torch."),
        repeats=repeats,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        peak_bytes={name: _peak(subjects[name], clocks[name]) for name in subjects}
        if base.device.type == "cuda"
        else None,
        layers_kept=pruned.architecture.depth / base.architecture.depth,
        engine=f"transformers {version('transformers')}",
        threads=torch.get_num_threads(),
    )


def _prompt_tokens(wanted: int, new_tokens: int, positions: int | None) -> int:
    return wanted if positions is None else max(1, min(wanted, positions - new_tokens))


def _alternate(
    clocks: Mapping[str, Clock], batch_size: int, repeats: int, progress: Progress
) -> dict[str, dict[str, MeasuredSpeed]]:
    """Return the medians of both models by name."""
    taken: dict[str, list[dict[str, float]]] = {name: [] for name in clocks}
    label = "timing both models" + (f", batch size {batch_size}" if batch_size > 1 else "")
    with progress.task(label, len(clocks) * (repeats + 1), "runs") as advance:
        for repeat in range(repeats + 1):
            # who goes first changes from round to round: a machine that warms up or slows down favours neither
            for name in sorted(clocks, reverse=bool(repeat % 2)):
                found = clocks[name](batch_size)
                if repeat:  # the first is the warm-up
                    taken[name].append(found)
                advance(1)
    return {name: _medians(runs) for name, runs in taken.items()}


def _batches(
    clocks: Mapping[str, Clock], sizes: Sequence[int] | None, repeats: int, progress: Progress
) -> tuple[BatchSpeed, ...] | None:
    """Time the batch sizes in ascending order; once one finds no room, it and those above it are left out."""
    found: list[BatchSpeed] = []
    why = ""
    for size in sizes or ():
        if not why:
            try:
                timed = _alternate(clocks, size, repeats, progress)
                found.append(BatchSpeed(batch_size=size, repeats=repeats, **timed))
                continue
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                why = f"no room in memory for {size} sequences"
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        progress.note(f"batch size {size} is not timed: {why}")
        found.append(BatchSpeed(batch_size=size, left_out=why))
    return None if sizes is None else tuple(found)


def _medians(runs: list[dict[str, float]]) -> dict[str, MeasuredSpeed]:
    found = {name: np.quantile([run[name] for run in runs], [0.25, 0.5, 0.75]).tolist() for name in runs[0]}
    return {name: MeasuredSpeed(median=median, low=low, high=high) for name, (low, median, high) in found.items()}


def _figures(tokens: tuple[int, int], first: float, decoding: float) -> dict[str, float]:
    """Return the figures of a run: (read, generated) tokens, seconds to the first token and of the others."""
    read, generated = tokens
    return {
        "first_token_s": first,
        "prefill_tokens_per_s": read / first,
        "decode_tokens_per_s": generated / decoding,
    }


# transformers: forwards with a key-value cache, as ``generate`` makes them, in this process.


def _clock(loaded: LoadedModel, prompt_tokens: int, new_tokens: int) -> Clock:
    places = {parameter.device for parameter in loaded.model.parameters()} | {loaded.device}
    cards = sorted({place for place in places if place.type == "cuda"}, key=str)
    # the logits of the last token alone, where the model can: no more of a prompt's are needed to go on
    last = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(loaded.model.forward).parameters else {}

    def now() -> float:
        for card in cards:
            torch.cuda.synchronize(card)
        return time.perf_counter()

    @torch.no_grad()
    def run(batch_size: int) -> dict[str, float]:
        if batch_size > 1 and loaded.device.type == "cpu":
            _check_room(loaded, batch_size * (prompt_tokens + new_tokens))
        ids = torch.arange(batch_size * prompt_tokens, device=loaded.device).reshape(batch_size, prompt_tokens)
        ids %= loaded.vocabulary
        start = now()
        out = loaded.model(input_ids=ids, use_cache=True, **last)
        token = out.logits[:, -1:].argmax(-1)  # (batch, 1)
        first = now()
        for _ in range(new_tokens):
            out = loaded.model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
            token = out.logits[:, -1:].argmax(-1)
        end = now()
        return _figures((ids.numel(), batch_size * new_tokens), first - start, end - first)

    return run


def _check_room(loaded: LoadedModel, tokens: int) -> None:
    """Raise ``MemoryError`` where main memory has no room for the cache: a system may end the process instead."""
    needed = 2 * tokens * loaded.cache_bytes  # a layer's part is copied when a token comes
    if needed > free_memory("cpu"):
        raise MemoryError(f"the key-value cache of {tokens} tokens takes {needed} bytes")


def _peak(loaded: LoadedModel, clock: Clock) -> int:
    """Return the accelerator memory of one run above what both models' weights take, plus this model's weights."""
    weights = [weight for weight in loaded.model.parameters() if not weight.is_meta]  # those that come and go are above
    cards = {weight.device for weight in weights if weight.device.type == "cuda"}
    for card in cards:
        torch.cuda.reset_peak_memory_stats(card)
    before = {card: torch.cuda.memory_allocated(card) for card in cards}
    clock(1)
    above = sum(torch.cuda.max_memory_allocated(card) - before[card] for card in cards)
    return int(above + sum(weight.nbytes for weight in weights))


def _devices(base: LoadedModel, pruned: LoadedModel) -> str:
    """Return where both models lie; where they lie on different devices, where each does."""
    own, other = _device_name(base), _device_name(pruned)
    return own if own == other else f"{own} (base), {other} (pruned)"


def _device_name(loaded: LoadedModel) -> str:
    if loaded.device.type == "cuda":
        places = {parameter.device for parameter in loaded.model.parameters()}
        names = Counter(torch.cuda.get_device_name(place) for place in places if place.type == "cuda")
        return ", ".join(name if count == 1 else f"{count} x {name}" for name, count in sorted(names.items()))
    threads = torch.get_num_threads()
    return f"{loaded.device.type}, {threads} thread{'s' if threads != 1 else ''}"


# vLLM: what a server of its kind gives, all sequences of a batch asked at once (continuous batching, CUDA graphs).
#
# It has no clock between prompt and answer, so a run asks twice, for one token and for all. Both models are held at
# once, so that they can alternate; each gets the same share of the card, and nothing is kept of earlier prompts.


SHARE = 0.4  # of a card's memory for each of the two, which leaves some for CUDA graphs and what else is there


def time_vllm(
    base: Path,
    pruned: Path,
    layers_kept: float,
    *,
    dtype: str = "auto",
    trust_remote_code: bool = False,
    repeats: int = REPEATS,
    larger: Sequence[int] = LARGER,
    progress: Progress = SILENT,
) -> Speed:
    """Time two checkpoints in vLLM; raises ``ModelError`` where it cannot load or run one of them."""
    import vllm

    config = load_config(str(base), trust_remote_code=trust_remote_code).get_text_config(decoder=True)
    prompt_tokens = _prompt_tokens(PROMPT_TOKENS, NEW_TOKENS + 1, getattr(config, "max_position_embeddings", None))
    engines: dict[str, Any] = {}
    clocks: dict[str, Clock] = {}
    try:
        for name, folder in (("base", base), ("pruned", pruned)):
            progress.note(f"vLLM loads {folder}")
            engines[name] = vllm.LLM(
                model=str(folder),
                dtype=dtype,
                trust_remote_code=trust_remote_code,
                max_model_len=prompt_tokens + NEW_TOKENS + 1,
                gpu_memory_utilization=SHARE,
                enable_prefix_caching=False,
                seed=0,
            )
        clocks |= {name: _vllm_clock(own, prompt_tokens, config.vocab_size) for name, own in engines.items()}
        return Speed(
            **_alternate(clocks, 1, repeats, progress),
            batches=_batches(clocks, larger, repeats, progress),
            device=torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
            dtype=str(engines["base"].llm_engine.model_config.dtype).removeprefix("torch."),
            repeats=repeats,
            prompt_tokens=prompt_tokens,
            new_tokens=NEW_TOKENS,
            peak_bytes=None,  # it takes its whole share from the start
            layers_kept=layers_kept,
            engine=f"vllm {vllm.__version__}",
        )
    except Exception as error:  # its engine raises what it likes, of a process of its own
        raise ModelError(f"vLLM cannot time {base.name} and {pruned.name}: {one_line(error)}") from error
    finally:
        for held in (clocks, engines):
            held.clear()
        gc.collect()  # the engines' processes end with them, and the card is free for the audit


def _vllm_clock(engine: Any, prompt_tokens: int, vocabulary: int) -> Clock:
    import vllm

    def seconds(prompts: list[dict[str, list[int]]], new_tokens: int) -> float:
        asked = vllm.SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True)
        start = time.perf_counter()
        engine.generate(prompts, asked, use_tqdm=False)
        return time.perf_counter() - start

    def run(batch_size: int) -> dict[str, float]:
        ids = (np.arange(batch_size * prompt_tokens) % vocabulary).reshape(batch_size, prompt_tokens)
        prompts = [{"prompt_token_ids": row} for row in ids.tolist()]
        first = seconds(prompts, 1)
        decoding = seconds(prompts, NEW_TOKENS + 1) - first
        if not decoding > 0:
            raise ModelError("one token took as long as all of them; other work may be on the device: try again")
        return _figures((ids.size, batch_size * NEW_TOKENS), first, decoding)

    return run
