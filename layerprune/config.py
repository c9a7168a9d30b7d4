"""Every option of every command, declared once: its kind, bounds, default and help.

The command line, the keys of recipes, the signatures of the Python API and docs/CLI.md are made from the dataclasses
here. Building one checks each value: ``ScoreConfig(model="gpt2", limit=0)`` raises ``UsageError`` with one line. A new
option is one new field.
"""

from __future__ import annotations

import math
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar

from layerprune.errors import UsageError, did_you_mean
from layerprune.formatting import parse_size

MOST_ITEMS = 10**9  # more than any benchmark has, and what numpy and JSON readers hold without loss
MOST_EXAMPLES = 1000  # few-shot examples: more than any context holds
MOST_ROWS = 10**6  # rows of one batch
LARGEST_SEED = 2**32 - 1  # what numpy and transformers take


class Kind(ABC):
    """A type of option: ``metavar`` is how help writes its value."""

    metavar: str | None = None

    @abstractmethod
    def read(self, value: Any) -> Any:
        """Return the value that the program works with, from text or a Python value; raises ``ValueError``."""


@dataclass(frozen=True)
class Text(Kind):
    """Any text; numbers are taken as they are written."""

    metavar: str = "TEXT"

    def read(self, value: Any) -> str:
        if isinstance(value, int | float) and not isinstance(value, bool):
            value = str(value)
        if not isinstance(value, str):
            raise ValueError(f"{value!r} is not text")
        return value


@dataclass(frozen=True)
class Layers(Text):
    """Layers by number and range: ``0-3,-1``, or a list of numbers."""

    metavar: str = "LAYERS"

    def read(self, value: Any) -> str:
        if isinstance(value, list | tuple | range):
            value = ",".join(map(str, value))
        return super().read(value)


@dataclass(frozen=True)
class Whole(Kind):
    """A whole number between two bounds, both included."""

    least: int
    most: int
    metavar: str = "N"

    def read(self, value: Any) -> int:
        if isinstance(value, str) and value.strip().removeprefix("-").isdecimal() and len(value) <= 20:
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool):
            raise ValueError(f"{_short(value)} is not a whole number from {self.least} to {self.most}")
        if not self.least <= value <= self.most:
            raise ValueError(f"{_short(value)} is not in the range {self.least} to {self.most}")
        return value


@dataclass(frozen=True)
class Flag(Kind):
    """Yes or no. ``negative``: the command line has ``--no-...``, too. ``optional``: a value may follow the option."""

    negative: bool = False
    optional: bool = False

    @property
    def metavar(self) -> str | None:  # type: ignore[override]
        return "[BOOL]" if self.optional else None

    def read(self, value: Any) -> bool:
        if isinstance(value, str):
            value = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}.get(value.lower())
        if not isinstance(value, bool):
            raise ValueError("neither true nor false")
        return value


@dataclass(frozen=True)
class Template(Kind):
    """A chat template: the tokenizer's own (true), none (false), or one by name."""

    metavar: str = "[NAME]"
    optional: ClassVar[bool] = True

    def read(self, value: Any) -> bool | str:
        if not isinstance(value, bool | str):
            raise ValueError(f"{value!r} is neither true, false nor the name of a template")
        return {"true": True, "false": False}.get(str(value).lower(), value)


@dataclass(frozen=True)
class Rows(Kind):
    """A number of rows, or ``auto``."""

    metavar: str = "N|auto"

    def read(self, value: Any) -> int | str:
        if value == "auto":
            return "auto"
        try:
            return Whole(1, MOST_ROWS).read(value)
        except ValueError:
            raise ValueError(f"{_short(value)} is neither auto nor a number from 1 to {MOST_ROWS}") from None


@dataclass(frozen=True)
class Size(Kind):
    """Bytes, as people write them: ``4GB``."""

    metavar: str = "SIZE"

    def read(self, value: Any) -> int:
        if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 10**18:
            value = str(value)
        if not isinstance(value, str):
            raise ValueError(f"{_short(value)} is not a size; write 5GB or 500MB")
        try:
            return parse_size(value, "")
        except UsageError as error:
            raise ValueError(str(error).strip()) from error


