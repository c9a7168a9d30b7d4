"""A recipe: the YAML file that a user copies and owns, with everything ``layerprune run`` does."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    NonNegativeInt,
    PositiveInt,
    ValidationError,
    model_validator,
)
from pydantic_core import PydanticCustomError

from layerprune.documents.base import Document, Part
from layerprune.documents.faults import Fault, Place, faults_of
from layerprune.documents.marked import Marked, read_marked
from layerprune.errors import DocumentError, LayerpruneError, UsageError
from layerprune.sizes import parse_size


def _as_text(value: Any) -> Any:
    """Let people write ``drop: 6``, ``target_speedup: 1.3`` and ``protect: [0, 1, -1]`` as YAML has it."""
    if isinstance(value, list) and all(isinstance(entry, int) for entry in value):
        return ",".join(map(str, value))
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


def _as_list(value: Any) -> Any:
    """Let people write tasks as on the command line: ``arc_easy,hellaswag``."""
    return [part.strip() for part in value.split(",")] if isinstance(value, str) else value


def _size(text: str) -> str:
    try:
        parse_size(text, "memory")
    except UsageError as error:
        raise PydanticCustomError("size", "should be a size such as 5GB or 500MB") from error
    return text


Check = Callable[[Any], object]  # raises LayerpruneError
Text = Annotated[str, BeforeValidator(_as_text)]
Names = Annotated[tuple[str, ...], Field(min_length=1), BeforeValidator(_as_list)]


GOALS = ("drop", "target_params", "target_bytes", "target_speedup", "max_drop")


class ScoreStep(Part):
    """What the layers are judged by. An option left out has the command line's default, here and below."""

    metric: str | None = None
    tasks: Names
    limit: PositiveInt | None = Field(default=None, description="items of each task")
    num_fewshot: NonNegativeInt | None = None
    apply_chat_template: bool | str | None = Field(default=None, description="or the name of a template")
    fewshot_as_multiturn: bool | None = None
    system_instruction: str | None = None
    objective: Literal["mean", "worst", "weighted"] | None = Field(default=None, description="over the tasks")
    weights: dict[str, float] | None = Field(default=None, description="of tasks in a weighted mean; others count 1")
    floor: dict[str, float] | None = Field(
        default=None, description="share of the intact accuracy above chance that a task must keep"
    )
    racing: bool | None = Field(default=None, description="stop candidates early that are clearly not next to go")


class PlanStep(Part):
    """How many layers go, said in one of five ways, and how they are looked for."""

    drop: Text | None = Field(default=None, description="a count, 6, or a share, 25%")
    target_params: Text | None = Field(default=None, description="so many parameters are left: 1.2B")
    target_bytes: Text | None = Field(default=None, description="so much the weights take: 2GB")
    target_speedup: Text | None = Field(default=None, description="so many times as fast on this machine: 1.3x")
    max_drop: Text | None = Field(default=None, description="as much as certainly loses less accuracy: 2%")
    confidence: Text | None = Field(default=None, description="how sure max_drop has to be: 95%")
    certify_limit: PositiveInt | None = Field(default=None, description="items of each task that certify max_drop")
    up_to: Text | None = Field(default=None, description="where max_drop ends at the latest: 50%")
    protect: Text | None = Field(default=None, description="layers never to remove: 0-3,-1")
    search: str | None = None
    keep_period: bool | None = Field(default=None, description="what repeats from layer to layer goes on repeating")
    no_adjacent: bool | None = Field(default=None, description="no two neighbouring layers")
    contiguous: bool | None = Field(default=None, description="only one run of neighbouring layers")


    @model_validator(mode="after")
    def _one_goal(self) -> Self:
        given = [name for name in GOALS if getattr(self, name) is not None]
        if len(given) != 1:
            said = f"{' and '.join(given)} are given" if given else "nothing says how far to go"
            raise PydanticCustomError("combination", f"{said}; give one of {', '.join(GOALS)}")
        stray = [name for name in ("confidence", "certify_limit", "up_to") if getattr(self, name) is not None]
        if stray and self.max_drop is None:
            raise PydanticCustomError("combination", f"{stray[0]} belongs to max_drop, and {given[0]} is given")
        if self.no_adjacent and self.contiguous:
            raise PydanticCustomError("combination", "no_adjacent and contiguous exclude each other; keep one of them")
        return self


class ExportStep(Part):
    """How the checkpoint is written."""

    max_shard_size: Text | None = Field(default=None, description="5GB")


class HealStep(Part):
    """How what removal took is won back; without this step the checkpoint stays as exported."""

    method: str = Field(min_length=1)
    corpus: str | None = Field(default=None, description="file, folder, Hub dataset, or builtin")
    tasks: Names | None = Field(default=None, description="not to stand in the corpus; default: all of this recipe")
    window: Annotated[int, Field(ge=2)] | None = Field(default=None, description="tokens")


