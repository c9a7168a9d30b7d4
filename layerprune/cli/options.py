"""Options that several commands take, each declared once. Defaults are those of the request they fill in."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click

from layerprune.cli.faults import Fault
from layerprune.errors import UsageError
from layerprune.sizes import parse_size

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


class Names(click.ParamType):
    """A list of names, separated by commas."""

    name = "NAME,NAME"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        if isinstance(value, tuple):
            return value
        names = tuple(part.strip() for part in value.split(",") if part.strip())
        if not names:
            self.fail("no name given", param, ctx)
        return names


class BatchSize(click.ParamType):
    """A number of rows, or ``auto``."""

    name = "N|auto"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str | int:
        if value == "auto" or isinstance(value, int):
            return value
        if not value.isdecimal() or int(value) == 0:
            self.fail(f"{value!r} is neither auto nor a number of at least 1", param, ctx)
        return int(value)


class TemplateName(click.ParamType):
    """A chat template by name, or none in particular."""

    name = "[NAME]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> bool | str:
        return {"true": True, "false": False}.get(str(value).lower(), value)


class Size(click.ParamType):
    """Bytes, as people write them: ``4GB``."""

    name = "SIZE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        try:
            return parse_size(value, param.opts[0] if param else "the size")
        except UsageError as error:
            raise Fault(str(error)) from error  # click is still reading the options: no verb is there to catch it


class Labelled(click.ParamType):
    """A label and a file: ``cosine=cosine/plan.json``."""

    name = "LABEL=PLAN"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, Path]:
        if isinstance(value, tuple):
            return value
        label, equals, path = value.partition("=")
        if not (label and equals and path):
            self.fail(f"{value!r} is not a label and a plan; write cosine=cosine/plan.json", param, ctx)
        return label, Path(path)


class Figures(click.ParamType):
    """Numbers by name: ``arc_easy=2,piqa=1``."""

    name = "TASK=NUMBER,..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> dict[str, float]:
        if isinstance(value, dict):
            return value
        found: dict[str, float] = {}
        for part in value.split(","):
            name, equals, text = (piece.strip() for piece in part.partition("="))
            try:
                if not (name and equals) or name in found:
                    raise ValueError
                found[name] = float(text)
                if not math.isfinite(found[name]):
                    raise ValueError
            except ValueError:
                self.fail(f"{part!r} is not a task, named once, with a number; write arc_easy=2,piqa=1", param, ctx)
        return found


def joined(
    ctx: click.Context, param: click.Parameter, given: tuple[dict[str, float], ...]
) -> dict[str, float] | None:
    """Put the figures of an option that was given several times together; a task named twice is an error."""
    found: dict[str, float] = {}
    for figures in given:
        twice = found.keys() & figures.keys()
        if twice:
            raise click.BadParameter(f"the task {min(twice)!r} is named twice", ctx, param)
        found |= figures
    return found or None


FOLDER, FILE = click.Path(path_type=Path, file_okay=False), click.Path(path_type=Path, dir_okay=False)
POSITIVE = click.IntRange(min=1)


def together(*options: Decorator) -> Decorator:
    """Return one decorator that adds ``options`` in the order given."""
    return lambda function: functools.reduce(lambda inner, option: option(inner), reversed(options), function)


revision = click.option("--revision", metavar="REV", help="Branch, tag or commit of a Hub model.")
trust_remote_code = click.option(
    "--trust-remote-code", is_flag=True, default=None, help="Run the Python files of the model. Default: refuse."
)

sources = together(
    click.option(
        "--include-path",
        type=FOLDER,
        metavar="DIR",
        multiple=True,
        help="Folder of lm-eval task YAMLs to add; may be repeated.",
    ),
    click.option("--data-dir", type=FOLDER, metavar="DIR", help="Folder that mirrors Hub dataset ids (owner/name)."),
)
items = together(
    sources,
    click.option(
        "--num-fewshot",
        type=click.IntRange(min=0),
        metavar="N",
        help="Worked examples before each item; a task that says 0 keeps 0. Default: as each task says.",
    ),
    click.option(
        "--apply-chat-template",
        is_flag=False,
        flag_value="true",
        type=TemplateName(),
        help="Prompt through the tokenizer's chat template (or the one of that NAME), not as plain text.",
    ),
    click.option(
        "--fewshot-as-multiturn",
        is_flag=False,
        flag_value="true",
        type=click.BOOL,
        metavar="[BOOL]",
        help="Few-shot examples as turns of the chat; under a chat template they are, unless this is false.",
    ),
    click.option("--system-instruction", metavar="TEXT", help="System message before everything else."),
)
machine = together(
    click.option("--batch-size", type=BatchSize(), help="Rows computed at once. Default: auto."),
    click.option("--memory", type=Size(), help="What evaluating may hold beside the weights. Default: 4GiB."),
    click.option("--dtype", metavar="NAME", help="float32, bfloat16, float16 or auto. Default: auto."),
    click.option("--device", metavar="NAME", help="cpu, cuda, cuda:1 or auto. Default: auto."),
    click.option("--seed", type=click.IntRange(0), metavar="N", help="Seed of everything that is drawn. Default: 0."),
    trust_remote_code,
)


def limit(default: str) -> Decorator:
    """Return the ``--limit`` option; scoring and auditing have different defaults."""
    text = f"Use at most so many items of each task. Default: {default}."
    return click.option("--limit", type=POSITIVE, metavar="N", help=text)


objective = together(
    click.option(
        "--objective",
        type=click.Choice(["mean", "worst", "weighted"]),
        metavar="NAME",
        help="What counts of several tasks: the mean, the worst of them, or a weighted mean (see --weights).",
    ),
    click.option(
        "--weights",
        type=Figures(),
        multiple=True,
        callback=joined,
        help="Weights of tasks in the mean; a task not named counts 1.",
    ),
    click.option(
        "--floor",
        type=Figures(),
        multiple=True,
        callback=joined,
        help="Share of the intact model's accuracy above chance, or with signal=answers of the tokens of its own "
        "answers, that a task must keep on the search items: gsm8k=0.9.",
    ),
)
scoring = together(
    revision,
    click.option("--metric", metavar="SPEC", help="What judges a layer, see `layerprune metrics`. Default: ablation."),
    click.option("--tasks", type=Names(), help="lm-eval tasks that supply the items; of a group, each task."),
    limit("1000"),
    items,
    objective,
    machine,
    click.option("--protect", metavar="LAYERS", help="Layers never to remove: 0-3,-1 (negative: from the end)."),
)


goal = together(
    click.option("--drop", metavar="N|N%", help="How many layers to remove, or which share of them."),
    click.option("--target-params", metavar="N", help="Remove layers until so many parameters are left: 1.2B, 110M."),
    click.option("--target-bytes", metavar="SIZE", help="Remove layers until the weights take so much: 2GB, 500MB."),
    click.option(
        "--target-speedup",
        metavar="Nx",
        help="Remove layers until prefill and decoding are so many times as fast on this machine: 1.3x.",
    ),
    click.option(
        "--max-drop",
        metavar="N%",
        help="Remove as much as is certified to lose less accuracy than this: 2% is two points.",
    ),
    click.option("--confidence", metavar="N%", help="How sure --max-drop has to be. Default: 95%."),
    click.option(
        "--certify-limit",
        type=POSITIVE,
        metavar="N",
        help="Items of each task that certify --max-drop, beyond --limit; no search sees them. Default: 2000.",
    ),
    click.option(
        "--front",
        is_flag=True,
        default=None,
        help="A plan for each step of one path, in front/, with a table and a plot.",
    ),
    click.option(
        "--up-to",
        metavar="N|N%",
        help="Where --front or --max-drop ends at the latest. Default: 75% for a front, else all that may go.",
    ),
)
rules = together(
    click.option(
        "--keep-period",
        is_flag=True,
        default=None,
        help="What repeats from layer to layer goes on repeating; whole periods go with --search blocks.",
    ),
    click.option("--no-adjacent", is_flag=True, default=None, help="No two neighbouring layers."),
    click.option("--contiguous", is_flag=True, default=None, help="Only one run of neighbouring layers."),
)


def output(what: str) -> Decorator:
    """Return the ``-o`` option; ``what`` says what is written there."""
    return click.option("-o", "--output", type=FOLDER, required=True, metavar="DIR", help=what)


def given(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that were given, so that what was not keeps its one default, in the request."""
    return {name: value for name, value in options.items() if value is not None and value != ()}
