"""Named implementations, built-in or by entry point, and the specs that name one, ``cosine:tokens=last``."""

from __future__ import annotations

import dataclasses
import pkgutil
import types
import typing
from abc import ABC
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any, ClassVar

from layerprune import __version__
from layerprune.errors import RegistryError, UsageError, did_you_mean


class Plugin(ABC):
    """What a metric, a search and a healing method share: a frozen dataclass whose fields are its options, one method.

    The class attributes are shown by ``layerprune metrics``, ``searches`` and ``healers``.
    """

    needs: ClassVar[tuple[str, ...]] = ()  # "items" of tasks, "text", the intact "base"
    cost: ClassVar[str]  # in words
    source: ClassVar[str]  # paper, or where it comes from

    def __post_init__(self) -> None:
        """Raise ``ValueError`` for an option outside of its bounds; a subclass with more to check calls this first."""
        for field in dataclasses.fields(self):  # type: ignore[arg-type]  # the subclasses are dataclasses
            value, bounds = getattr(self, field.name), field.metadata.get("bounds")
            if bounds and isinstance(value, int | float) and not bounds[0] <= value <= bounds[1]:
                raise ValueError(f"{field.name} is {value:,} and has to be from {bounds[0]:,} to {bounds[1]:,}")


def option(default: Any, words: str, bounds: tuple[float, float] | None = None) -> Any:
    """Return a dataclass field that is an option: its line in the help, and the least and largest of a number."""
    return dataclasses.field(default=default, metadata={"help": words, "bounds": bounds})


# Names to implementations: built-ins as "module:attribute", third parties by entry points, loaded when asked for.


@dataclass(frozen=True)
class Entry:
    """One registered name, not yet imported."""

    name: str
    target: str  # "package.module:attribute"
    owner: str  # distribution and version, e.g. "layerprune 0.1.0"
    base: str = "layerprune.registry:Plugin"  # the class that it subclasses, "package.module:Class"

    def load(self) -> Any:
        """Import and return the class; raises ``RegistryError`` naming the owner when there is none of its kind."""
        try:
            cls = pkgutil.resolve_name(self.target)
        except (ImportError, AttributeError, ValueError) as error:
            raise RegistryError(
                f"{self.name!r} of {self.owner} cannot be loaded from {self.target}: {error}"
            ) from error
        if not (isinstance(cls, type) and issubclass(cls, pkgutil.resolve_name(self.base))):
            raise RegistryError(f"{self.name!r} of {self.owner}, {self.target}, is no subclass of {self.base}")
        if not dataclasses.is_dataclass(cls):
            raise RegistryError(f"{self.name!r} of {self.owner} is not a dataclass: {self.target}; decorate the class")
        return cls


class Registry:
    """All names of one kind ("metric"): built-ins plus the entry points of ``group``, subclasses of ``base``."""

    def __init__(self, kind: str, group: str, base: str, builtin: Mapping[str, str]) -> None:
        self.kind, self.group, self.base, self.builtin = kind, group, base, dict(builtin)

    def entries(self) -> dict[str, Entry]:
        """Return every entry by name; two owners of one name raise ``RegistryError`` naming both."""
        own = f"layerprune {__version__}"
        found = {name: Entry(name, target, own, self.base) for name, target in self.builtin.items()}
        for point in entry_points(group=self.group):
            owner = f"{point.dist.name} {point.dist.version}" if point.dist else "an unnamed distribution"
            entry = Entry(point.name, point.value, owner, self.base)
            other = found.get(point.name)
            if other is not None and (other.target, other.owner) != (entry.target, entry.owner):
                raise RegistryError(
                    f"two distributions register the {self.kind} {point.name!r}: "
                    f"{other.owner} and {owner}; uninstall one"
                )
            found[point.name] = entry
        return dict(sorted(found.items()))

    def get(self, name: str) -> Entry:
        """Return one entry; an unknown name raises ``RegistryError`` with the closest known one."""
        entries = self.entries()
        if name not in entries:
            raise RegistryError(
                f"unknown {self.kind} {name!r}.{did_you_mean(name, entries)} Known: {', '.join(entries)}"
            )
        return entries[name]


# Specs: how a registered thing and its options are written on the command line, ``cosine:tokens=last,windows=32``.
#
# What is built from a spec is a frozen dataclass; its fields are its options. The same fields give the parser, the help
# table and the provenance in documents, so an option is declared once.


Value = str | int | float | bool | None
LARGEST = 2**63  # a number's size
TRUE, FALSE = ("true", "yes", "1"), ("false", "no", "0")


