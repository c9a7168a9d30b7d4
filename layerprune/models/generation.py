"""Text generation under removals: lm-eval's own wrapper, in batches, with a key-value cache, on shared weights."""

from __future__ import annotations

import bisect
import contextlib
import io
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from torch.nn.utils.rnn import pad_sequence

from layerprune.architecture.stack import quiet
from layerprune.errors import ModelError, RefusedError, TaskError, one_line
from layerprune.models.bypass import pruned_view
from layerprune.removal import Removal
from layerprune.util import SILENT, Progress

if TYPE_CHECKING:
    from layerprune.models.model import LoadedModel


# Rows generated together at most; what their keys and values take is a second bound. A step reads all weights once
# for all rows. Neither number has been measured against others yet.
CPU_ROWS = 16
CUDA_ROWS = 256
# Prompts are continued side by side, padded to the left, when the model answers them so as it answers each alone: mean
# KL of the first new token in nats. Measured on SmolLM2-135M-Instruct in bfloat16: 0.0015 by rounding, 0.094 where the
# padding is looked at. In float32 the tests' tiny model stays below the limit, and blinded goes beyond it.
EXACT = {torch.float64: 1e-9, torch.float32: 1e-5}
HALF = 0.02


class Wrapper(HFLM):
    """lm-eval's Hugging Face model around one that is already loaded; ``_without`` puts another one in its place."""

    use_cache = True
    padded: bool | None = None  # whether the model may be given prompts padded to the left; None: not tried yet

    def _model_generate(self, context: Any, max_length: int, stop: list[str], **kwargs: Any) -> Any:
        generate = self.model.generate

        def chosen(**options: Any) -> Any:
            return generate(**{**options, "use_cache": self.use_cache})

        self.model.generate = chosen
        try:
            return super()._model_generate(context, max_length, stop, **kwargs)
        finally:
            del self.model.generate

    def tok_encode(self, string: Any, add_special_tokens: bool | None = None, **kwargs: Any) -> Any:
        try:
            ids = super().tok_encode(string, add_special_tokens, **kwargs)
        except TypeError as error:  # of a tokenizer without the token that stands before a text
            raise ModelError(f"the tokenizer cannot encode a text for lm-eval: {one_line(error)}") from error
        rows = self.model.get_input_embeddings().weight.shape[0]
        if beyond := [token for token in ids if isinstance(token, int) and token >= rows]:
            raise ModelError(
                f"the tokenizer gives token {beyond[0]}, and the model knows {rows}: they do not belong together"
            )
        return ids

    @cached_property
    def kept(self) -> dict[str, Written]:
        """What the intact model wrote, by prompt and settings: an audit asks for it twice."""
        return {}

    @property
    def ends(self) -> set[int]:
        """Tokens that end a text."""
        own = self.model.generation_config.eos_token_id
        listed = own if isinstance(own, list) else [own]
        return {int(token) for token in (*listed, self.tokenizer.eos_token_id) if token is not None}


def wrapped(model: Any, tokenizer: Any) -> Wrapper:
    """Wrap a loaded model; lm-eval's remarks on wrapping are not for our users."""
    with quiet("lm_eval.models.huggingface"), contextlib.redirect_stdout(io.StringIO()):
        return Wrapper(pretrained=model, tokenizer=tokenizer, batch_size=1)


@dataclass(frozen=True)
class Written:
    """What a model wrote for one prompt."""

    text: str  # without what ended it, as lm-eval hands it to a task
    prompt: tuple[int, ...]  # token ids
    ids: tuple[int, ...]  # of the answer, with the tokens that ended it


