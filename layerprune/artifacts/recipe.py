"""A recipe: the YAML file that a user copies and owns, with everything ``layerprune run`` does."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

import yaml
from pydantic import BeforeValidator, Field, ValidationError, create_model, model_validator
from pydantic_core import ErrorDetails, PydanticCustomError

from layerprune import config
from layerprune.artifacts.base import Document, Part, read_text
from layerprune.errors import DocumentError, LayerpruneError, SeveralFaults, UsageError, did_you_mean, one_line
from layerprune.formatting import printable
from layerprune.option_types import OptionType, list_of
from layerprune.parsing import parse_yaml

Check = Callable[[Any], object]  # raises LayerpruneError
Place = tuple[int | str, ...]  # the way to a value in a file: ("score", "tasks")

GOALS = ("drop", "target_params", "target_bytes", "target_speedup", "max_drop")
SHARED = tuple(
    one.name for one in fields(config.ModelOptions) + fields(config.MachineOptions) + fields(config.SourceOptions)
)


def _read(kind: OptionType, value: Any) -> Any:
    """Return what ``kind`` reads of a value as a document writes it."""
    try:
        return None if value is None else kind.read(value)
    except ValueError as error:
        raise PydanticCustomError("option", "{said}", {"said": str(error)}) from error


def _keys_of(
    command: type[config.Config], needed: Collection[str] = (), only: Collection[str] | None = None
) -> dict[str, Any]:
    """Return pydantic's fields for the options of ``command``: ``only`` some, or those that are not a whole recipe's.

    A key left out is None, and the option keeps its default.
    """
    found: dict[str, Any] = {}
    for name, one in config.declared(command).items():
        if not one.in_recipes or (name in SHARED if only is None else name not in only):
            continue
        # what may be given several times is a list, or a mapping by name
        kind = list_of(one.type) if one.many and not one.type.by_name else one.type
        type_ = Annotated[Any, BeforeValidator(partial(_read, kind))]
        found[name] = (type_, Field(default=... if name in needed else None, description=one.help))
    return found


def _step(name: str, says: str, command: type[config.Config], base: type[Part] = Part, **more: Any) -> type[Any]:
    return create_model(name, __base__=base, __module__=__name__, __doc__=says, **_keys_of(command, **more))


ScoreStep = _step(
    "ScoreStep",
    "What the layers are judged by.",
    config.ScoreConfig,
    needed=("tasks",),
    only=config.declared(config.ScoreConfig).keys() - {*SHARED, "protect"},
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
    config.PlanConfig,
    base=_OneGoal,
    only={*(config.declared(config.PlanConfig).keys() - config.declared(config.ScoreConfig).keys()), "protect"},
)
ExportStep = _step("ExportStep", "How the checkpoint is written.", config.ExportConfig)
HealStep = _step(
    "HealStep",
    "How what removal took is won back; without this step the checkpoint stays as exported.",
    config.HealConfig,
    needed=("method",),
)
AuditStep = _step(
    "AuditStep",
    "What the smaller model is examined on; items that had a say in the plan are left out.",
    config.AuditConfig,
)
StudyStep = _step("StudyStep", "What the paper's questions are asked on.", config.StudyConfig, needed=("tasks",))
STEPS = {
    "score": ScoreStep, "plan": PlanStep, "export": ExportStep, "heal": HealStep, "audit": AuditStep,
    "study": StudyStep,
}  # fmt: skip


class _Reading(Document):
    filename: ClassVar[str] = "recipe.json"
    model: str = Field(min_length=1, description="local folder or Hub id")

    @property
    def headline(self) -> str:
        return f"{self.kind} for {self.model}"  # type: ignore[attr-defined]

    @classmethod
    def load(cls, path: Path, changes: Sequence[str] = (), checks: Mapping[Place, Check] | None = None) -> Self:
        """Read a recipe as a user wrote it (YAML) or as a run folder keeps it (JSON, which is YAML too).

        ``changes`` are ``key=value`` on top of the file. ``checks`` look at single values and raise
        ``LayerpruneError``: what this row cannot know, such as which metrics exist. Raises one ``DocumentError`` with
        every fault, line by line.
        """
        marked = read_marked(path)
        for change in changes:
            marked.apply(change)
        recipe, misshapen = None, set()
        try:
            recipe = cls.model_validate(marked.data)
        except ValidationError as error:
            for finding in error.errors():
                misshapen.add(finding["loc"])
                marked.add_fault(finding["loc"], _said_of(finding, cls))
        for place, check in (checks or {}).items():
            value: Any = marked.data
            for key in place:
                value = value.get(key) if isinstance(value, dict) else None
            try:
                if value is not None and place not in misshapen:  # what has not the right form is told once
                    check(value)
            except LayerpruneError as error:
                marked.add_fault(place, str(error))
        if recipe is None or marked.faults:
            raise marked.error()
        return recipe


def _said_of(finding: ErrorDetails, recipe: type[_Reading]) -> str:
    """Return one of pydantic's findings in words."""
    place, said = finding["loc"], finding["msg"].removeprefix("Input ")
    match finding["type"]:
        case "extra_forbidden":
            section = recipe if len(place) == 1 else STEPS[str(place[0])]
            known = [name for name in section.model_fields if name != "kind"]
            return f"unknown key.{did_you_mean(str(place[-1]), known)} Known: {', '.join(known)}"
        case "missing":
            return "this key is needed"
        case "combination" | "option":
            return said
        case "model_type":
            said = "this key holds further keys"
    return f"{said}; got {finding['input']!r}"


