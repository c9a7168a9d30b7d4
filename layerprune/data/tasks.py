"""lm-eval tasks as items: found, prompted as lm-eval does, and split into what may select and what may evaluate."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch  # lends an object another method for a while, and puts its own back

from layerprune.artifacts import PLAIN, Prompting
from layerprune.config import PromptOptions
from layerprune.data.corpus import chat_template
from layerprune.data.items import Encoder, EvalItem, EvalSet, EvalTask, encode, fingerprint, hash_share
from layerprune.data.judging import LmEvalJudge, answerable, chance_of, content_of, definition_of
from layerprune.errors import LayerpruneError, TaskError, UsageError, did_you_mean, one_line

FEWSHOT_SEED = 1234  # lm-eval's own default, so that prompts agree with its published numbers

Use = Literal["selection", "evaluation"]
PromptArguments = tuple[dict[str, Any], dict[str, Any]]  # see ``prompt_options``


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
    prompts = prompt_options(prompting, encoder)
    found = {}
    tasks = load_tasks(names, include_path, data_dir)
    with templates_compiled_once():
        for name, task in tasks.items():
            with lm_eval_of(task, "make its items"):
                shots = _set_fewshot(task, num_fewshot)
                judge = LmEvalJudge(task, ungraded=ungraded and task.OUTPUT_TYPE == "generate_until")
                docs, split = _docs(task, use)
                order: Iterable[int] = range(len(docs))
                if use == "selection" and limit is not None:
                    order = sorted(random.Random(seed).sample(order, min(limit, len(docs))))
                items: list[EvalItem] = []
                excluded = 0
                for index in order:
                    if limit is not None and len(items) == limit:
                        break
                    mark = fingerprint(_texts(task, docs[index]))
                    if mark in exclude:
                        excluded += 1
                    elif (item := _item(task, docs[index], index, mark, shots, encoder, prompts, use)) is not None:
                        items.append(item)
                if use == "selection":
                    # an order that has nothing to do with the content: racing looks at the first ones first
                    items.sort(key=lambda item: hash_share(item.fingerprint, "order"))
                if not items:
                    seen = f"{len(docs)} in {split}, {excluded} already seen by the plan"
                    raise TaskError(f"task {name!r} has no items left for {use} ({seen})")
                found[name] = EvalTask(
                    name, split, judge.metric, shots, tuple(items), judge, excluded=excluded, prompting=prompting,
                    definition=definition_of(task),
                )  # fmt: skip
    return EvalSet(found)


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
            with lm_eval_of(task, "make its items"):
                docs, split = _docs(task, "evaluation")
                texts = {}
                for doc in docs:
                    question, choices, target = content = _texts(task, doc)
                    shown = [*(question if isinstance(question, list) else [question]), *(choices or [target])]
                    texts[fingerprint(content)] = " ".join(map(str, shown))
                found[name] = (split, texts)
    return found


def _texts(task: Any, doc: Any) -> tuple[Any, list[Any] | None, Any]:
    """Return the question, choices (None where it has none) and target of a document as the task renders them."""
    choices = task.doc_to_choice(doc) if task.config.doc_to_choice is not None else None
    return task.doc_to_text(doc), choices, task.doc_to_target(doc)


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
    half = [doc for doc in docs if (hash_share(fingerprint(_texts(task, doc)), "half") < 0.5) is wanted]
    return half, f"half of {name}"


def _item(
    task: Any, doc: Any, index: int, mark: str, shots: int, encoder: Encoder, prompts: PromptArguments, use: Use
) -> EvalItem | None:
    """Build one item; None for a selection item that stands among its own few-shot examples."""
    laying_out = lm_eval_of(task, f"lay out an item with {shots} examples")
    with laying_out, _examples(task, doc if use == "selection" else None) as shown:
        context = task.fewshot_context(doc, num_fewshot=shots, gen_prefix=task.doc_to_prefix(doc), **prompts[0])
    if use == "selection" and any(example == doc for example in shown):
        return None
    with lm_eval_of(task, f"ask item {index}"):
        made = task.construct_requests(doc=doc, ctx=context, metadata=(task.config.task, index, 1), **prompts[1])
        instances = made if isinstance(made, list) else [made]
        queries = tuple(encode(instance, encoder) for instance in instances)
        answers, content = answerable(task, doc), content_of(doc)
        return EvalItem(mark, chance_of(task, doc), queries, key=instances, answerable=answers, content=content)


@contextmanager
def lm_eval_of(task: Any, what: str) -> Iterator[None]:
    """A block in which lm-eval carries out a task's definition on its data: whatever it raises is a ``TaskError``.

    A label that is none of the choices, a null for a text, a template that fails.
    """
    try:
        yield
    except LayerpruneError:
        raise
    except Exception as error:
        said = f"task {task.config.task!r}: lm-eval cannot {what}"
        raise TaskError(f"{said}: {type(error).__name__}: {one_line(error)}") from error


@contextmanager
def _examples(task: Any, doc: Any) -> Iterator[list[Any]]:
    """While open, the task's few-shot sampler avoids ``doc`` where it can; yields what it draws.

    lm-eval leaves the asked item out of its examples only when both come from the test split; selection items come
    from the training split, where the examples live.
    """
    sampler, shown = getattr(task, "sampler", None), []
    if sampler is None:
        yield shown
        return
    draw = sampler.sample

    def sample(n: int, eval_doc: Any = None, **kwargs: Any) -> Any:
        examples = draw(n, eval_doc=eval_doc if eval_doc is not None else doc, **kwargs)
        shown.extend(examples)
        return examples

    with patch.object(sampler, "sample", sample):
        yield shown


# Finding lm-eval tasks and their data: task and group names, extra YAML folders, data folders for offline machines.


def load_tasks(names: Sequence[str], include_path: Sequence[str | Path], data_dir: Path | None) -> dict[str, Any]:
    """Return lm-eval task objects by name, groups expanded; raises ``TaskError`` for what cannot be had."""
    if not names:
        raise TaskError("no task was named; give lm-eval task names such as --tasks arc_easy,hellaswag")
    for folder in (*include_path, *([data_dir] if data_dir else ())):
        if not Path(folder).is_dir():
            raise TaskError(f"the folder {folder} does not exist; --include-path and --data-dir take folders")
    manager = task_manager(names, [str(path) for path in include_path])
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


def task_manager(names: Sequence[str], include_path: list[str]) -> Any:
    """Index the given folders alone when they have every name: indexing lm-eval's own tasks takes seconds."""
    from lm_eval.tasks import TaskManager

    try:
        if include_path:
            manager = TaskManager(include_path=include_path, include_defaults=False)
            if set(names) <= set(manager.all_tasks):
                return manager
        return TaskManager(include_path=include_path or None)
    except Exception as error:  # a task's file that is none
        said = f"lm-eval cannot read the tasks in {', '.join(include_path) or 'its own folder'}"
        raise TaskError(f"{said}: {type(error).__name__}: {one_line(error)}") from error


