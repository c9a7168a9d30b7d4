"""lm-eval tasks as items: built once, split into what may select and what may evaluate, judged by lm-eval itself."""

from __future__ import annotations

import random
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

from layerprune.documents import PLAIN, Prompting
from layerprune.errors import TaskError, one_line
from layerprune.tasks.encoding import Encoder, encode
from layerprune.tasks.items import Item, Questions, Request, TaskQuestions, Verdict, fingerprint, hash_share
from layerprune.tasks.judging import LmEvalJudge, answerable, chance_of, content_of, definition_of
from layerprune.tasks.loading import load_tasks, templates_compiled_once
from layerprune.tasks.prompting import Prompts, asked_prompting, check_turns, prompting_of

__all__ = [
    "Item",
    "Questions",
    "Request",
    "TaskQuestions",
    "Verdict",
    "asked_prompting",
    "check_turns",
    "item_texts",
    "load_questions",
    "prompting_of",
]

FEWSHOT_SEED = 1234  # lm-eval's own default, so that prompts agree with its published numbers

Use = Literal["selection", "evaluation"]


def load_questions(
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
) -> Questions:
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
        return Questions(
            {
                name: _build(name, task, prompts, use, limit, num_fewshot, seed, exclude, ungraded)
                for name, task in tasks.items()
            }
        )


def item_texts(
    names: Sequence[str], *, include_path: Sequence[str | Path] = (), data_dir: Path | None = None
) -> dict[str, tuple[str, dict[str, str]]]:
    """Return by task the split that an audit asks and its items' texts by fingerprint: question, choices, answer.

    Raises ``TaskError`` as ``load_questions`` does.
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
) -> TaskQuestions:
    shots = _set_fewshot(task, num_fewshot)
    judge = LmEvalJudge(task, ungraded=ungraded and task.OUTPUT_TYPE == "generate_until")
    docs, split = _docs(task, use)
    items: list[Item] = []
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
    return TaskQuestions(
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


def _item(task: Any, doc: Any, index: int, mark: str, prompts: Prompts, use: Use) -> Item | None:
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
    return Item(
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
