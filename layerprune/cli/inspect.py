"""``layerprune inspect``, ``metrics``, ``searches`` and ``healers``."""

from __future__ import annotations

import inspect as docstrings
import pkgutil
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from layerprune import api
from layerprune.cli import command as opt
from layerprune.cli.command import COMMANDS, Verb, pass_console
from layerprune.cli.console import Console, names, table
from layerprune.config import InspectConfig
from layerprune.formatting import in_words, printable
from layerprune.registry import Entry, Registry, declared_options

if TYPE_CHECKING:
    from rich.table import Table

    from layerprune.inspection import Inspection
    from layerprune.lineage import LayerMatch, Lineage


# ``layerprune inspect``.


@click.command(
    cls=Verb,
    examples=[
        "layerprune inspect HuggingFaceTB/SmolLM2-135M-Instruct",
        "layerprune inspect /models/somebodys-llama --base /models/my-llama",
    ],
)
@click.argument("model")
@opt.options(InspectConfig)
@pass_console
def inspect(console: Console, model: str, **options: Any) -> Iterator[Table | str]:
    """Show the decoder stack of MODEL (a folder or a Hub id) and what can be removed from it; loads no weights.

    With --base its weights are read, a chunk at a time, to say what it is beside that model: layers that are gone,
    moved, repeated, changed or not the base's at all, embeddings, head and tokenizer.
    """
    found = api.inspect(model, progress=console.progress, **options)
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
    if found.lineage is not None:
        yield origins(found.lineage)
        for text in found.lineage.sentences:
            yield f"compared with the base: {text}"
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


def origins(lineage: Lineage) -> Table:
    """Return one row for each run of layers that follow one another in the base, too, and fared alike."""
    from layerprune.lineage.lineage import percentage, spans

    made = table(f"layers beside {lineage.base}", "layers", "base's layers", "are", "changed by", wrapped=["are"])
    runs: list[list[LayerMatch]] = []
    for match in lineage.layers:
        before = runs[-1][-1] if runs else None
        told = (match.kind, match.note, percentage(match.change))
        if (
            before is not None
            and told == (before.kind, before.note, percentage(before.change))
            and (match.base == (None if before.base is None else before.base + 1))
        ):
            runs[-1].append(match)
        else:
            runs.append([match])
    for run in runs:
        first, bases = run[0], [match.base for match in run if match.base is not None]
        what = f"{first.kind}: {first.note}" if first.note else first.kind
        change = "-" if first.base is None else percentage(first.change)
        made.add_row(*map(printable, (spans(match.layer for match in run), spans(bases) or "-", what, change)))
    return made


# ``layerprune metrics``, ``searches`` and ``healers``.


def listing(kinds: str, example: str, registry: str, shown: Sequence[str]) -> click.Command:
    """Return the command that lists what a registry knows; ``shown`` are the class attributes beside the options."""

    @click.command(
        kinds,
        cls=Verb,
        examples=[f"layerprune {kinds}", f"layerprune {kinds} {example}"],
        help=f"{COMMANDS[kinds][0].partition(',')[0]}; with NAME, show that one's options.",
    )
    @click.argument("name", required=False)
    def command(name: str | None = None) -> Iterator[Table]:
        return registered(pkgutil.resolve_name(registry), kinds, shown, name)

    return command


metrics = listing(
    "metrics", "cosine", "layerprune.scoring.metrics:METRICS", ("unit", "scope", "needs", "cost", "source")
)
searches = listing("searches", "greedy", "layerprune.search:SEARCHES", ("cost", "source"))
healers = listing("healers", "linear", "layerprune.healing:HEALERS", ("gradients", "needs", "cost", "source"))


def registered(registry: Registry, title: str, shown: Sequence[str], name: str | None) -> Iterator[Table]:
    """Yield a table of all entries, or one entry's facts and its options, as its spec takes them."""

    def told(entry: Entry) -> dict[str, str]:
        cls = entry.load()
        first_line = (docstrings.getdoc(cls) or "").partition("\n")[0]
        return {"does": first_line, **{key: word(getattr(cls, key)) for key in shown}, "from": entry.owner}

    def word(value: str | bool | tuple[str, ...]) -> str:
        if isinstance(value, bool):
            return "yes" if value else "no"
        return value if isinstance(value, str) else " and ".join(value) or "nothing"

    if name is None:
        rows = [{"name": each, **told(entry)} for each, entry in registry.entries().items()]
        columns = list(rows[0])
        yield table(title, *columns, wrapped=columns[1:], rows=(row.values() for row in rows))
        return
    entry = registry.get(name)
    yield facts(entry.name, told(entry))
    yield table(
        f"options of {entry.name}, written {entry.name}:option=value",
        "option", "values", "default", "what",
        wrapped=["what"],
        rows=declared_options(entry),
    )  # fmt: skip
