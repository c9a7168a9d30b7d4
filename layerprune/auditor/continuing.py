"""Greedy continuations of prompts, as a user of the model would get them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from layerprune.generation import can_be_batched, padded
from layerprune.progress import SILENT, Progress
from layerprune.subject import Subject

NEW_TOKENS = 48


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


def _encoded(tokenizer: Any, prompt: str) -> list[int]:
    if getattr(tokenizer, "chat_template", None):
        turn = [{"role": "user", "content": prompt}]
        return list(tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=True)["input_ids"])
    return list(tokenizer(prompt + "\n")["input_ids"])


@torch.no_grad()
def _continue(subject: Subject, prompts: Sequence[Sequence[int]]) -> list[Text]:
    from transformers import GenerationConfig

    ends = subject.encoder.ends
    settings = GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=sorted(ends) or None, pad_token_id=min(ends, default=0)
    )
    ids, mask = (tensor.to(subject.device) for tensor in padded(prompts))
    found = subject.model.generate(ids, attention_mask=mask, generation_config=settings)  # type: ignore[operator]
    return [
        _text(subject, prompt, row[ids.shape[1] :].tolist(), ends) for prompt, row in zip(prompts, found, strict=True)
    ]


def _text(subject: Subject, prompt: Sequence[int], fresh: Sequence[int], ends: set[int]) -> Text:
    stop = next((place for place, token in enumerate(fresh) if token in ends), len(fresh))
    text = str(subject.tokenizer.decode(fresh[:stop], skip_special_tokens=False))
    return Text(tuple(prompt), tuple(fresh[:stop]), text, ended=stop < len(fresh))
