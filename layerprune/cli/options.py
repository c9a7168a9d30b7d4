"""The options of a command, made from the fields of its Config."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import click

from layerprune.config import MISSING, Config, Flag, Kind, List, Option, Text, declared, default_of

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]
FOLDER, FILE = click.Path(path_type=Path, file_okay=False), click.Path(path_type=Path, dir_okay=False)


class Value(click.ParamType):
    """What a kind of option reads from the command line."""

    def __init__(self, kind: Kind) -> None:
        self.kind = kind
        self.name = kind.metavar or "value"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            return self.kind.read(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


def options(config: type[Config], without: Collection[str] = ()) -> Decorator:
    """Return a decorator that adds an option for each field of ``config`` that declares one."""
    made = [_made(config, name, one) for name, one in declared(config).items() if name not in without]
    return lambda function: functools.reduce(lambda inner, option: option(inner), reversed(made), function)


def flag_of(name: str, one: Option) -> str:
    """Return how an option is written on the command line: ``--max-drop``."""
    return one.flag or f"--{name.replace('_', '-')}"


def _made(config: type[Config], name: str, one: Option) -> Decorator:
    flag, standard = flag_of(name, one), default_of(config, name)
    told = {"help": one.help + _default(one, standard), "default": None, "required": standard is MISSING}
    if isinstance(one.kind, Flag) and not one.kind.optional:
        names = f"{flag}/--no-{flag[2:]}" if one.kind.negative else flag
        return click.option(names, name, is_flag=True, **told)
    if getattr(one.kind, "optional", False):
        told |= {"is_flag": False, "flag_value": "true"}
    return click.option(flag, name, type=Value(one.kind), metavar=one.kind.metavar, multiple=one.many, **told)


def _default(one: Option, standard: Any) -> str:
    if one.default is not None:
        return f" Default: {one.default}."
    if isinstance(one.kind, Flag):
        return f" Default: {'yes' if standard else 'no'}." if one.kind.negative else ""
    return "" if standard in (None, (), MISSING) else f" Default: {standard}."


names = Value(List(Text()))


def output(what: str) -> Decorator:
    """Return the ``-o`` option; ``what`` says what is written there."""
    return click.option("-o", "--output", type=FOLDER, required=True, metavar="DIR", help=what)


def given(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that were given, so that what was not keeps its one default, in the Config."""
    return {name: value for name, value in options.items() if value is not None and value != ()}