def _reading_from(data_dir: Path | None) -> AbstractContextManager[Any]:
    """Let ``datasets.load_dataset('owner/name')`` read ``data_dir/owner/name`` where that folder exists.

    lm-eval's stock tasks name Hub datasets; a folder that mirrors those names serves them on a machine without the Hub.
    """
    if data_dir is None:
        return nullcontext()
    import datasets

    original = datasets.load_dataset

    def load_dataset(path: str, *args: Any, **kwargs: Any) -> Any:
        local = Path(data_dir) / path
        return original(str(local) if local.is_dir() else path, *args, **kwargs)

    return patch.object(datasets, "load_dataset", load_dataset)


def templates_compiled_once() -> AbstractContextManager[Any]:
    """Let lm-eval keep its compiled templates while many documents are rendered.

    It compiles a task's templates again for every document, six times each: 12 s of CPU for the 2,376 of arc_easy.
    """
    from lm_eval.utils import env

    return patch.object(env, "from_string", lru_cache(maxsize=256)(env.from_string))


def _advice(error: BaseException) -> str:
    if isinstance(error, ConnectionError) or "connect" in str(error).lower() or "offline" in str(error).lower():
        return " (without the Hub, give --data-dir: a folder that mirrors the dataset ids)"
    if isinstance(error, TypeError) and not error.args:  # what lm-eval raises where a template is missing
        return ' (lm-eval asks for doc_to_text and doc_to_target; of prompts alone write doc_to_target: "")'
    return ""


