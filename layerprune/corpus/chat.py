"""A chat as the model's own template renders it, with the assistant's tokens marked."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from layerprune.corpus.windows import Passage
from layerprune.errors import UsageError, one_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def chat_passage(tokenizer: PreTrainedTokenizerBase, messages: tuple[tuple[str, str], ...]) -> Passage:
    """Render and tokenise a chat; only the assistant's tokens count, with what ends its turn.

    An answer's text is what the rendered chat gains by it: the rendering up to and with the answer, less the rendering
    up to the point where the template asks the assistant to speak. Raises ``UsageError`` for a tokenizer without a
    template or one whose template rewrites earlier messages.
    """
    if not tokenizer.is_fast:
        raise UsageError(f"{type(tokenizer).__name__} gives no character offsets; chats need a fast tokenizer")
    turns = [{"role": role, "content": content} for role, content in messages]
    text = render(tokenizer, turns, False)
    spans: list[tuple[int, int]] = []
    for place, turn in enumerate(turns):
        if turn["role"] == "assistant":
            before = render(tokenizer, turns[:place], True)
            after = render(tokenizer, turns[: place + 1], False)
            if not after.startswith(before) or not text.startswith(after):
                raise UsageError("the model's chat template rewrites earlier messages; answers cannot be told apart")
            spans.append((len(before), len(after)))
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ends = [stop for _, stop in encoded["offset_mapping"]]
    counted = tuple(any(start < stop <= last for start, last in spans) for stop in ends)
    return Passage(tuple(encoded["input_ids"]), counted)


def render(tokenizer: PreTrainedTokenizerBase, turns: list[dict[str, str]], asked: bool) -> str:
    """Return a chat as the template renders it; ``asked``: up to where the assistant is to speak. ``UsageError``."""
    if not turns:
        raise UsageError("a chat begins with the assistant; put the user's message before it")
    try:
        text: Any = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=asked)
    except Exception as error:  # a jinja template raises what it likes
        raise UsageError(f"the model's chat template does not take a chat of the corpus: {one_line(error)}") from error
    return str(text)
