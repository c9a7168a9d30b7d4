"""Does the pruned model still write? Fixed prompts continued, and how far it agrees with the base's own answers."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from layerprune.artifacts import OWN_ANSWER, AnswerAgreement, Continuation, Generation, Interval, Outcomes, OwnAnswers
from layerprune.data.corpus import render
from layerprune.data.items import (
    AgreementJudge,
    EvalSet,
    EvalTask,
    OwnAnswer,
    fingerprint,
    is_written,
    own_answer_items,
)
from layerprune.models.generation import can_be_batched, padded
from layerprune.models.model import LoadedModel
from layerprune.scoring.cached_evaluator import own_answers
from layerprune.scoring.engine import Engine
from layerprune.stats import bootstrap_interval
from layerprune.util import SILENT, Progress

# Does the pruned model still write? Greedy continuations of fixed prompts, looked at for what breaks first.
#
# Choice accuracy can survive a removal that text generation does not (arXiv:2602.01997).


# A text is faulty from these values on. They lie between what SmolLM2-135M-Instruct writes intact, greedily and drawn
# at random, and what it writes without 4, 8 and 12 layers (docs/notes/2026-11-25-audit.md has the spreads).
REPEATED = 0.25  # share of 4-token windows that the text has had before; intact: at most 0.13
AT_ONCE = 4  # an ending before this many tokens answers none of the prompts
SHORT = 1 / 3  # of the base's length: a text the model ends before that is cut short (measured: "The sky is blue.")
UNLIKELY = 2.5  # nats per token the base gives it; intact, drawn at random: at most 1.3; prose by others: 2.9
WORSE = 0.25  # share of prompts, beyond the base's own faults, from which on the model is called unhealthy


@torch.no_grad()
def surprise(judge: LoadedModel, text: Continued) -> float | None:
    """Return the nats per token that ``judge`` needs for a text after its prompt; None for an empty text."""
    if not text.ids:
        return None
    ids = torch.tensor([[*text.prompt_ids, *text.ids]], device=judge.device)
    logs = judge.model(input_ids=ids, use_cache=False).logits[0, len(text.prompt_ids) - 1 : -1].float().log_softmax(-1)
    asked = torch.tensor(text.ids, device=logs.device)
    return -float(logs.gather(1, asked[:, None]).mean())


def faults(text: Continued, nats: float | None, expected: int = 0) -> tuple[str, ...]:
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


def health(
    judge: LoadedModel, prompts: Sequence[str], base: Sequence[Continued], pruned: Sequence[Continued]
) -> Generation:
    """Compare both models' texts; ``judge`` is the base model, which tells likely words from unlikely ones."""
    continuations, agreed = [], []
    for prompt, ours, theirs in zip(prompts, base, pruned, strict=True):
        nats, base_nats = surprise(judge, theirs), surprise(judge, ours)
        shared = _shared(ours.ids, theirs.ids)
        continuations.append(
            Continuation(
                prompt=prompt,
                base=ours.text,
                pruned=theirs.text,
                shared_tokens=shared,
                faults=faults(theirs, nats, len(ours.ids)),
                base_faults=faults(ours, base_nats),
                nats=nats,
                base_nats=base_nats,
            )
        )
        # the share of the longer text that both have in common from the start; 1 for equal texts
        agreed.append(1.0 if ours.ids == theirs.ids else shared / max(len(ours.ids), len(theirs.ids)))
    return Generation(
        max_new_tokens=NEW_TOKENS,
        **counts(continuations),
        agreement=sum(agreed) / len(agreed),
        continuations=tuple(continuations),
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


def _shared(a: Sequence[int], b: Sequence[int]) -> int:
    return next((place for place, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


# Greedy continuations of prompts, as a user of the model would get them.


NEW_TOKENS = 48


@dataclass(frozen=True)
class Continued:
    """One greedy continuation."""

    prompt_ids: tuple[int, ...]
    ids: tuple[int, ...]  # without the end mark
    text: str
    ended: bool  # the model ended it itself


def write(
    loaded: LoadedModel, prompts: Sequence[str], progress: Progress = SILENT, label: str = "writing"
) -> list[Continued]:
    """Continue each prompt greedily by up to ``NEW_TOKENS`` tokens, through the chat template where there is one."""
    encoded = [_encoded(loaded.tokenizer, prompt) for prompt in prompts]
    batches = [encoded] if can_be_batched(loaded, encoded) else [[prompt] for prompt in encoded]
    texts = []
    with progress.task(label, len(prompts), "texts") as advance:
        for batch in batches:
            texts += _continue(loaded, batch)
            advance(len(batch))
    return texts


def _encoded(tokenizer: Any, prompt: str) -> list[int]:
    if getattr(tokenizer, "chat_template", None):
        turn = [{"role": "user", "content": prompt}]
        return list(tokenizer(render(tokenizer, turn, True), add_special_tokens=False)["input_ids"])
    return list(tokenizer(prompt + "\n")["input_ids"])


@torch.no_grad()
def _continue(loaded: LoadedModel, prompts: Sequence[Sequence[int]]) -> list[Continued]:
    from transformers import GenerationConfig

    ends = loaded.encoder.ends
    settings = GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=sorted(ends) or None, pad_token_id=min(ends, default=0)
    )
    ids, mask = (tensor.to(loaded.device) for tensor in padded(prompts))
    found = loaded.model.generate(ids, attention_mask=mask, generation_config=settings)  # type: ignore[operator]
    texts = []
    for prompt, row in zip(prompts, found[:, ids.shape[1] :].tolist(), strict=True):
        stop = next((place for place, token in enumerate(row) if token in ends), len(row))
        text = str(loaded.tokenizer.decode(row[:stop], skip_special_tokens=False))
        texts.append(Continued(tuple(prompt), tuple(row[:stop]), text, ended=stop < len(row)))
    return texts


# The fixed prompts of the generation check: open questions of several kinds, none with a short answer.


PROMPTS = (
    "Explain to a child why the sky is blue.",
    "Describe how bread is made, from the field to the table.",
    "Tell a short story about a lighthouse keeper who finds a letter in a bottle.",
    "What should a visitor know before walking in the mountains in winter?",
    "Write a friendly message that invites a neighbour to dinner on Saturday.",
    "Name some differences between a river and a lake, and explain each of them.",
    "Give advice to somebody who starts a new job next week.",
    "Describe a busy market in the morning, with its sounds and smells.",
    "How does a bicycle stay upright while it is moving?",
    "Summarise what happens to water when it is heated from ice to steam.",
    "Write a Python function that counts the vowels in a text, and explain it.",
    "Discuss the advantages and disadvantages of living in a big city.",
)


# How far smaller models go along with what the base wrote: its own answers, read again token by token.
#
# Free generation parts at the first other token, and nothing behind that can be compared; read with teacher forcing
# every token counts, and a pass over prompt and answer is all it costs.


SAMPLES = "sample prompts"


def own_answers_of(
    engine: Engine, eval_set: EvalSet, prompts: Sequence[str], texts: Sequence[Continued], progress: Progress
) -> EvalSet:
    """Return the base's answers as items to be read: to the tasks that have it write, and to the sample prompts.

    ``texts`` are what the base wrote to the sample ``prompts``; an empty one is nothing to read.
    """
    written = {name: task for name, task in eval_set.tasks.items() if is_written(task)}
    tasks = dict(own_answers(engine, EvalSet(written), progress=progress).tasks) if written else {}
    own = {
        fingerprint(prompt): OwnAnswer(text.prompt_ids, text.ids, None)
        for prompt, text in zip(prompts, texts, strict=True)
        if text.ids
    }
    if own:
        items = own_answer_items(own)
        tasks[SAMPLES] = EvalTask(SAMPLES, "the same for all models", OWN_ANSWER, 0, items, AgreementJudge())
    return EvalSet(tasks)


def agreement(
    eval_set: EvalSet, base: Mapping[str, Outcomes], models: Mapping[str, Mapping[str, Outcomes]], seed: int
) -> tuple[OwnAnswers, ...]:
    """Return each model beside the base on the answers to each task's prompts."""
    return tuple(
        OwnAnswers(
            task=name,
            fingerprints=tuple(item.fingerprint for item in task.items),
            tokens=sum(part.scored for item in task.items for query in item.queries for part in query.parts),
            base_outcomes=base[name],
            models={label: followed(base[name], found[name], seed) for label, found in models.items()},
        )
        for name, task in eval_set.tasks.items()
    )


def followed(base: Outcomes, other: Outcomes, seed: int) -> AnswerAgreement:
    """Return what a model loses of the base's answers, from both models' outcomes item by item."""
    lost = np.subtract(base.answer or (), other.answer or ())
    agreed = np.array(other.agreed or ())
    return AnswerAgreement(
        nats=float(lost.mean()),
        interval=_interval(lost, seed),
        agreed=float(agreed.mean()),
        agreed_interval=_interval(agreed, seed),
        outcomes=other,
    )


def _interval(values: NDArray[np.float64], seed: int) -> Interval | None:
    return bootstrap_interval([values], seed=seed) if len(values) > 1 else None
