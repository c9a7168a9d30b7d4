"""From lm-eval instances to token ids, with lm-eval's own tokenisation and truncation rules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from layerprune.errors import TaskError
from layerprune.tasks.items import Generation, Query, Request


class Encoder(Protocol):
    """The part of lm-eval's ``TemplateLM`` that turns text into tokens (``Subject.encoder`` is an ``HFLM``)."""

    max_length: int
    tokenizer: Any

    @property
    def prefix_token_id(self) -> int: ...

    def tok_encode(self, string: str, add_special_tokens: bool | None = None) -> list[int]: ...

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str: ...

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]: ...


def encode(instance: Any, encoder: Encoder) -> Query:
    """Turn one lm-eval instance into a query; raises ``TaskError`` for a request type that is not known."""
    match instance.request_type:
        case "loglikelihood":
            return Query((_pair(*instance.args, encoder),))
        case "loglikelihood_rolling":
            return Query(tuple(_windows(instance.args[0], encoder)), rolling=True)
        case "generate_until":
            return Query(generation=Generation(instance))
    kind = instance.request_type
    raise TaskError(f"the task {instance.task_name!r} asks for {kind!r}, which layerprune cannot score")


def _pair(context: str, continuation: str, encoder: Encoder) -> Request:
    if context == "":
        asked = list(encoder.tok_encode(continuation, add_special_tokens=False))
        given = [encoder.prefix_token_id]
        if asked[:1] == given:  # the text brings its own first token
            given, asked = asked[:1], asked[1:]
    else:
        given, asked = encoder._encode_pair(context, continuation)
    return _cut(given, asked, encoder.max_length)


def _windows(text: str, encoder: Encoder) -> list[Request]:
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    windows = get_rolling_token_windows(
        token_list=encoder.tok_encode(text),
        prefix_token=encoder.prefix_token_id,
        max_seq_len=encoder.max_length,
        context_len=1,
    )
    return [_cut(*make_disjoint_window(window), encoder.max_length) for window in windows]


def _cut(given: Sequence[int], asked: Sequence[int], max_length: int) -> Request:
    """Keep the last ``max_length`` inputs plus the final target, as lm-eval does."""
    if not asked or not given:
        raise TaskError(f"a request has {len(given)} context and {len(asked)} answer tokens; both must be at least 1")
    tokens = (*given, *asked)[-(max_length + 1) :]
    return Request(tuple(int(token) for token in tokens), min(len(asked), len(tokens) - 1))