@dataclass(frozen=True)
class Duration(Kind):
    """Seconds, as people write them: ``90s``, ``20m``, ``1h30m``; a bare number is seconds."""

    metavar: str = "TIME"

    def read(self, value: Any) -> float:
        match = re.fullmatch(r"(?:(\d{1,6})h)?(?:(\d{1,6})m)?(?:(\d{1,9})s?)?", str(value)[:40].strip())
        parts = [int(part or 0) for part in match.groups()] if match else []
        if isinstance(value, float) and 0 < value < 10**9:
            return value
        if isinstance(value, bool) or not any(parts):
            raise ValueError(f"{_short(value)} is not a time; write 20m, 1h30m or 90s")
        hours, minutes, seconds = parts
        return 3600.0 * hours + 60.0 * minutes + seconds


@dataclass(frozen=True)
class List(Kind):
    """Several values of one kind, separated by commas on the command line."""

    of: Kind
    metavar: str = "NAME,NAME"

    def read(self, value: Any) -> tuple[Any, ...]:
        parts = value.split(",") if isinstance(value, str) else value
        if not isinstance(parts, list | tuple):
            parts = [parts]
        parts = [part.strip() if isinstance(part, str) else part for part in parts]
        found = tuple(self.of.read(part) for part in parts if part != "")
        if not found:
            raise ValueError("no name given")
        return found


@dataclass(frozen=True)
class Figures(Kind):
    """Numbers by the name of a task: ``arc_easy=2,piqa=1``."""

    metavar: str = "TASK=NUMBER,..."

    def read(self, value: Any) -> dict[str, float]:
        pairs = [_pair(part) for part in value.split(",")] if isinstance(value, str) else list(_items(value))
        found: dict[str, float] = {}
        for name, number in pairs:
            if name in found:
                raise ValueError(f"{name!r} is named twice")
            if isinstance(number, bool) or not isinstance(number, int | float) or not math.isfinite(number):
                raise ValueError(f"{name}={number!r} is not a finite number")
            found[name] = float(number)
        return found


@dataclass(frozen=True)
class Choice(Kind):
    """One of a few names."""

    names: tuple[str, ...]
    metavar: str = "NAME"

    def read(self, value: Any) -> str:
        if value not in self.names:
            raise ValueError(f"{_short(value)} is not one of {', '.join(self.names)}")
        return str(value)


@dataclass(frozen=True)
class PathTo(Kind):
    """A path: of a folder (``DIR``) or of a file (``FILE``)."""

    metavar: str

    def read(self, value: Any) -> Path:
        if not isinstance(value, str | os.PathLike) or "\0" in os.fspath(value):
            raise ValueError(f"{_short(value)} is not a path")
        path = Path(value)
        if self.metavar == "DIR" and path.is_file():
            raise ValueError(f"{str(path)!r} is a file, and a folder is asked for")
        if self.metavar == "FILE" and path.is_dir():
            raise ValueError(f"{str(path)!r} is a folder, and a file is asked for")
        return path


@dataclass(frozen=True)
class DocumentFile(Kind):
    """A document: the path of its file, or what was read from it."""

    metavar: str = "FILE"

    def read(self, value: Any) -> Any:
        return PathTo("FILE").read(value) if isinstance(value, str | os.PathLike) else value


@dataclass(frozen=True)
class Labelled(Kind):
    """Plans, as paths or documents, by a label of their own: ``cosine=cosine/plan.json``."""

    metavar: str = "LABEL=PLAN"

    def read(self, value: Any) -> dict[str, Path]:
        if isinstance(value, str):
            label, equals, path = value.partition("=")
            if not (label and equals and path):
                raise ValueError(f"{value!r} is not a label and a plan; write cosine=cosine/plan.json")
            return {label: Path(path)}
        return {str(label): DocumentFile().read(path) for label, path in _items(value)}


