"""A recipe: the YAML file that a user copies and owns, with everything ``layerprune run`` does."""

from __future__ import annotations

import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

import yaml
from pydantic import BaseModel, BeforeValidator, Field, ValidationError, create_model, model_validator
from pydantic_core import PydanticCustomError

from layerprune.artifacts.base import Document, Part
from layerprune.config import (
    AuditConfig,
    Config,
    ExportConfig,
    HealConfig,
    MachineOptions,
    ModelOptions,
    PlanConfig,
    ScoreConfig,
    SourceOptions,
    StudyConfig,
    declared,
)
from layerprune.errors import DocumentError, LayerpruneError, UsageError, did_you_mean
from layerprune.option_types import OptionType, list_of

Check = Callable[[Any], object]  # raises LayerpruneError

GOALS = ("drop", "target_params", "target_bytes", "target_speedup", "max_drop")
SHARED = tuple(one.name for one in fields(ModelOptions) + fields(MachineOptions) + fields(SourceOptions))


def _checked_by(kind: OptionType) -> Any:
    """Return the type of a key: what ``kind`` reads, as a document writes it."""

    def read(value: Any) -> Any:
        if value is None:
            return None
        try:
            return kind.read(value)
        except ValueError as error:
            raise PydanticCustomError("option", "{said}", {"said": str(error)}) from error

    return Annotated[Any, BeforeValidator(read)]


def _keys_of(config: type[Config], needed: Collection[str] = (), only: Collection[str] | None = None) -> dict[str, Any]:
    """Return pydantic's fields for the options of ``config``: ``only`` some, or those that are not a whole recipe's.

    A key left out is None, and the option keeps its default.
    """
    found: dict[str, Any] = {}
    for name, one in declared(config).items():
        if not one.in_recipes or (name in SHARED if only is None else name not in only):
            continue
        # what may be given several times is a list, or a mapping by name
        kind = list_of(one.type) if one.many and not one.type.by_name else one.type
        found[name] = (_checked_by(kind), Field(default=... if name in needed else None, description=one.help))
    return found


def _step(name: str, says: str, config: type[Config], base: type[Part] = Part, **more: Any) -> type[Any]:
    return create_model(name, __base__=base, __module__=__name__, __doc__=says, **_keys_of(config, **more))


ScoreStep = _step(
    "ScoreStep",
    "What the layers are judged by.",
    ScoreConfig,
    needed=("tasks",),
    only=declared(ScoreConfig).keys() - {*SHARED, "protect"},
)


class _OneGoal(Part):
    @model_validator(mode="after")
    def _one_goal(self) -> Self:
        given = [name for name in GOALS if getattr(self, name) is not None]
        if len(given) != 1:
            said = f"{' and '.join(given)} are given" if given else "nothing says how far to go"
            raise PydanticCustomError("combination", f"{said}; give one of {', '.join(GOALS)}")
        stray = [name for name in ("confidence", "certify_limit", "up_to") if getattr(self, name) is not None]
        if stray and self.max_drop is None:  # type: ignore[attr-defined]
            raise PydanticCustomError("combination", f"{stray[0]} belongs to max_drop, and {given[0]} is given")
        if self.no_adjacent and self.contiguous:  # type: ignore[attr-defined]
            raise PydanticCustomError("combination", "no_adjacent and contiguous exclude each other; keep one of them")
        return self


PlanStep = _step(
    "PlanStep",
    "How many layers go, said in one of five ways, and how they are looked for; no front: a recipe ends in one model.",
    PlanConfig,
    base=_OneGoal,
    only={*(declared(PlanConfig).keys() - declared(ScoreConfig).keys()), "protect"},
)
ExportStep = _step("ExportStep", "How the checkpoint is written.", ExportConfig)
HealStep = _step(
    "HealStep",
    "How what removal took is won back; without this step the checkpoint stays as exported.",
    HealConfig,
    needed=("method",),
)
AuditStep = _step(
    "AuditStep",
    "What the smaller model is examined on; items that had a say in the plan are left out.",
    AuditConfig,
)
StudyStep = _step("StudyStep", "What the paper's questions are asked on.", StudyConfig, needed=("tasks",))


