"""Finding lm-eval tasks and their data: task and group names, extra YAML folders, data folders for offline machines."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from layerprune.errors import TaskError, did_you_mean, one_line


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