def _short(value: Any) -> str:
    if isinstance(value, int) and abs(value) >= 10**30:
        return f"a number of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _pair(text: str) -> tuple[str, float]:
    name, equals, number = (piece.strip() for piece in text.partition("="))
    try:
        if not (name and equals) or not math.isfinite(float(number)):
            raise ValueError
    except ValueError:
        raise ValueError(f"{text!r} is not a task with a number; write arc_easy=2,piqa=1") from None
    return name, float(number)


def _items(value: Any) -> Any:
    if not isinstance(value, Mapping):
        raise ValueError(f"{_short(value)} is not a mapping by name")
    return value.items()


@dataclass(frozen=True)
class Option:
    """What a field of a Config declares."""

    kind: Kind
    help: str
    default: str | None = None  # how help tells it, where it is not the value itself
    many: bool = False  # may be given several times on the command line
    flag: str | None = None  # its name on the command line, where it is not the field's
    in_recipes: bool = True


def option(kind: Kind, help: str, value: Any = None, **more: Any) -> Any:
    """Declare an option with the default ``value``; None means that it is not given. ``more``: fields of ``Option``."""
    return field(default=value, metadata={"option": Option(kind, help, **more)})


def required(kind: Kind, help: str, **more: Any) -> Any:
    """Declare an option that has to be given."""
    return field(metadata={"option": Option(kind, help, **more)})


def declared(config: type[Config]) -> dict[str, Option]:
    """Return what each field of a Config declares: its own fields first, then those of the classes it is made of."""
    own = {one.name: one.metadata["option"] for one in fields(config) if "option" in one.metadata}
    order = dict.fromkeys(name for kind in config.__mro__ for name in vars(kind).get("__annotations__", {}))
    return {name: own[name] for name in order if name in own}


def default_of(config: type[Config], name: str) -> Any:
    """Return the default of one field; ``MISSING`` where it has to be given."""
    found: Field[Any] = next(one for one in fields(config) if one.name == name)
    return found.default


@dataclass(frozen=True, kw_only=True)
class Config:
    """The options of one command. Values are read by their kinds, so text is as good as a number."""

    def __post_init__(self) -> None:
        for name, one in declared(type(self)).items():
            value = getattr(self, name)
            if value is None or value == ():  # not given
                continue
            object.__setattr__(self, name, _read(name, one, value))

    @classmethod
    def of(cls, **options: Any) -> Any:
        """Return the Config of ``options``; raises ``UsageError`` for a name that it does not have."""
        known = [one.name for one in fields(cls)]
        for name in options:
            if name not in known:
                raise UsageError(f"there is no option {name!r}.{did_you_mean(name, known)}")
        missing = [name for name in known if name not in options and default_of(cls, name) is MISSING]
        if missing:
            raise UsageError(f"the option {missing[0]!r} has to be given")
        return cls(**{name: value for name, value in options.items() if value is not None})


def _read(name: str, one: Option, value: Any) -> Any:
    try:
        if not one.many:
            return one.kind.read(value)
        parts = [one.kind.read(part) for part in (value if isinstance(value, list | tuple) else [value])]
    except ValueError as error:
        raise UsageError(f"{name}: {error}") from error
    if not isinstance(parts[0], dict):
        return tuple(parts)
    together: dict[str, Any] = {}
    for part in parts:
        if twice := together.keys() & part.keys():
            raise UsageError(f"{name}: {min(twice)!r} is named twice")
        together |= part
    return together


TRUST = "Run the Python files of the model."
BASE = "Where the base model is now."
FOUND = "where export found it"  # the default of BASE


def _settle_limits(config: Any, *names: str) -> None:
    """Set the limits that were not given: to what a budget holds, if there is one."""
    for name in names:
        if getattr(config, name) is None:
            object.__setattr__(config, name, DEFAULT_LIMIT if config.budget is None else MOST_ITEMS)


# Items of each task that select when --limit does not say otherwise. One accuracy on 1,000 items has a standard error
# of 1.5 points; with a few hundred a search fits its items and not the model (measured on SmolLM2-135M).
DEFAULT_LIMIT = 1000
# Items of each task that certify --max-drop. Flips of 5 % of the answers each way and no loss at all take about 700
# items in all to rule out a loss of two points.
CERTIFY_LIMIT = 2000
STUDY_METRICS = (
    "ablation", "ablation:signal=probability", "cosine", "perplexity", "angular", "taylor", "relative", "magnitude",
)  # fmt: skip
SEARCHES = "one-shot, greedy[:lazy=true], blocks or exchange[:by=cosine+angular]"