def generate(
    loaded: LoadedModel,
    instances: Sequence[Any],
    removal: Removal = Removal(()),  # noqa: B008  # frozen
    *,
    memory: int,
    rows: int | None = None,
    greedy: bool = False,
    done: Callable[[int], None] = lambda rows: None,
    progress: Progress = SILENT,
) -> list[Written]:
    """Return what the model without ``removal`` writes for each lm-eval generate_until instance, in order.

    Prompts are batched by length: ``rows`` of them, by default as many as their keys and values fit into ``memory``
    bytes, up to 16 on a CPU and 256 on a card; one by one where the model does not take padding. ``greedy``: whatever
    a task says of sampling. ``done`` hears of finished instances, ``progress`` of a model that has to do without a
    cache.
    """
    kept = {} if removal else loaded.encoder.kept
    marks = [_mark(loaded.encoder, instance, greedy) for instance in instances]
    found = {place: kept[mark] for place, mark in enumerate(marks) if mark in kept}
    done(len(found))
    missing = [place for place in range(len(instances)) if place not in found]
    asked = [instances[place] for place in missing]
    with _without(loaded, removal, progress):
        for batch in batches(loaded, asked, memory, rows) if asked else ():
            written = _write(loaded.encoder, [asked[number] for number in batch], greedy)
            found |= zip([missing[number] for number in batch], written, strict=True)
            done(len(batch))
    kept.update({mark: found[place] for place, mark in enumerate(marks) if mark is not None})
    return [found[place] for place in range(len(instances))]


def _mark(encoder: Wrapper, instance: Any, greedy: bool) -> str | None:
    """Return what a greedy text depends on; None for one that is sampled, which another time is another one."""
    settings = normalize_gen_kwargs(instance.args[1], encoder.max_gen_toks)
    if settings.pop("do_sample", False) and not greedy:
        return None
    return json.dumps([instance.args[0], settings], sort_keys=True, default=str)


def _write(encoder: Wrapper, instances: Sequence[Any], greedy: bool) -> list[Written]:
    """Generate for instances of one setting as lm-eval's ``generate_until`` does, and keep the tokens."""
    settings = normalize_gen_kwargs(instances[0].args[1], encoder.max_gen_toks)
    stops = handle_stop_sequences(
        settings.pop("until", None), eos=encoder.tok_decode(encoder.eot_token_id, skip_special_tokens=False)
    )
    new = int(settings.pop("max_gen_toks"))
    if new < 1:
        raise TaskError(f"the task {instances[0].task_name!r} lets the model write {new} tokens; needed is 1 or more")
    if encoder.max_length <= new:
        raise TaskError(
            f"the task {instances[0].task_name!r} lets the model write {new} tokens, and it reads "
            f"{encoder.max_length}: no room is left for a prompt"
        )
    ids, mask = encoder.tok_batch_encode(
        [instance.args[0] for instance in instances], left_truncate_len=encoder.max_length - new
    )
    if not mask.any(-1).all():  # lm-eval hands it to the model, which cannot go on from nothing
        raise TaskError(
            f"the task {instances[0].task_name!r} has a prompt of no tokens, from which the model cannot go on; leave "
            "the item out, or have its doc_to_text say something"
        )
    ids, mask = ids.to(encoder.device), mask.to(encoder.device)
    width = ids.shape[1]
    most = settings.pop("max_length", width + new)
    settings = {"do_sample": False} if greedy else settings
    whole = encoder._model_generate(context=ids, attention_mask=mask, stop=stops, max_length=most, **settings)
    return [
        _cut(encoder, ids[row][mask[row].bool()].tolist(), whole[row, width:].tolist(), stops)
        for row in range(len(instances))
    ]


def _cut(encoder: Wrapper, prompt: list[int], ids: list[int], stops: list[str]) -> Written:
    """Cut an answer behind its first end-of-text token, or the token that completes the first stop sequence."""
    text = postprocess_generated_text(encoder.tok_decode(ids), stops, None)
    ends = encoder.ends
    count = next((place + 1 for place, token in enumerate(ids) if token in ends), len(ids))

    def stopped(count: int) -> bool:
        said = encoder.tok_decode(ids[:count], skip_special_tokens=False)
        return any(stop in said for stop in stops if stop)

    if stopped(count):
        count = bisect.bisect_left(range(1, count + 1), True, key=stopped) + 1
    return Written(text, tuple(prompt), tuple(ids[:count]))


