"""Greedy continuations of prompts, as a user of the model would get them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from layerprune.progress import SILENT, Progress
from layerprune.subject import Subject

NEW_TOKENS = 48
# Prompts are continued side by side, padded to the left, when the model answers them so as it answers each alone: mean
# KL of the first new token in nats. Measured on SmolLM2-135M-Instruct in bfloat16: 0.0015 by rounding, 0.094 where the
# padding is looked at. In float32 the tests' tiny model stays below the limit, and blinded goes beyond it.
EXACT = {torch.float64: 1e-9, torch.float32: 1e-5}
HALF = 0.02


@dataclass(frozen=True)
class Text:
    """One greedy continuation."""

    prompt_ids: tuple[int, ...]
    ids: tuple[int, ...]  # without the end mark
    text: str
    ended: bool  # the model ended it itself


def write(subject: Subject, prompts: Sequence[str], progress: Progress = SILENT, label: str = "writing") -> list[Text]:
    """Continue each prompt greedily by up to ``NEW_TOKENS`` tokens, through the chat template where there is one."""
    encoded = [_encoded(subject.tokenizer, prompt) for prompt in prompts]
    batches = [encoded] if can_be_batched(subject, encoded) else [[prompt] for prompt in encoded]
    texts = []
    with progress.task(label, len(prompts), "texts") as advance:
        for batch in batches:
            texts += _continue(subject, batch)
            advance(len(batch))
    return texts


@torch.no_grad()
def can_be_batched(subject: Subject, prompts: Sequence[Sequence[int]]) -> bool:
    """Whether the model gives padded prompts the next token that it gives each of them alone."""
    ids, mask = _padded(prompts)
    places = (mask.cumsum(-1) - 1).clamp(min=0)
    try:
        together = _next(subject, ids, attention_mask=mask.to(subject.device), position_ids=places.to(subject.device))
    except (TypeError, ValueError, RuntimeError):  # a model that takes no mask or position: one by one, then
        return False
    alone = torch.cat([_next(subject, torch.tensor([list(prompt)])) for prompt in prompts])
    difference = float((alone.exp() * (alone - together)).sum(-1).mean())
    return difference <= EXACT.get(subject.dtype, HALF)  # NaN is not


def _next(subject: Subject, ids: torch.Tensor, **inputs: torch.Tensor) -> torch.Tensor:
    """Return the log-probabilities of the next token, (rows, vocabulary)."""
    logits: torch.Tensor = subject.model(input_ids=ids.to(subject.device), use_cache=False, **inputs).logits[:, -1]
    return logits.double().log_softmax(-1)


def _padded(prompts: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids and mask, (rows, tokens), padded to the left so that all prompts end together."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return ids, mask


def _encoded(tokenizer: Any, prompt: str) -> list[int]:
    if getattr(tokenizer, "chat_template", None):
        turn = [{"role": "user", "content": prompt}]
        return list(tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=True)["input_ids"])
    return list(tokenizer(prompt + "\n")["input_ids"])


@torch.no_grad()
def _continue(subject: Subject, prompts: Sequence[Sequence[int]]) -> list[Text]:
    from transformers import GenerationConfig

    ends = _end_tokens(subject)
    settings = GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=sorted(ends) or None, pad_token_id=min(ends, default=0)
    )
    ids, mask = (tensor.to(subject.device) for tensor in _padded(prompts))
    found = subject.model.generate(ids, attention_mask=mask, generation_config=settings)  # type: ignore[operator]
    return [
        _text(subject, prompt, row[ids.shape[1] :].tolist(), ends) for prompt, row in zip(prompts, found, strict=True)
    ]


def _text(subject: Subject, prompt: Sequence[int], fresh: Sequence[int], ends: set[int]) -> Text:
    stop = next((place for place, token in enumerate(fresh) if token in ends), len(fresh))
    text = str(subject.tokenizer.decode(fresh[:stop], skip_special_tokens=False))
    return Text(tuple(prompt), tuple(fresh[:stop]), text, ended=stop < len(fresh))


def _end_tokens(subject: Subject) -> set[int]:
    own = subject.model.generation_config.eos_token_id
    listed = own if isinstance(own, list) else [own]
    return {int(token) for token in (*listed, subject.tokenizer.eos_token_id) if token is not None}
