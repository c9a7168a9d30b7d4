"""Prompts as lm-eval makes them: a chat template, few-shot examples as turns, a system instruction."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from layerprune.config import PromptOptions
from layerprune.documents import PLAIN, Prompting
from layerprune.errors import UsageError, did_you_mean
from layerprune.tasks.encoding import Encoder
from layerprune.tasks.items import Questions


def prompting_of(config: PromptOptions, default: Prompting = PLAIN) -> Prompting:
    """Return the prompting that a command's options describe; see ``asked_prompting``."""
    return asked_prompting(
        config.apply_chat_template,
        config.fewshot_as_multiturn,
        config.system_instruction,
        config.num_fewshot,
        default=default,
    )


def asked_prompting(
    apply_chat_template: bool | str | None = None,
    fewshot_as_multiturn: bool | None = None,
    system_instruction: str | None = None,
    num_fewshot: int | None = None,
    *,
    default: Prompting = PLAIN,
) -> Prompting:
    """Return the prompting that options describe; nothing said keeps ``default``.

    As in lm-eval, examples are turns of their own under a chat template unless told otherwise. Raises ``UsageError``
    for turns without a chat template or without examples.
    """
    if apply_chat_template is None and fewshot_as_multiturn is None and system_instruction is None:
        return default
    chat = apply_chat_template or False
    if fewshot_as_multiturn and not chat:
        raise UsageError("--fewshot-as-multiturn makes turns of a chat; give --apply-chat-template too")
    if fewshot_as_multiturn and num_fewshot == 0:
        raise UsageError("--fewshot-as-multiturn needs examples, and --num-fewshot is 0; raise it, or leave one out")
    multiturn = bool(chat) if fewshot_as_multiturn is None else fewshot_as_multiturn
    return Prompting(
        apply_chat_template=chat, fewshot_as_multiturn=multiturn, system_instruction=system_instruction or None
    )


def check_turns(fewshot_as_multiturn: bool | None, questions: Questions) -> None:
    """Raise ``UsageError`` where turns were asked for and no task has examples to make turns of."""
    if fewshot_as_multiturn and not any(task.num_fewshot for task in questions.tasks.values()):
        names = ", ".join(questions.tasks)
        have = "has" if len(questions.tasks) == 1 else "have"
        raise UsageError(f"--fewshot-as-multiturn needs examples, and {names} {have} none: give --num-fewshot too")


@dataclass(frozen=True)
class Prompts:
    """A prompting with the tokenizer that carries it out."""

    prompting: Prompting
    encoder: Encoder
    template: Callable[..., str] | None  # renders a list of messages; None: plain text

    @classmethod
    def of(cls, prompting: Prompting, encoder: Encoder) -> Prompts:
        """Find the chat template; raises ``UsageError`` where the tokenizer does not have it."""
        if prompting.apply_chat_template is False:
            return cls(prompting, encoder, None)
        tokenizer: Any = encoder.tokenizer
        known = getattr(tokenizer, "chat_template", None)
        if not known:
            raise UsageError(
                "--apply-chat-template: the tokenizer has no chat template; leave it out, or add a chat_template.jinja "
                "to the model's folder"
            )
        name = prompting.apply_chat_template
        if name is True:
            return cls(prompting, encoder, encoder.apply_chat_template)
        names = sorted(known) if isinstance(known, dict) else []
        if name not in names:
            have = f"it has {', '.join(names)}" if names else "it has one, which needs no name"
            raise UsageError(
                f"--apply-chat-template: the tokenizer has no template named {name!r}; {have}."
                f"{did_you_mean(str(name), names)}"
            )
        return cls(prompting, encoder, partial(_named, encoder, name))

    @property
    def context(self) -> dict[str, Any]:
        """What ``fewshot_context`` takes; nothing for plain text, which every task class understands."""
        if self.prompting == PLAIN:
            return {}
        return {
            "system_instruction": self.prompting.system_instruction,
            "apply_chat_template": self.template is not None,
            "fewshot_as_multiturn": self.prompting.fewshot_as_multiturn,
            "chat_template": self.template,
        }

    @property
    def requests(self) -> dict[str, Any]:
        """What ``construct_requests`` takes."""
        return {} if self.template is None else {"apply_chat_template": True, "chat_template": self.template}


def _named(encoder: Encoder, name: str, messages: list[dict[str, str]], **options: Any) -> str:
    """Render a chat by one of a tokenizer's several templates."""
    tokenizer: Any = encoder.tokenizer
    whole = tokenizer.chat_template
    tokenizer.chat_template = whole[name]
    try:
        return encoder.apply_chat_template(messages, **options)
    finally:
        tokenizer.chat_template = whole