@dataclass(frozen=True, kw_only=True)
class SourceOptions(Config):
    """Where tasks and their data come from."""

    include_path: tuple[Path, ...] = option(
        PathTo("DIR"), "Folder of lm-eval task YAMLs to add; may be repeated.", (), many=True
    )
    data_dir: Path | None = option(PathTo("DIR"), "Folder that mirrors Hub dataset ids (owner/name).")


@dataclass(frozen=True, kw_only=True)
class PromptOptions(SourceOptions):
    """How items become prompts; spelled and meant as in lm-eval."""

    num_fewshot: int | None = option(
        Whole(0, MOST_EXAMPLES),
        "Worked examples before each item; a task that says 0 keeps 0.",
        default="as each task says",
    )
    apply_chat_template: bool | str | None = option(
        Template(), "Prompt through the tokenizer's chat template (or the one of that NAME), not as plain text."
    )
    fewshot_as_multiturn: bool | None = option(
        Flag(optional=True),
        "Few-shot examples as turns of the chat; under a chat template they are, unless this is false.",
    )
    system_instruction: str | None = option(Text("TEXT"), "System message before everything else.")


@dataclass(frozen=True, kw_only=True)
class LoadOptions(Config):
    """How a model is loaded."""

    dtype: str = option(Text("NAME"), "float32, bfloat16, float16 or auto.", "auto")
    device: str = option(Text("NAME"), "cpu, cuda, cuda:1 or auto.", "auto")
    seed: int = option(Whole(0, LARGEST_SEED), "Seed of everything that is drawn.", 0)
    trust_remote_code: bool = option(Flag(), TRUST, False, default="refuse")


@dataclass(frozen=True, kw_only=True)
class MachineOptions(LoadOptions):
    """How a model is loaded and evaluated."""

    batch_size: int | str = option(Rows(), "Rows computed at once.", "auto")
    memory: int | None = option(Size(), "What evaluating may hold beside the weights.", default="4GiB")


@dataclass(frozen=True, kw_only=True)
class ModelOptions(Config):
    """Which model."""

    model: str
    revision: str | None = option(Text("REV"), "Branch, tag or commit of a Hub model.")


@dataclass(frozen=True, kw_only=True)
class InspectConfig(ModelOptions):
    """Options of ``inspect``."""

    trust_remote_code: bool = option(Flag(), TRUST, False, default="refuse")


@dataclass(frozen=True, kw_only=True)
class ScoreConfig(PromptOptions, ModelOptions, MachineOptions):
    """Options of ``score``."""

    metric: str = option(Text("SPEC"), "What judges a layer, see `layerprune metrics`.", "ablation")
    tasks: tuple[str, ...] = option(List(Text()), "lm-eval tasks that supply the items; of a group, each task.", ())
    limit: int = option(
        Whole(1, MOST_ITEMS),
        "Use at most so many items of each task.",
        default=f"{DEFAULT_LIMIT}, or what --budget holds",
    )
    budget: float | None = option(
        Duration(),
        "Use as many items of each task as fit into this time, 20m or 1h30m, by the speed on the first of them.",
    )
    objective: str | None = option(
        Choice(("mean", "worst", "weighted")),
        "What counts of several tasks: the mean, the worst of them, or a weighted mean (see --weights).",
    )
    weights: Mapping[str, float] | None = option(
        Figures(), "Weights of tasks in the mean; a task not named counts 1.", many=True
    )
    floor: Mapping[str, float] | None = option(
        Figures(),
        "Share of the intact model's accuracy above chance, or with signal=answers of the tokens of its own answers, "
        "that a task must keep on the search items: gsm8k=0.9.",
        many=True,
    )
    protect: str | None = option(Layers(), "Layers never to remove: 0-3,-1 (negative: from the end).")

    def __post_init__(self) -> None:
        super().__post_init__()
        _settle_limits(self, "limit")