class AuditStep(Part):
    """What the smaller model is examined on; items that had a say in the plan are left out."""

    tasks: Names | None = Field(default=None, description="default: the tasks that scored")
    limit: PositiveInt | None = None
    num_fewshot: NonNegativeInt | None = None
    apply_chat_template: bool | str | None = Field(default=None, description="default of these three: as scored")
    fewshot_as_multiturn: bool | None = None
    system_instruction: str | None = None
    text: str | None = Field(default=None, description="a .txt or .jsonl file for perplexity and KL")
    generation: bool | None = Field(default=None, description="whether to look at greedy continuations of prompts")
    speed: bool | None = Field(default=None, description="whether to time both models")
    layerwise: bool | None = Field(default=None, description="whether to ask without each removed layer alone")


class Instructions(Document):
    """What every recipe says: which model, where the tasks come from, on what machine. Paths as on the command line."""

    filename: ClassVar[str] = "recipe.json"
    model: str = Field(min_length=1, description="local folder or Hub id")
    revision: str | None = None
    include_path: tuple[str, ...] = Field(default=(), description="folders of task YAMLs")
    data_dir: str | None = Field(default=None, description="mirror of Hub dataset ids")
    batch_size: Literal["auto"] | PositiveInt | None = None
    memory: Annotated[str, AfterValidator(_size)] | None = Field(default=None, description="as in 4GB; see --memory")
    dtype: str | None = None
    device: str | None = None
    seed: NonNegativeInt | None = None
    trust_remote_code: bool | None = None

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
    ) -> tuple[Self | None, list[Fault]]:
        """Return the recipe (None when its form is wrong) and every fault in it.

        ``changes`` are ``key=value`` on top of the file. ``checks`` look at single values and raise
        ``LayerpruneError``: what this row cannot know, such as which metrics exist.
        """
        marked = read_marked(path)
        faults = [*marked.faults]
        for change in changes:
            faults += _apply(marked, change)
        for place, check in (checks or {}).items():
            faults += _checked(marked, place, check)
        try:
            return cls.model_validate(marked.data), faults
        except ValidationError as error:
            return None, [*faults, *faults_of(error, cls, marked)]


class Recipe(Instructions):
    """Score, plan, export, heal and audit of one model in one run folder."""

    kind: Literal["recipe"] = "recipe"
    format: Literal[1] = 1
    score: ScoreStep
    plan: PlanStep
    export: ExportStep = ExportStep()
    heal: HealStep | None = None
    audit: AuditStep = AuditStep()


class StudyStep(Part):
    """What the paper's questions are asked on."""

    tasks: Names
    metrics: Annotated[tuple[str, ...], Field(min_length=1)] | None = Field(
        default=None, description="specs, ablation among them"
    )
    limit: PositiveInt | None = Field(default=None, description="items of each task that metrics and searches see")
    audit_limit: PositiveInt | None = Field(default=None, description="other items, that accuracy is measured on")
    num_fewshot: NonNegativeInt | None = None
    apply_chat_template: bool | str | None = Field(default=None, description="or the name of a template")
    fewshot_as_multiturn: bool | None = None
    system_instruction: str | None = None
    text: str | None = Field(default=None, description="a .txt or .jsonl file that metrics read, too")
    counts: tuple[PositiveInt, ...] = Field(default=(), description="layers removed where accuracy is measured")
    greedy: Text | None = Field(default=None, description="how far to follow greedy ablation: 6, or 25%")
    protect: Text | None = Field(default=None, description="layers never to remove: 0-3,-1")


class StudyRecipe(Instructions):
    """A study of one model in one folder."""

    kind: Literal["study-recipe"] = "study-recipe"
    format: Literal[1] = 1
    study: StudyStep


def recipe_error(path: Path, faults: list[Fault]) -> DocumentError:
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


def _checked(marked: Marked, place: Place, check: Check) -> list[Fault]:
    value: Any = marked.data
    for key in place:
        value = value.get(key) if isinstance(value, dict) else None
    if value is None:
        return []
    try:
        check(value)
    except LayerpruneError as error:
        return [Fault(marked.line(place), ".".join(map(str, place)), str(error))]
    return []


def _apply(marked: Marked, change: str) -> list[Fault]:
    import yaml

    key, equals, text = change.partition("=")
    if not equals or not key.strip():
        raise UsageError(f"--set {change!r} is not a change; write --set score.limit=100")
    *parents, last = key.strip().split(".")
    target = marked.data
    for parent in parents:
        target = target.setdefault(parent, {})
        if not isinstance(target, dict):
            return [Fault(None, key, f"{parent!r} has no keys below it (from --set {change})")]
    try:
        target[last] = yaml.safe_load(text)
        marked.lines[(*parents, last)] = None
    except (yaml.YAMLError, ValueError):
        return [Fault(None, key, f"{text!r} is not a YAML value (from --set)")]
    return []