@contextmanager
def _without(loaded: LoadedModel, removal: Removal, progress: Progress) -> Iterator[None]:
    """Have the model's encoder generate without the layers of ``removal``: on a view, else bypassed and uncached."""
    encoder, view, uncached = loaded.encoder, loaded.model, Removal(())
    try:
        if removal:
            view = pruned_view(loaded.model, loaded.architecture, removal)
    except RefusedError as refusal:
        progress.note(f"generating without a key-value cache, which is slow: {refusal}")
        uncached = removal
    encoder._model, encoder.use_cache = view, not uncached
    try:
        with loaded.without(uncached):
            yield
    finally:
        encoder._model, encoder.use_cache = loaded.model, True


def batches(loaded: LoadedModel, instances: Sequence[Any], memory: int, rows: int | None = None) -> list[list[int]]:
    """Divide instances (by index) into batches of one setting and of like length, the longest first."""
    prompts = [loaded.encoder.tok_encode(instance.args[0]) for instance in instances]
    lengths = list(map(len, prompts))
    settings = [json.dumps(instance.args[1], sort_keys=True, default=str) for instance in instances]
    if rows != 1 and len(instances) > 1 and not _takes_padding(loaded, prompts):
        rows = 1
    most = rows or (CUDA_ROWS if loaded.device.type == "cuda" else CPU_ROWS)
    found: list[list[int]] = []
    for place in sorted(range(len(instances)), key=lambda place: (settings[place], -lengths[place])):
        first = found[-1][0] if found else None
        if first is not None and settings[first] == settings[place] and len(found[-1]) < most:
            new = normalize_gen_kwargs(instances[first].args[1], loaded.encoder.max_gen_toks)["max_gen_toks"]
            tokens = (lengths[first] + int(new)) * (len(found[-1]) + 1)
            if rows is not None or tokens * loaded.cache_bytes <= memory:
                found[-1].append(place)
                continue
        found.append([place])
    return found


def _takes_padding(loaded: LoadedModel, prompts: Sequence[Sequence[int]]) -> bool:
    """Whether the model may be given padded prompts, tried once on a few of them: the shortest and the longest too."""
    if loaded.encoder.padded is None:
        ordered = sorted(prompts, key=len)
        few = [ordered[0], ordered[len(ordered) // 2], ordered[-1]]
        loaded.encoder.padded = can_be_batched(loaded, few)
    return bool(loaded.encoder.padded)


@torch.no_grad()
def can_be_batched(loaded: LoadedModel, prompts: Sequence[Sequence[int]]) -> bool:
    """Whether the model gives padded prompts the next token that it gives each of them alone."""
    ids, mask = padded(prompts)
    places = (mask.cumsum(-1) - 1).clamp(min=0)
    try:
        together = _next(loaded, ids, attention_mask=mask.to(loaded.device), position_ids=places.to(loaded.device))
    except (TypeError, ValueError, RuntimeError):  # a model that takes no mask or position: one by one, then
        return False
    alone = torch.cat([_next(loaded, torch.tensor([list(prompt)])) for prompt in prompts])
    difference = float((alone.exp() * (alone - together)).sum(-1).mean())
    return difference <= EXACT.get(loaded.dtype, HALF)  # NaN is not


def padded(prompts: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids and mask, (rows, tokens), padded to the left so that all prompts end together."""
    rows = [torch.tensor(prompt, dtype=torch.long) for prompt in prompts]
    pad = partial(pad_sequence, batch_first=True, padding_side="left")
    return pad(rows), pad([torch.ones_like(row) for row in rows])


def _next(loaded: LoadedModel, ids: torch.Tensor, **inputs: torch.Tensor) -> torch.Tensor:
    """Return the log-probabilities of the next token, (rows, vocabulary)."""
    logits: torch.Tensor = loaded.model(input_ids=ids.to(loaded.device), use_cache=False, **inputs).logits[:, -1]
    return logits.double().log_softmax(-1)
