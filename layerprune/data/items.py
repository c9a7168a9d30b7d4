"""Benchmark items as data: what to ask a model, in token ids, and how its answers are judged."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from layerprune.artifacts import OWN_ANSWER, PLAIN, Prompting, TaskData
from layerprune.errors import TaskError


@dataclass(frozen=True)
class Request:
    """One log-likelihood to measure: the model reads ``tokens[:-1]`` and the last ``scored`` tokens are graded."""

    tokens: tuple[int, ...]
    scored: int


@dataclass(frozen=True)
class Query:
    """One lm-eval instance. The log-likelihoods of a rolling query's parts (its windows) add up."""

    parts: tuple[Request, ...] = ()
    rolling: bool = False
    generation: Any = None  # one text to generate: an lm-eval generate_until instance
    counted: bool = False  # wanted is how many tokens are greedy, not whether all are

    def asked(self) -> list[Any]:
        """Return what the model is given, as JSON."""
        given = [str(part) for part in self.generation.args] if self.generation is not None else []
        return [self.rolling, [[part.scored, *part.tokens] for part in self.parts], given]


# What lm-eval expects back for one query: (sum of log-probabilities in nats, all tokens greedy), or generated text; of
# a counted query (sum, how many tokens are greedy).
Answer = tuple[float, bool | int] | float | str


@dataclass(frozen=True)
class Verdict:
    """What one item's answers were worth."""

    correct: bool
    gold_probability: float | None
    margin: float | None = None  # of the gold answer's log-likelihood over the best wrong one's
    finite: bool = True  # whether all its log-likelihoods were finite numbers
    answer: float | None = None  # log-likelihood of the intact model's own answer, nats per token
    agreed: float | None = None  # share of its tokens that are the most likely ones


@dataclass(frozen=True)
class EvalItem:
    """One question of one task."""

    fingerprint: str
    chance: float
    queries: tuple[Query, ...]
    key: Any = field(compare=False, default=None)  # the judge's own handle for the item
    answerable: bool = True  # whether its label is among its choices; else it is wrong, whatever the model says
    content: str = ""  # stands for the whole document: what judging may read and no question shows


# Turns a task's answers into verdicts; lm-eval's own processing behind it.
Judge = Callable[[EvalItem, Sequence[Answer]], Verdict]


@dataclass(frozen=True)
class EvalTask:
    """The items of one task that a step may use."""

    name: str
    split: str  # "train", or "half of test": what a reader needs to know about where the items come from
    metric: str
    num_fewshot: int
    items: tuple[EvalItem, ...]
    judge: Judge
    excluded: int = 0  # items left out because an earlier step has seen them
    prompting: Prompting = PLAIN
    definition: str = ""  # stands for the task's own config and code: metrics, filters, what ends a generation

    def data(self) -> TaskData:
        """Describe these items for a document."""
        return TaskData(
            task=self.name,
            split=self.split,
            items=len(self.items),
            fingerprints=tuple(item.fingerprint for item in self.items),
            num_fewshot=self.num_fewshot,
            metric=self.metric,
            chance=round(sum(item.chance for item in self.items) / len(self.items), 6),
            prompting=self.prompting,
        )

    def asked(self) -> Iterator[Any]:
        """Yield what is asked and how the task judges it, as JSON: the very tokens, and not the items alone.

        An item's fingerprint says which question it is; a description or examples before it are in its tokens only.
        """
        yield [self.name, self.metric, self.num_fewshot, self.definition]
        for item in self.items:
            yield [item.fingerprint, item.content, [query.asked() for query in item.queries]]


@dataclass(frozen=True)
class EvalSet:
    """All tasks' items, by task name."""

    tasks: dict[str, EvalTask]

    def __len__(self) -> int:
        return sum(len(task.items) for task in self.tasks.values())

    def data(self) -> tuple[TaskData, ...]:
        return tuple(task.data() for task in self.tasks.values())

    def remarks(self) -> list[str]:
        """Return what a user has to know of these items, a line each."""
        without = {name: [item.answerable for item in task.items].count(False) for name, task in self.tasks.items()}
        return [
            f"task {name!r}: the label of {count} of {len(self.tasks[name].items)} items is none of their choices; "
            "they are counted wrong, as lm-eval does"
            for name, count in without.items()
            if count
        ]

    def mark(self) -> str:
        """Return a hash of everything that is asked and of how it is judged."""
        digest = hashlib.sha256()
        for task in self.tasks.values():
            for part in task.asked():
                digest.update(json.dumps(part, separators=(",", ":")).encode() + b"\n")
        return digest.hexdigest()

    def followed_by(self, other: EvalSet) -> EvalSet:
        """Return these items with the other's after them, task by task."""
        return EvalSet(
            {name: replace(task, items=(*task.items, *other.tasks[name].items)) for name, task in self.tasks.items()}
        )

    def held_back(self, share: float, purpose: str = "held back") -> tuple[EvalSet, EvalSet]:
        """Split every task by item fingerprint into (the rest, about ``share`` of the items)."""
        parts: tuple[dict[str, EvalTask], ...] = ({}, {})
        for name, task in self.tasks.items():
            ordered = sorted(task.items, key=lambda item: hash_share(item.fingerprint, purpose))
            chosen = {item.fingerprint for item in ordered[: round(share * len(ordered))]}
            for part, wanted in zip(parts, (False, True), strict=True):
                part[name] = replace(task, items=tuple(i for i in task.items if (i.fingerprint in chosen) is wanted))
        return EvalSet(parts[0]), EvalSet(parts[1])


