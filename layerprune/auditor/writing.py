"""Does the pruned model still write? Greedy continuations of fixed prompts, looked at for what breaks first.

Choice accuracy can survive a removal that text generation does not (arXiv:2602.01997).
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import Any

import torch

from layerprune.auditor.continuing import NEW_TOKENS, Text
from layerprune.documents import Continuation, Generation
from layerprune.subject import Subject

# A text is faulty from these values on. They lie between what SmolLM2-135M-Instruct writes intact, greedily and drawn
# at random, and what it writes without 4, 8 and 12 layers (docs/notes/2026-11-25-audit.md has the spreads).
REPEATED = 0.25  # share of 4-token windows that the text has had before; intact: at most 0.13
AT_ONCE = 4  # an ending before this many tokens answers none of the prompts
SHORT = 1 / 3  # of the base's length: a text the model ends before that is cut short (measured: "The sky is blue.")
UNLIKELY = 2.5  # nats per token the base gives it; intact, drawn at random: at most 1.3; prose by others: 2.9
WORSE = 0.25  # share of prompts, beyond the base's own faults, from which on the model is called unhealthy


@torch.no_grad()
def surprise(judge: Subject, text: Text) -> float | None:
    """Return the nats per token that ``judge`` needs for a text after its prompt; None for an empty text."""
    if not text.ids:
        return None
    ids = torch.tensor([[*text.prompt_ids, *text.ids]], device=judge.device)
    logs = judge.model(input_ids=ids, use_cache=False).logits[0, len(text.prompt_ids) - 1 : -1].float().log_softmax(-1)
    asked = torch.tensor(text.ids, device=logs.device)
    return -float(logs.gather(1, asked[:, None]).mean())


def faults(text: Text, nats: float | None, expected: int = 0) -> tuple[str, ...]:
    """Return what is wrong with a text: empty, early stop, repeats, broken characters, unlikely; nothing if sound.

    ``nats`` is its ``surprise``, ``expected`` the length in tokens of the base model's text for the same prompt.
    """
    if not text.text.strip():
        return ("empty",)
    found = []
    if text.ended and len(text.ids) < max(AT_ONCE, SHORT * expected):
        found.append("early stop")
    if repeated_share(text.ids) >= REPEATED:
        found.append("repeats")
    if _has_broken_characters(text.text):
        found.append("broken")
    if nats is not None and nats >= UNLIKELY:
        found.append("unlikely")
    return tuple(found)


def repeated_share(ids: Sequence[int], width: int = 4) -> float:
    """Return the share of windows of ``width`` tokens that occurred before in the same text."""
    windows = [tuple(ids[start : start + width]) for start in range(len(ids) - width + 1)]
    return 1 - len(set(windows)) / len(windows) if windows else 0.0


def _has_broken_characters(text: str) -> bool:
    """Whether bytes do not make up characters; the last ones may have been cut in the middle."""
    inside = text.rstrip("\N{REPLACEMENT CHARACTER}")
    return any(
        c == "\N{REPLACEMENT CHARACTER}" or (unicodedata.category(c) == "Cc" and c not in "\n\t\r") for c in inside
    )


def health(judge: Subject, prompts: Sequence[str], base: Sequence[Text], pruned: Sequence[Text]) -> Generation:
    """Compare both models' texts; ``judge`` is the base model, which tells likely words from unlikely ones."""
    continuations = tuple(
        _beside(judge, prompt, ours, theirs) for prompt, ours, theirs in zip(prompts, base, pruned, strict=True)
    )
    agreed = [_agreement(ours.ids, theirs.ids) for ours, theirs in zip(base, pruned, strict=True)]
    return Generation(
        max_new_tokens=NEW_TOKENS,
        **counts(continuations),
        agreement=sum(agreed) / len(agreed),
        continuations=continuations,
    )


def counts(continuations: Sequence[Continuation]) -> dict[str, Any]:
    """Return the figures of ``Generation`` that follow from the texts' faults: ``verify`` counts again."""
    faulty = sum(bool(one.faults) for one in continuations)
    base_faulty = sum(bool(one.base_faults) for one in continuations)
    return {
        "prompts": len(continuations),
        "faulty": faulty,
        "base_faulty": base_faulty,
        "healthy": faulty - base_faulty < WORSE * len(continuations),
    }


def _beside(judge: Subject, prompt: str, base: Text, pruned: Text) -> Continuation:
    nats, base_nats = surprise(judge, pruned), surprise(judge, base)
    return Continuation(
        prompt=prompt,
        base=base.text,
        pruned=pruned.text,
        shared_tokens=_shared(base.ids, pruned.ids),
        faults=faults(pruned, nats, len(base.ids)),
        base_faults=faults(base, base_nats),
        nats=nats,
        base_nats=base_nats,
    )


def _agreement(a: Sequence[int], b: Sequence[int]) -> float:
    """Return the share of the longer text that both have in common from the start; 1 for equal texts."""
    return 1.0 if a == b else _shared(a, b) / max(len(a), len(b))


def _shared(a: Sequence[int], b: Sequence[int]) -> int:
    return next((place for place, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
