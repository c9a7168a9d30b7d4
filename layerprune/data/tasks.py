"""lm-eval tasks as items: found, prompted as lm-eval does, and split into what may select and what may evaluate."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from layerprune.artifacts import PLAIN, Prompting
from layerprune.config import PromptOptions
from layerprune.data.items import (
    Encoder,
    EvalItem,
    EvalSet,
    EvalTask,
    Request,
    Verdict,
    encode,
    fingerprint,
    hash_share,
)
from layerprune.data.judging import LmEvalJudge, answerable, chance_of, content_of, definition_of
from layerprune.errors import TaskError, UsageError, did_you_mean, one_line

# lm-eval tasks as items: built once, split into what may select and what may evaluate, judged by lm-eval itself.


__all__ = [
    "EvalItem",
    "EvalSet",
    "EvalTask",
    "Request",
    "Verdict",
    "asked_prompting",
    "check_turns",
    "item_texts",
    "load_eval_set",
    "prompting_of",
]

FEWSHOT_SEED = 1234  # lm-eval's own default, so that prompts agree with its published numbers

Use = Literal["selection", "evaluation"]


def load_eval_set(
    names: Sequence[str],
    encoder: Encoder,
    *,
    use: Use,
    include_path: Sequence[str | Path] = (),
    data_dir: Path | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    seed: int = 0,
    exclude: Collection[str] = frozenset(),
    prompting: Prompting = PLAIN,
    ungraded: bool = False,
) -> EvalSet:
    """Load tasks and build their items.

    Selection takes the training split, or a fixed half of the evaluation split where there is none; evaluation takes
    the evaluation split (its other half, respectively) without the items whose fingerprints are in ``exclude``.
    ``limit`` is per task: a sample drawn with ``seed`` for selection, the first items, as lm-eval has it, for
    evaluation. ``prompting``: chat template and system instruction, as lm-eval applies them. ``ungraded``: tasks that
    have the model write need no accuracy and no gold answer, for only its own answers are read. Raises ``TaskError``
    for unknown tasks, data that cannot be had, and tasks left without items; ``UsageError`` for a chat template that
    the tokenizer does not have.
    """
    if limit is not None and limit < 1:
        raise TaskError(f"the limit is {limit} items; it must be at least 1")
    prompts = Prompts.of(prompting, encoder)
    tasks = load_tasks(names, include_path, data_dir)
    with templates_compiled_once():
        return EvalSet(
            {
                name: _build(name, task, prompts, use, limit, num_fewshot, seed, exclude, ungraded)
                for name, task in tasks.items()
            }
        )


def item_texts(
    names: Sequence[str], *, include_path: Sequence[str | Path] = (), data_dir: Path | None = None
) -> dict[str, tuple[str, dict[str, str]]]:
    """Return by task the split that an audit asks and its items' texts by fingerprint: question, choices, answer.

    Raises ``TaskError`` as ``load_eval_set`` does.
    """
    found = {}
    tasks = load_tasks(names, include_path, data_dir)
    with templates_compiled_once():
        for name, task in tasks.items():
            docs, split = _docs(task, "evaluation")
            found[name] = (split, {_fingerprint(task, doc): " ".join(map(str, _shown(task, doc))) for doc in docs})
    return found


def _shown(task: Any, doc: Any) -> list[Any]:
    choices = task.doc_to_choice(doc) if task.config.doc_to_choice is not None else []
    text, target = task.doc_to_text(doc), task.doc_to_target(doc)
    return [*(text if isinstance(text, list) else [text]), *(choices or [target])]


def _build(
    name: str,
    task: Any,
    prompts: Prompts,
    use: Use,
    limit: int | None,
    num_fewshot: int | None,
    seed: int,
    exclude: Collection[str],
    ungraded: bool,
) -> EvalTask:
    shots = _set_fewshot(task, num_fewshot)
    judge = LmEvalJudge(task, ungraded=ungraded and task.OUTPUT_TYPE == "generate_until")
    docs, split = _docs(task, use)
    items: list[EvalItem] = []
    excluded = 0
    order: Iterable[int] = range(len(docs))
    if use == "selection" and limit is not None:
        order = sorted(random.Random(seed).sample(range(len(docs)), min(limit, len(docs))))
    for index in order:
        if limit is not None and len(items) == limit:
            break
        doc = docs[index]
        mark = _fingerprint(task, doc)
        if mark in exclude:
            excluded += 1
        elif (item := _item(task, doc, index, mark, prompts, use)) is not None:
            items.append(item)
    if use == "selection":  # an order that has nothing to do with the content: racing looks at the first ones first
        items.sort(key=lambda item: hash_share(item.fingerprint, "order"))
    if not items:
        raise TaskError(
            f"task {name!r} has no items left for {use} ({len(docs)} in {split}, {excluded} already seen by the plan)"
        )
    return EvalTask(
        name, split, judge.metric, shots, tuple(items), judge, excluded=excluded, prompting=prompts.prompting,
        definition=definition_of(task),
    )  # fmt: skip


def _set_fewshot(task: Any, num_fewshot: int | None) -> int:
    """Set the number of examples as ``simple_evaluate`` does: a task that says 0 itself keeps it."""
    own = task.get_config("num_fewshot")
    if num_fewshot is not None and own != 0:
        task.set_config(key="num_fewshot", value=num_fewshot)
    elif own is None:
        task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(seed=FEWSHOT_SEED)
    return int(task.get_config("num_fewshot"))


def _docs(task: Any, use: Use) -> tuple[list[Any], str]:
    """Return the documents a use may see, and a name for where they come from."""
    name = task.config.test_split if task.has_test_docs() else task.config.validation_split
    if use == "selection" and task.has_training_docs():
        return list(task.training_docs()), str(task.config.training_split)
    docs = list(task.eval_docs)
    if task.has_training_docs():
        return docs, str(name)
    wanted = use == "selection"  # no training split: one fixed half selects, the other evaluates
    half = [doc for doc in docs if (hash_share(_fingerprint(task, doc), "half") < 0.5) is wanted]
    return half, f"half of {name}"


def _fingerprint(task: Any, doc: Any) -> str:
    choices = task.doc_to_choice(doc) if task.config.doc_to_choice is not None else None
    return fingerprint([task.doc_to_text(doc), choices, task.doc_to_target(doc)])


def _item(task: Any, doc: Any, index: int, mark: str, prompts: Prompts, use: Use) -> EvalItem | None:
    """Build one item; None for a selection item that stands among its own few-shot examples."""
    shots = int(task.get_config("num_fewshot"))
    shown: list[Any] = []
    with _watched(task, doc if use == "selection" else None, shown):
        try:
            context = task.fewshot_context(
                doc, num_fewshot=shots, gen_prefix=task.doc_to_prefix(doc), **prompts.context
            )
        except (IndexError, TypeError, AssertionError) as error:  # an example whose label is none of its choices
            what = f"task {task.config.task!r}: lm-eval cannot lay out an item with {shots} examples"
            raise TaskError(f"{what}: {type(error).__name__}: {one_line(error)}") from error
    if use == "selection" and any(example == doc for example in shown):
        return None
    made = task.construct_requests(doc=doc, ctx=context, metadata=(task.config.task, index, 1), **prompts.requests)
    instances = made if isinstance(made, list) else [made]
    queries = tuple(encode(instance, prompts.encoder) for instance in instances)
    return EvalItem(
        mark, chance_of(task, doc), queries, key=instances, answerable=answerable(task, doc), content=content_of(doc)
    )


class _watched:
    """While open, the task's few-shot sampler avoids ``doc`` where it can, and what it draws is noted in ``shown``.

    lm-eval leaves the asked item out of its examples only when both come from the test split; selection items come
    from the training split, where the examples live.
    """

    def __init__(self, task: Any, doc: Any, shown: list[Any]) -> None:
        self.sampler, self.doc, self.shown = getattr(task, "sampler", None), doc, shown

    def __enter__(self) -> None:
        if self.sampler is None:
            return
        draw = self.sampler.sample

        def sample(n: int, eval_doc: Any = None, **kwargs: Any) -> Any:
            examples = draw(n, eval_doc=eval_doc if eval_doc is not None else self.doc, **kwargs)
            self.shown.extend(examples)
            return examples

        self.sampler.sample = sample

    def __exit__(self, *exc: object) -> None:
        if self.sampler is not None:
            del self.sampler.sample  # the instance attribute; the class's own method stands behind it


# Finding lm-eval tasks and their data: task and group names, extra YAML folders, data folders for offline machines.


def load_tasks(names: Sequence[str], include_path: Sequence[str | Path], data_dir: Path | None) -> dict[str, Any]:
    """Return lm-eval task objects by name, groups expanded; raises ``TaskError`` for what cannot be had."""
    if not names:
        raise TaskError("no task was named; give lm-eval task names such as --tasks arc_easy,hellaswag")
    for folder in (*include_path, *([data_dir] if data_dir else ())):
        if not Path(folder).is_dir():
            raise TaskError(f"the folder {folder} does not exist; --include-path and --data-dir take folders")
    manager = _manager(names, [str(path) for path in include_path])
    for name in names:
        if name not in manager.all_tasks:
            raise TaskError(f"unknown task {name!r}.{did_you_mean(name, manager.all_tasks)}")
    found: dict[str, Any] = {}
    with _reading_from(data_dir):
        for name in names:
            try:
                found.update(manager.load([name])["tasks"])
            except Exception as error:  # lm-eval and datasets raise anything, from KeyError to httpx errors
                raise TaskError(f"task {name!r} cannot be loaded: {one_line(error)}{_advice(error)}") from error
    return found


def _manager(names: Sequence[str], include_path: list[str]) -> Any:
    """Index the given folders alone when they have every name: indexing lm-eval's own tasks takes seconds."""
    from lm_eval.tasks import TaskManager

    if include_path:
        manager = TaskManager(include_path=include_path, include_defaults=False)
        if set(names) <= set(manager.all_tasks):
            return manager
    return TaskManager(include_path=include_path or None)


