"""What ``layerprune inspect`` shows: one model, or the verdict on every model type."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from layerprune.errors import UsageError, did_you_mean
from layerprune.progress import Progress

if TYPE_CHECKING:
    from rich.table import Table

    from layerprune.export.zoo import Verdict


def check(model: str | None, zoo: bool, types: Sequence[str] | None, options: Mapping[str, Any]) -> None:
    """Raise ``UsageError`` unless exactly one of a model and the zoo is asked for, with its own options."""
    if model is None and not zoo:
        raise UsageError("name the MODEL to look at, or give --zoo to try every model type")
    if model is not None and (zoo or types):
        raise UsageError(f"--{'zoo' if zoo else 'types'} tries tiny models of its own: give no MODEL with it")
    if zoo and options:
        raise UsageError(f"--{next(iter(options)).replace('_', '-')} is for a MODEL; it cannot be given with --zoo")


def inspected(model: str, **options: Any) -> list[Table | str]:
    """Return a model's facts, its layers and the remarks about them."""
    from layerprune.cli import tables
    from layerprune.inspection import inspect_model

    found = inspect_model(model, **options)
    return [tables.inspected(found), tables.layers(found), *(f"remark: {text}" for text in found.remarks)]


def verdicts(types: Iterable[str] | None, progress: Progress) -> list[Verdict]:
    """Try each type; raises ``UsageError`` before the first when one is unknown."""
    from layerprune.anatomy.tiny import types as known
    from layerprune.export.zoo import zoo

    names = known() if types is None else tuple(dict.fromkeys(types))
    for name in names:
        if name not in known():
            raise UsageError(f"transformers has no causal-LM type {name!r}.{did_you_mean(name, known())}")
    found = []
    with progress.task("trying model types", len(names), "types") as advance:
        for verdict in zoo(names):
            found.append(verdict)
            advance()
    return found


def page(verdicts: Iterable[Verdict]) -> str:
    """Return the verdicts as Markdown."""
    from layerprune.export.zoo import render

    return render(verdicts).rstrip("\n")