def fingerprint(content: Any) -> str:
    """Return 16 hex digits that stand for an item's rendered text, wherever its task got it from."""
    text = json.dumps(content, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def hash_share(mark: str, purpose: str) -> float:
    """Return a number in [0, 1) that depends only on the item and the purpose it is hashed for."""
    return int(hashlib.sha256(f"{purpose}:{mark}".encode()).hexdigest()[:13], 16) / 16**13


# The intact model's own answers as items: what it wrote to each prompt, to be read again under removals.
#
# Reading an answer costs one forward pass over prompt and answer, which removals share as they share choices; writing
# it anew under each removal costs a pass per token. No gold answer is needed.


@dataclass(frozen=True)
class OwnAnswer:
    """What the intact model wrote to one item's prompt: token ids of both, with what ended the answer."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    right: bool | None  # by the task's own accuracy; None: nobody asked


class AgreementJudge:
    """Judges how well a model goes along with the intact model's answer, token by token."""

    def __call__(self, item: EvalItem, answers: Sequence[Answer]) -> Verdict:
        """Return log-likelihood and agreement; an item counts as right where every token is the most likely one."""
        total, agreed = answers[0]  # type: ignore[misc]  # of a counted query
        tokens = item.queries[0].parts[0].scored
        return Verdict(agreed == tokens, None, answer=total / tokens, agreed=agreed / tokens)


def is_written(task: EvalTask) -> bool:
    """Whether the task's items have the model write."""
    return all(query.generation is not None for item in task.items for query in item.queries)


def with_own_answers(task: EvalTask, answers: Sequence[OwnAnswer], *, only_right: bool = False) -> EvalTask:
    """Return the task's items as the model's own answers to them, in order; ``only_right`` leaves out wrong ones."""
    items = [
        replace(item, chance=0.0, queries=(_read(own),), key=None)
        for item, own in zip(task.items, answers, strict=True)
        if own.right or not only_right
    ]
    return replace(task, items=tuple(items), metric=OWN_ANSWER, judge=AgreementJudge())


def own_answer_items(answers: Mapping[str, OwnAnswer]) -> tuple[EvalItem, ...]:
    """Return answers to prompts that are no task's as items, by fingerprint."""
    return tuple(EvalItem(mark, 0.0, (_read(own),)) for mark, own in answers.items())


def _read(own: OwnAnswer) -> Query:
    return Query((Request((*own.prompt, *own.answer), len(own.answer)),), counted=True)


# From lm-eval instances to token ids, with lm-eval's own tokenisation and truncation rules.


class Encoder(Protocol):
    """The part of lm-eval's ``TemplateLM`` that turns text into tokens (``LoadedModel.encoder`` is an ``HFLM``)."""

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
            from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

            windows = get_rolling_token_windows(
                token_list=encoder.tok_encode(instance.args[0]),
                prefix_token=encoder.prefix_token_id,
                max_seq_len=encoder.max_length,
                context_len=1,
            )
            parts = (_cut(*make_disjoint_window(window), encoder.max_length) for window in windows)
            return Query(tuple(parts), rolling=True)
        case "generate_until":
            return Query(generation=instance)
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


def _cut(given: Sequence[int], asked: Sequence[int], max_length: int) -> Request:
    """Keep the last ``max_length`` inputs plus the final target, as lm-eval does."""
    if not asked or not given:
        raise TaskError(f"a request has {len(given)} context and {len(asked)} answer tokens; both must be at least 1")
    tokens = (*given, *asked)[-(max_length + 1) :]
    return Request(tuple(int(token) for token in tokens), min(len(asked), len(tokens) - 1))