class SpecOption(typing.NamedTuple):
    """One option of a registered thing, as its dataclass field declares it."""

    name: str
    type: str  # "int", "'all' | 'last'"
    default: str
    help: str  # the field's metadata["help"]


def build(registry: Registry, spec: str) -> tuple[Entry, Any]:
    """Return the entry a spec names and an instance with the spec's options.

    Raises ``RegistryError`` for an unknown name, ``UsageError`` for an option that does not exist or does not parse.
    """
    name, colon, rest = spec.strip().partition(":")
    entry = registry.get(name)
    cls = entry.load()
    hints = typing.get_type_hints(cls)
    known = {field.name: hints[field.name] for field in dataclasses.fields(cls) if field.init}
    listed = f" Options: {', '.join(known)}" if known else " It has none."
    chosen: dict[str, Value] = {}
    for part in rest.split(",") if colon else ():
        key, equals, text = (piece.strip() for piece in part.partition("="))
        if not equals:
            raise UsageError(f"{spec!r}: {part!r} is not an option; write {name}:option=value")
        if key not in known:
            raise UsageError(f"{spec!r}: {name} has no option {key!r}.{did_you_mean(key, known)}{listed}")
        if key in chosen:
            raise UsageError(f"{spec!r}: option {key!r} is given twice")
        chosen[key] = _parse(text, known[key], f"{spec!r}: option {key!r}")
    missing = [f.name for f in dataclasses.fields(cls) if f.init and _default(f) is dataclasses.MISSING]
    if absent := [key for key in missing if key not in chosen]:
        raise UsageError(f"{spec!r}: {name} needs the option {absent[0]!r}; write {name}:{absent[0]}=value")
    try:
        return entry, cls(**chosen)
    except ValueError as error:  # a dataclass that checks its options in __post_init__
        raise UsageError(f"{spec!r}: {error}") from error


def options_of(instance: Any) -> dict[str, Value]:
    """Return every option of an instance with its value, for the provenance in documents."""
    return {field.name: getattr(instance, field.name) for field in dataclasses.fields(instance) if field.init}


def spec_of(name: str, instance: Any) -> str:
    """Return the shortest spec that builds ``instance``: defaults are left out."""
    changed = [
        f"{field.name}={_written(getattr(instance, field.name))}"
        for field in dataclasses.fields(instance)
        if field.init and getattr(instance, field.name) != _default(field)
    ]
    return name + (":" + ",".join(changed) if changed else "")


def normalised(registry: Registry, spec: str) -> str:
    """Return the one way to write what ``spec`` names; raises as ``build`` does."""
    entry, instance = build(registry, spec)
    return spec_of(entry.name, instance)


def declared_options(entry: Entry) -> tuple[SpecOption, ...]:
    """Return what can be set on a registered thing, for help tables."""
    cls = entry.load()
    hints = typing.get_type_hints(cls)
    return tuple(
        SpecOption(
            name=field.name,
            type=_words(hints[field.name]) + _bounds(field),
            default="needed" if _default(field) is dataclasses.MISSING else _written(_default(field)),
            help=str(field.metadata.get("help", "")),
        )
        for field in dataclasses.fields(cls)
        if field.init
    )


def _bounds(field: dataclasses.Field[Any]) -> str:
    bounds = field.metadata.get("bounds")
    return f", {bounds[0]:,} to {bounds[1]:,}" if bounds else ""


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _parse(text: str, hint: Any, what: str) -> Value:
    origin = typing.get_origin(hint)
    if origin is typing.Literal:
        for value in typing.get_args(hint):
            if text == _written(value):
                return typing.cast(Value, value)
        raise UsageError(f"{what} is one of {_words(hint)}; got {text!r}")
    if origin in (typing.Union, types.UnionType):
        choices = typing.get_args(hint)
        if type(None) in choices and text.lower() == "none":
            return None
        for choice in choices:
            try:
                return _parse(text, choice, what)
            except UsageError:
                continue  # the next type of the union may take it
    if hint is bool:
        if text.lower() in TRUE + FALSE:
            return text.lower() in TRUE
    elif hint in (int, float, str):
        with suppress(ValueError):
            value = typing.cast(Value, hint(text))
            if isinstance(value, str) or (isinstance(value, int | float) and abs(value) < LARGEST):  # no inf, no nan
                return value
    raise UsageError(f"{what} takes {_words(hint)}; got {text!r}")


def _written(value: Any) -> str:
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def _words(hint: Any) -> str:
    if typing.get_origin(hint) is typing.Literal:
        return " | ".join(repr(value) for value in typing.get_args(hint))
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " | ".join(_words(choice) for choice in typing.get_args(hint))
    return "none" if hint is type(None) else getattr(hint, "__name__", str(hint))