@dataclass(frozen=True, kw_only=True)
class PlanConfig(ScoreConfig):
    """Options of ``plan``: those of ``score``, how far to go, and by which search."""

    drop: str | None = option(Text("N|N%"), "How many layers to remove, or which share of them.")
    target_params: str | None = option(Text("N"), "Remove layers until so many parameters are left: 1.2B, 110M.")
    target_bytes: str | None = option(Text("SIZE"), "Remove layers until the weights take so much: 2GB, 500MB.")
    target_speedup: str | None = option(
        Text("Nx"), "Remove layers until prefill and decoding are so many times as fast on this machine: 1.3x."
    )
    max_drop: str | None = option(
        Text("N%"), "Remove as much as is certified to lose less accuracy than this: 2% is two points."
    )
    confidence: str | None = option(Text("N%"), "How sure --max-drop has to be.", default="95%")
    certify_limit: int | None = option(
        Whole(1, MOST_ITEMS),
        "Items of each task that certify --max-drop, beyond --limit; no search sees them.",
        default=str(CERTIFY_LIMIT),
    )
    front: bool = option(
        Flag(), "A plan for each step of one path, in front/, with a table and a plot.", False, in_recipes=False
    )
    up_to: str | None = option(
        Text("N|N%"),
        "Where --front or --max-drop ends at the latest.",
        default="75% for a front, else all that may go",
    )
    search: str | None = option(
        Text("SPEC"), f"{SEARCHES}. Others come as plug-ins.", default="the metric's own, greedy for ablation"
    )
    racing: bool | None = option(
        Flag(negative=True),
        "Stop layers early that are clearly not next.",
        default="yes, but for --objective worst and --floor",
    )
    keep_period: bool = option(
        Flag(), "What repeats from layer to layer goes on repeating; whole periods go with --search blocks.", False
    )
    no_adjacent: bool = option(Flag(), "No two neighbouring layers.", False)
    contiguous: bool = option(Flag(), "Only one run of neighbouring layers.", False)


@dataclass(frozen=True, kw_only=True)
class PruneConfig(PlanConfig):
    """Options of ``prune``: those of ``plan``, and what is done with the checkpoint."""

    heal: str | None = option(Text("SPEC"), "Heal before the audit, see `layerprune healers`: linear.")
    corpus: str | None = option(
        Text("TEXT"), "What --heal reads: a file or folder, a Hub dataset, or builtin, a small text of this package."
    )
    audit_tasks: tuple[str, ...] | None = option(List(Text()), "Tasks of the audit.", default="those of --tasks")
    audit_limit: int | None = option(Whole(1, MOST_ITEMS), "Items of each task of the audit.", default="all")


@dataclass(frozen=True, kw_only=True)
class ExportConfig(Config):
    """Options of ``export``."""

    remove: str | None = option(
        Layers(), "Remove exactly these layers of MODEL: 21-24 or 3,-1 (0-based).", in_recipes=False
    )
    revision: str | None = option(Text("REV"), "Branch, tag or commit of a Hub model.", in_recipes=False)
    base: str | None = option(Text("MODEL"), BASE, default="where the plan found it", in_recipes=False)
    max_shard_size: int | None = option(Size(), "Largest weight file, such as 500MB.", default="5GB")
    trust_remote_code: bool = option(Flag(), TRUST, False, default="refuse")


@dataclass(frozen=True, kw_only=True)
class HealConfig(SourceOptions, LoadOptions):
    """Options of ``heal``."""

    method: str = required(Text("SPEC"), "How to heal, see `layerprune healers`.")
    corpus: str | None = option(
        Text("TEXT"),
        "A text, jsonl or parquet file or folder, a Hub dataset (owner/name:split), or builtin: a small text of this "
        "package.",
    )
    base: str | None = option(Text("MODEL"), BASE, default=FOUND, in_recipes=False)
    tasks: tuple[str, ...] | None = option(
        List(Text()), "Tasks whose items must not stand in the corpus.", default="those the plan was made with"
    )
    window: int | None = option(
        Whole(2, 2**24), "Tokens of a window.", default="512, or what the model reads"
    )  # 2**24: beyond any context