class _Reading(Document):
    filename: ClassVar[str] = "recipe.json"
    model: str = Field(min_length=1, description="local folder or Hub id")

    @property
    def headline(self) -> str:
        return f"{self.kind} for {self.model}"  # type: ignore[attr-defined]

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a recipe as a user wrote it (YAML) or as a run folder keeps it (JSON, which is YAML too)."""
        recipe, faults = cls.examine(path)
        if recipe is None or faults:
            raise recipe_error(path, faults)
        return recipe

    @classmethod
    def examine(
        cls, path: Path, changes: Sequence[str] = (), checks: Mapping[Place, Check] | None = None
    ) -> tuple[Self | None, list[RecipeFault]]:
        """Return the recipe (None when its form is wrong) and every fault in it.

        ``changes`` are ``key=value`` on top of the file. ``checks`` look at single values and raise
        ``LayerpruneError``: what this row cannot know, such as which metrics exist.
        """
        marked = read_marked(path)
        faults = [*marked.faults]
        for change in changes:
            faults += _apply(marked, change)
        values = [fault for place, check in (checks or {}).items() for fault in _checked(marked, place, check)]
        try:
            return cls.model_validate(marked.data), [*faults, *values]
        except ValidationError as error:
            forms = faults_of(error, cls, marked)
            told = {fault.key for fault in forms}  # what has not the right form is told once
            return None, [*faults, *(fault for fault in values if fault.key not in told), *forms]


# What every recipe says: which model, where the tasks come from, on what machine. Paths as on the command line.
Instructions: type[Any] = create_model(
    "Instructions",
    __base__=_Reading,
    __module__=__name__,
    **_keys_of(ScoreConfig, only=SHARED),
)


class Recipe(Instructions):
    """Score, plan, export, heal and audit of one model in one run folder."""

    kind: Literal["recipe"] = "recipe"
    format: Literal[1] = 1
    score: ScoreStep  # type: ignore[valid-type]
    plan: PlanStep  # type: ignore[valid-type]
    export: ExportStep = ExportStep()  # type: ignore[valid-type]
    heal: HealStep | None = None  # type: ignore[valid-type]
    audit: AuditStep = AuditStep()  # type: ignore[valid-type]


class StudyRecipe(Instructions):
    """A study of one model in one folder."""

    kind: Literal["study-recipe"] = "study-recipe"
    format: Literal[1] = 1
    study: StudyStep  # type: ignore[valid-type]


def given(part: Part, *without: str) -> dict[str, Any]:
    """Return the options that a recipe or a step of it sets; what it leaves out keeps its default."""
    names = [name for name in type(part).model_fields if name not in without]
    return {name: value for name in names if (value := getattr(part, name)) is not None}


def recipe_error(path: Path, faults: list[RecipeFault]) -> DocumentError:
    """Return one error that lists all faults, each with its line; a single fault takes a single line."""
    ordered = sorted(faults, key=lambda fault: (fault.line or 0, fault.key))
    head = [f"{path} has {len(ordered)} faults"] if len(ordered) > 1 else []
    return DocumentError("\n".join([*head, *(f"{path}{fault}" for fault in ordered)]))


def difference(before: Instructions, after: Instructions) -> list[str]:
    """Return what differs between two recipes, one ``key: old -> new`` each."""
    old, new = _flat(before.model_dump(mode="json")), _flat(after.model_dump(mode="json"))
    return [f"{key}: {old.get(key)} -> {new.get(key)}" for key in sorted({*old, *new}) if old.get(key) != new.get(key)]


def _flat(data: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in data.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def _checked(marked: MarkedYaml, place: Place, check: Check) -> list[RecipeFault]:
    value: Any = marked.data
    for key in place:
        value = value.get(key) if isinstance(value, dict) else None
    if value is None:
        return []
    try:
        check(value)
    except LayerpruneError as error:
        return [RecipeFault(marked.line(place), ".".join(map(str, place)), str(error))]
    return []


def _apply(marked: MarkedYaml, change: str) -> list[RecipeFault]:
    import yaml

    key, equals, text = change.partition("=")
    if not equals or not key.strip():
        raise UsageError(f"--set {change!r} is not a change; write --set score.limit=100")
    *parents, last = key.strip().split(".")
    target = marked.data
    for parent in parents:
        target = target.setdefault(parent, {})
        if not isinstance(target, dict):
            return [RecipeFault(None, key, f"{parent!r} has no keys below it (from --set {change})")]
    try:
        target[last] = yaml.safe_load(text)
        marked.lines[(*parents, last)] = None
    except (yaml.YAMLError, ValueError):
        return [RecipeFault(None, key, f"{text!r} is not a YAML value (from --set)")]
    return []


# Faults of a file that a person wrote: all of them, each with the line it is on.


Place = tuple[int | str, ...]  # the way to a value in a file: ("score", "tasks", 0)
# Findings whose value adds nothing to the message.
SELF_EXPLAINING = ("extra_forbidden", "missing", "combination", "option")


@dataclass(frozen=True)
class RecipeFault:
    """One thing that is wrong with one key."""

    line: int | None  # 1-based; None for what does not stand in the file
    key: str  # "score.limit"
    message: str

    def __str__(self) -> str:
        place = "" if self.line is None else f":{self.line}"
        return f"{place}: {self.key + ': ' if self.key else ''}{self.message}"


def faults_of(error: ValidationError, model: type[BaseModel], marked: MarkedYaml) -> list[RecipeFault]:
    """Return pydantic's findings as faults; a value that fits no branch of a union is one fault, not one a branch."""
    messages: dict[Place, list[str]] = {}
    values: dict[Place, Any] = {}
    for entry in error.errors():
        place = _keys(entry["loc"], model)
        messages.setdefault(place, []).append(_message(entry, place, model))
        if entry["type"] not in SELF_EXPLAINING:
            values[place] = entry["input"]
    return [
        RecipeFault(
            marked.line(place),
            ".".join(map(str, place)),
            " or ".join(texts) + (f"; got {values[place]!r}" if place in values else ""),
        )
        for place, texts in messages.items()
    ]