# What every recipe says: which model, where the tasks come from, on what machine. Paths as on the command line.
Instructions: type[Any] = create_model(
    "Instructions",
    __base__=_Reading,
    __module__=__name__,
    **_keys_of(config.ScoreConfig, only=SHARED),
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


def given(part: Part) -> dict[str, Any]:
    """Return the options that a recipe or a step of it sets; what it leaves out keeps its default."""
    return {name: value for name, value in part if value is not None}


def difference(before: Instructions, after: Instructions) -> list[str]:
    """Return what differs between two recipes, one ``key: old -> new`` each."""
    old, new = _flat(before.model_dump(mode="json")), _flat(after.model_dump(mode="json"))
    return [f"{key}: {old.get(key)} -> {new.get(key)}" for key in sorted({*old, *new}) if old.get(key) != new.get(key)]


def _flat(data: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in data.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


# YAML with the line of every key, so that a fault can be shown where it is.


@dataclass
class MarkedYaml:
    """Plain data, the 1-based line of each of its keys and entries, and everything that is wrong with them."""

    path: Path
    data: dict[str, Any]
    lines: dict[Place, int] = field(default_factory=dict)  # 0: set from outside the file
    faults: list[tuple[int, str, str]] = field(default_factory=list)  # line, key ("score.limit") and message

    def add_fault(self, place: Place, message: str) -> None:
        """Note a fault on the line of ``place``, or of the nearest thing around it that stands in the file."""
        around = (place[:length] for length in range(len(place), -1, -1))
        line = next((self.lines[each] for each in around if each in self.lines), 0)
        self.faults.append((line, ".".join(map(str, place)), message))

    def error(self) -> DocumentError:
        """Return one error that lists all faults, each with its line; a single fault takes a single line."""
        ordered = sorted(self.faults, key=lambda fault: fault[:2])
        head = [f"{self.path} has {len(ordered)} faults"] if len(ordered) > 1 else []
        for line, key, message in ordered:
            head.append(f"{self.path}{f':{line}' if line else ''}: {f'{key}: ' if key else ''}{message}")
        return (SeveralFaults if len(ordered) > 1 else DocumentError)("\n".join(map(printable, head)))

    def apply(self, change: str) -> None:
        """Set one value from outside, ``score.limit=100``; raises ``UsageError`` for what is no change."""
        key, equals, text = change.partition("=")
        if not equals or not key.strip():
            raise UsageError(f"--set {change!r} is not a change; write --set score.limit=100")
        *parents, last = key.strip().split(".")
        target = self.data
        for parent in parents:
            target = target.setdefault(parent, {})
            if not isinstance(target, dict):
                self.faults.append((0, key, f"{parent!r} has no keys below it (from --set {change})"))
                return
        try:
            target[last] = parse_yaml(text)[1]
            self.lines[(*parents, last)] = 0
        except (yaml.YAMLError, ValueError):
            self.faults.append((0, key, f"{text!r} is not a YAML value (from --set)"))

    def mark(self, node: yaml.Node | None, place: Place = ()) -> None:
        """Note the lines of what stands below ``node``, and the keys that are given twice."""
        if node is None:
            return
        self.lines.setdefault(place, node.start_mark.line + 1)
        if isinstance(node, yaml.MappingNode):
            seen: set[str] = set()
            for key, value in node.value:
                inner = (*place, str(key.value))
                self.lines[inner] = key.start_mark.line + 1
                if key.value in seen:
                    self.add_fault(inner, "this key is given twice")
                seen.add(key.value)
                self.mark(value, inner)
        elif isinstance(node, yaml.SequenceNode):
            for index, value in enumerate(node.value):
                self.mark(value, (*place, index))


def read_marked(path: Path) -> MarkedYaml:
    """Read a YAML mapping; raises ``DocumentError`` when the file cannot be read or is not one."""
    text = read_text(path, "a recipe (YAML)")
    try:
        node, data = parse_yaml(text)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date that no calendar has
        mark = getattr(error, "problem_mark", None)
        place = f":{mark.line + 1}" if mark else ""
        raise DocumentError(f"{path}{place}: not YAML: {getattr(error, 'problem', None) or one_line(error)}") from error
    if not isinstance(data, dict):
        raise DocumentError(f"{path} holds {type(data).__name__} where a recipe's keys are expected")
    marked = MarkedYaml(path, data)
    marked.mark(node)
    return marked