@dataclass(frozen=True, kw_only=True)
class AuditConfig(PromptOptions, MachineOptions):
    """Options of ``audit``."""

    tasks: tuple[str, ...] | None = option(
        List(Text()), "lm-eval tasks and groups.", default="those the plan was made with"
    )
    limit: int | None = option(Whole(1, MOST_ITEMS), "Use at most so many items of each task.", default="all")
    base: str | None = option(Text("MODEL"), BASE, default=FOUND, in_recipes=False)
    compare: Mapping[str, Any] | None = option(
        Labelled(), "Another plan for the same base, run on the same items too.", many=True
    )
    scores: tuple[Any, ...] = option(
        DocumentFile(), "scores.json of another metric, to be shown beside.", (), many=True
    )
    text: Path | None = option(PathTo("FILE"), "A .txt or .jsonl text for perplexity and KL, too.")
    generation: bool = option(Flag(negative=True), "Look at what both models write, too.", True)
    speed: bool = option(Flag(negative=True), "Time both models, too.", False)
    layerwise: bool = option(
        Flag(negative=True),
        "Ask the base without each removed layer alone, too, on up to 200 items a task.",
        True,
    )


@dataclass(frozen=True, kw_only=True)
class VerifyConfig(SourceOptions):
    """Options of ``verify``."""

    base: str | None = option(Text("MODEL"), "Compare this base model's weights with the receipt, too.")
    rerun: int | None = option(Whole(1, MOST_ITEMS), "Ask both models N random items of the audit again.")
    device: str = option(Text("NAME"), "Where --rerun computes: cpu, cuda, cuda:1 or auto.", "auto")
    trust_remote_code: bool = option(Flag(), TRUST, False, default="refuse")


@dataclass(frozen=True, kw_only=True)
class PushConfig(Config):
    """Options of ``push``."""

    private: bool = option(Flag(), "Make a repo that does not exist yet private.", False)
    revision: str | None = option(Text("BRANCH"), "Branch to push to, made where it is missing.", default="main")
    create_pr: bool = option(Flag(), "Open a pull request instead of committing.", False)
    base_model: str | None = option(
        Text("ID"), "Hub id of a base that was a local folder, for the card; its files must be equal."
    )
    dry_run: bool = option(Flag(), "Verify, and list what would go; nothing is sent.", False)
    allow_unaudited: bool = option(Flag(), "Push a folder whose losses nobody has measured.", False)


@dataclass(frozen=True, kw_only=True)
class StudyConfig(PromptOptions, ModelOptions, MachineOptions):
    """Options of ``study``."""

    tasks: tuple[str, ...] = required(List(Text()), "lm-eval tasks and groups that supply the items.")
    metrics: tuple[str, ...] = option(
        Text("SPEC"),
        "A metric to study; may be repeated, with ablation among them.",
        STUDY_METRICS,
        many=True,
        flag="--metric",
        default="eight; see `layerprune metrics`",
    )
    limit: int = option(
        Whole(1, MOST_ITEMS),
        "Items of each task that metrics and searches see.",
        default=f"{DEFAULT_LIMIT}, or what --budget holds",
    )
    audit_limit: int = option(
        Whole(1, MOST_ITEMS),
        "Other items that accuracy is measured on.",
        default=f"{DEFAULT_LIMIT}, or what --budget holds",
    )
    budget: float | None = option(
        Duration(), "Use as many items of each task as fit into this time, as many to choose as to judge: 2h."
    )
    text: Path | None = option(PathTo("FILE"), "A .txt or .jsonl text for metrics to read, too.")
    counts: tuple[int, ...] = option(
        List(Whole(1, 10**6), "N,N"), "Layers removed where accuracy is measured.", (), default="ten up to 75 %"
    )
    greedy: str | None = option(Text("N|N%"), "Also follow greedy ablation so far; as many rounds.")
    protect: str | None = option(Layers(), "Layers never to remove: 0-3,-1 (negative: from the end).")

    def __post_init__(self) -> None:
        super().__post_init__()
        _settle_limits(self, "limit", "audit_limit")