def _keys(loc: tuple[int | str, ...], model: type[BaseModel]) -> Place:
    """Return the part of pydantic's location that stands in the file (it also names the branches of unions)."""
    path: list[int | str] = []
    current: type[BaseModel] | None = model
    for part in loc:
        if isinstance(part, int):
            path.append(part)
        elif current is not None:
            path.append(part)
            current = part_model(current, part)
    return tuple(path)


def part_model(model: type[BaseModel], field: str) -> type[BaseModel] | None:
    """Return the model that a field holds, if it holds one."""
    if field not in model.model_fields:
        return None
    hint = model.model_fields[field].annotation
    for choice in (hint, *typing.get_args(hint)):
        if isinstance(choice, type) and issubclass(choice, BaseModel):
            return choice
    return None


def _message(entry: Any, path: Place, model: type[BaseModel]) -> str:
    current: type[BaseModel] | None = model
    for part in path[:-1]:
        current = part_model(current, part) if current is not None and isinstance(part, str) else None
    if entry["type"] == "extra_forbidden" and current is not None:
        known = [name for name in current.model_fields if name != "kind"]
        return f"unknown key.{did_you_mean(str(path[-1]), known)} Known: {', '.join(known)}"
    if entry["type"] == "missing":
        return "this key is needed"
    if entry["type"] == "model_type":
        return "this key holds further keys"
    if entry["type"] == "tuple_type":
        return "should be a list"
    return str(entry["msg"]).removeprefix("Input ").replace(", unable to parse string as an integer", "")


# YAML with the line of every key, so that a fault can be shown where it is.


@dataclass
class MarkedYaml:
    """Plain data, and the 1-based line of each of its keys and entries."""

    data: dict[str, Any]
    lines: dict[Place, int | None] = field(default_factory=dict)  # None: set from outside the file
    faults: list[RecipeFault] = field(default_factory=list)

    def line(self, place: Place) -> int | None:
        """Return the line of ``place``, or of the nearest thing around it that stands in the file."""
        for length in range(len(place), -1, -1):
            if place[:length] in self.lines:
                return self.lines[place[:length]]
        return None


def read_marked(path: Path) -> MarkedYaml:
    """Read a YAML mapping; raises ``DocumentError`` when the file cannot be read or is not one."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise DocumentError(f"{path} does not exist; expected a recipe (YAML)") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DocumentError(f"cannot read {path}: {error}") from error
    try:
        node, data = yaml.compose(text, Loader=yaml.SafeLoader), yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date that no calendar has
        mark = getattr(error, "problem_mark", None)
        place = f":{mark.line + 1}" if mark else ""
        raise DocumentError(f"{path}{place}: not YAML: {getattr(error, 'problem', None) or error}") from error
    if not isinstance(data, dict):
        raise DocumentError(f"{path} holds {type(data).__name__} where a recipe's keys are expected")
    marked = MarkedYaml(data)
    _mark(node, (), marked)
    return marked


def _mark(node: yaml.Node | None, place: Place, marked: MarkedYaml) -> None:
    if node is None:
        return
    marked.lines.setdefault(place, node.start_mark.line + 1)
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            inner = (*place, str(key.value))
            if key.value in seen:
                name = ".".join(map(str, inner))
                marked.faults.append(RecipeFault(key.start_mark.line + 1, name, "this key is given twice"))
            seen.add(key.value)
            marked.lines[inner] = key.start_mark.line + 1
            _mark(value, inner, marked)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            _mark(value, (*place, index), marked)
