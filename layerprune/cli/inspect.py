"""``layerprune inspect``, ``metrics`` and ``healers``."""

from __future__ import annotations

import inspect as docstrings
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import click

from layerprune import api
from layerprune.cli import command as opt
from layerprune.cli.command import Verb
from layerprune.cli.console import names, table
from layerprune.config import InspectConfig
from layerprune.formatting import in_words
from layerprune.registry import Entry, Registry, declared_options

if TYPE_CHECKING:
    from rich.table import Table

    from layerprune.inspection import Inspection


# ``layerprune inspect``.


@click.command(
    cls=Verb,
    examples=["layerprune inspect HuggingFaceTB/SmolLM2-135M-Instruct", "layerprune inspect /models/my-llama --quiet"],
)
@click.argument("model")
@opt.options(InspectConfig)
def inspect(model: str, **options: Any) -> Iterator[Table | str]:
    """Show the decoder stack of MODEL (a folder or a Hub id) and what can be removed from it; loads no weights."""
    found = api.inspect(model, **options)
    architecture = found.architecture
    stays = [layer.index for layer in found.layers if layer.refusal]
    yield facts(
        found.model,
        {
            "type": architecture.model_type,
            "decoder layers": f"{architecture.depth} (numbered 0 to {architecture.depth - 1})",
            "stack": architecture.stack,
            "parameters": f"{found.parameters:,}",
            "weights on disk": in_words(found.nbytes),
            "can go on their own": f"{found.removable} of {architecture.depth} layers",
            "cannot go first": names(tuple(stays)) or "none",
            "go together": "; ".join(names(tuple(sorted(group))) for group in architecture.together) or "none",
            "config fields that change": ", ".join(found.changes) or "none",
            "can be exported": "yes" if found.removable else "no",
        },
    )
    yield layers(found)
    for text in found.remarks:
        yield f"remark: {text}"


def facts(title: str, values: Mapping[str, str]) -> Table:
    """Return one thing's facts, a row each."""
    return table(title, "what", "value", wrapped=["value"], rows=values.items())


def layers(found: Inspection) -> Table:
    """Return one row for each run of layers that are alike."""
    columns = ["layers", "kind", "parameters each", "share each", "can be removed"]
    made = table("layers", *columns, numbers=("parameters each", "share each"))
    start = 0
    alike = [(layer.kind, layer.parameters, layer.goes_with and "together", layer.refusal) for layer in found.layers]
    for index, layer in enumerate(found.layers):
        if index + 1 < len(alike) and alike[index + 1] == alike[index] and not layer.goes_with:
            continue
        which = str(index) if start == index else f"{start} to {index}"
        share = f"{100 * layer.parameters / found.parameters:.1f} %"
        removable = f"with {names(layer.goes_with)}" if layer.goes_with else "yes"
        removable = f"no: {layer.refusal}" if layer.refusal else removable
        made.add_row(which, layer.kind, f"{layer.parameters:,}", share, removable)
        start = index + 1
    return made


# ``layerprune metrics`` and ``layerprune healers``.


@click.command(cls=Verb, examples=["layerprune metrics", "layerprune metrics cosine"])
@click.argument("name", required=False)
def metrics(name: str | None = None) -> Iterator[Table]:
    """List the metrics that can score layers; with NAME, show that one's options."""
    from layerprune.scoring.metrics import METRICS

    def described(metric: Any) -> dict[str, str]:
        return {key: getattr(metric, key) for key in ("unit", "scope", "needs", "cost", "source")}

    return registered(METRICS, "metrics", "measures", described, name)


@click.command(cls=Verb, examples=["layerprune healers", "layerprune healers linear"])
@click.argument("name", required=False)
def healers(name: str | None = None) -> Iterator[Table]:
    """List the ways to heal a pruned model; with NAME, show that one's options."""
    from layerprune.healing import HEALERS

    def described(healer: Any) -> dict[str, str]:
        needs = ", ".join([healer.needs, *(["the base"] if healer.needs_base else [])])
        trains = "yes" if healer.gradients else "no"
        return {"trains": trains, "needs": needs, "cost": healer.cost, "source": healer.source}

    return registered(HEALERS, "healing methods", "does", described, name)


def registered(
    registry: Registry, title: str, does: str, described: Callable[[Any], dict[str, str]], name: str | None
) -> Iterator[Table]:
    """Yield a table of all entries, or one entry's facts and its options, as its spec takes them."""

    def told(entry: Entry, what: str) -> dict[str, str]:
        thing = entry.load()
        first_line = (docstrings.getdoc(thing) or "").partition("\n")[0]
        return {what: first_line, **described(thing), "from": entry.owner}

    if name is None:
        rows = [{"name": each, **told(entry, "what")} for each, entry in registry.entries().items()]
        columns = list(rows[0])
        yield table(title, *columns, wrapped=columns[1:], rows=(row.values() for row in rows))
        return
    entry = registry.get(name)
    yield facts(entry.name, told(entry, does))
    yield table(
        f"options of {entry.name}, written {entry.name}:option=value",
        "option", "values", "default", "what",
        wrapped=["what"],
        rows=declared_options(entry),
    )  # fmt: skip