@contextmanager
def _reading_from(data_dir: Path | None) -> Iterator[None]:
    """Let ``datasets.load_dataset('owner/name')`` read ``data_dir/owner/name`` where that folder exists.

    lm-eval's stock tasks name Hub datasets; a folder that mirrors those names serves them on a machine without the Hub.
    """
    if data_dir is None:
        yield
        return
    import datasets

    original = datasets.load_dataset

    def load_dataset(path: str, *args: Any, **kwargs: Any) -> Any:
        local = Path(data_dir) / path
        return original(str(local) if local.is_dir() else path, *args, **kwargs)

    datasets.load_dataset = load_dataset
    try:
        yield
    finally:
        datasets.load_dataset = original


@contextmanager
def templates_compiled_once() -> Iterator[None]:
    """Let lm-eval keep its compiled templates while many documents are rendered.

    It compiles a task's templates again for every document, six times each: 12 s of CPU for the 2,376 of arc_easy.
    """
    from lm_eval.utils import env

    env.from_string = functools.lru_cache(maxsize=256)(env.from_string)
    try:
        yield
    finally:
        del env.from_string  # the instance attribute; the class's own method stands behind it


def _advice(error: BaseException) -> str:
    if isinstance(error, ConnectionError) or "connect" in str(error).lower() or "offline" in str(error).lower():
        return " (without the Hub, give --data-dir: a folder that mirrors the dataset ids)"
    if isinstance(error, TypeError) and not error.args:  # what lm-eval raises where a template is missing
        return ' (lm-eval asks for doc_to_text and doc_to_target; of prompts alone write doc_to_target: "")'
    return ""


# Prompts as lm-eval makes them: a chat template, few-shot examples as turns, a system instruction.


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


def check_turns(fewshot_as_multiturn: bool | None, eval_set: EvalSet) -> None:
    """Raise ``UsageError`` where turns were asked for and no task has examples to make turns of."""
    if fewshot_as_multiturn and not any(task.num_fewshot for task in eval_set.tasks.values()):
        names = ", ".join(eval_set.tasks)
        have = "has" if len(eval_set.tasks) == 1 else "have"
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