# Prompts as lm-eval makes them: a chat template, few-shot examples as turns, a system instruction.


def prompting_of(config: PromptOptions, default: Prompting = PLAIN) -> Prompting:
    """Return the prompting that a command's options describe; nothing said keeps ``default``.

    As in lm-eval, examples are turns of their own under a chat template unless told otherwise. Raises ``UsageError``
    for turns without a chat template or without examples.
    """
    asked = (config.apply_chat_template, config.fewshot_as_multiturn, config.system_instruction)
    if all(value is None for value in asked):
        return default
    chat, turns = config.apply_chat_template or False, config.fewshot_as_multiturn
    if turns and not chat:
        raise UsageError("--fewshot-as-multiturn makes turns of a chat; give --apply-chat-template too")
    if turns and config.num_fewshot == 0:
        raise UsageError("--fewshot-as-multiturn needs examples, and --num-fewshot is 0; raise it, or leave one out")
    return Prompting(
        apply_chat_template=chat,
        fewshot_as_multiturn=bool(chat) if turns is None else turns,
        system_instruction=config.system_instruction or None,
    )


def check_turns(fewshot_as_multiturn: bool | None, eval_set: EvalSet) -> None:
    """Raise ``UsageError`` where turns were asked for and no task has examples to make turns of."""
    if fewshot_as_multiturn and not any(task.num_fewshot for task in eval_set.tasks.values()):
        names = ", ".join(eval_set.tasks)
        have = "has" if len(eval_set.tasks) == 1 else "have"
        raise UsageError(f"--fewshot-as-multiturn needs examples, and {names} {have} none: give --num-fewshot too")


def prompt_options(prompting: Prompting, encoder: Encoder) -> PromptArguments:
    """Return what lm-eval's ``fewshot_context`` and ``construct_requests`` take so that a prompting is carried out.

    Nothing for plain text, which every task class understands. Raises ``UsageError`` where the tokenizer does not have
    the chat template.
    """
    if prompting == PLAIN:
        return {}, {}
    asked = prompting.apply_chat_template
    template = None if asked is False else _chat_template(asked, encoder)
    chat = {"apply_chat_template": template is not None, "chat_template": template}
    context = {
        "system_instruction": prompting.system_instruction,
        "fewshot_as_multiturn": prompting.fewshot_as_multiturn,
    }
    return context | chat, {} if template is None else chat


def _chat_template(name: str | bool, encoder: Encoder) -> Callable[..., str]:
    """Return what renders a list of messages by the tokenizer's template, or by one of several (``name``)."""
    tokenizer: Any = encoder.tokenizer
    known = getattr(tokenizer, "chat_template", None)
    if not known:
        raise UsageError(
            "--apply-chat-template: the tokenizer has no chat template; leave it out, or add a chat_template.jinja "
            "to the model's folder"
        )
    if name is True:
        return chat_template()(encoder.apply_chat_template)
    names = sorted(known) if isinstance(known, dict) else []
    if name not in names:
        have = f"it has {', '.join(names)}" if names else "it has one, which needs no name"
        raise UsageError(
            f"--apply-chat-template: the tokenizer has no template named {name!r}; {have}."
            f"{did_you_mean(str(name), names)}"
        )

    @chat_template()
    def render(messages: list[dict[str, str]], **options: Any) -> str:
        with patch.object(tokenizer, "chat_template", known[name]):
            return encoder.apply_chat_template(messages, **options)

    return render
