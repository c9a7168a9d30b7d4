"""Every option of every command, declared once: its type, bounds, default and help.

The command line, the keys of recipes, the signatures of the Python API and docs/CLI.md are made from the dataclasses
here. Building one checks each value: ``ScoreConfig(model="gpt2", limit=0)`` raises ``UsageError`` with one line. A new
option is one new field.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

from layerprune import option_types as types
from layerprune.errors import UsageError, did_you_mean
from layerprune.option_types import OptionType

MOST_ITEMS = 10**9  # more than any benchmark has, and what numpy and JSON readers hold without loss
MOST_EXAMPLES = 1000  # few-shot examples: more than any context holds
LARGEST_SEED = 2**32 - 1  # what numpy and transformers take
ITEMS = types.whole(1, MOST_ITEMS)


@dataclass(frozen=True)
class Option:
    """What a field of a Config declares."""

    type: OptionType
    help: str
    value: Any = None  # its default; None: it is not given, MISSING: it has to be
    default: str | None = None  # how help tells the default, where it is not the value itself
    many: bool = False  # may be given several times on the command line
    flag: str | None = None  # its name on the command line, where it is not the field's
    in_recipes: bool = True


def option(type: OptionType, help: str, value: Any = None, **more: Any) -> Any:
    """Declare an option with the default ``value``; None means that it is not given. ``more``: fields of ``Option``."""
    return field(default=value, metadata={"option": Option(type, help, value, **more)})


def required(type: OptionType, help: str, **more: Any) -> Any:
    """Declare an option that has to be given."""
    return option(type, help, MISSING, **more)


def declared(config: type[Config]) -> dict[str, Option]:
    """Return what each field of a Config declares: its own fields first, then those of the classes it is made of."""
    own = {one.name: one.metadata["option"] for one in fields(config) if "option" in one.metadata}
    order = dict.fromkeys(name for base in config.__mro__ for name in vars(base).get("__annotations__", {}))
    return {name: own[name] for name in order if name in own}


@dataclass(frozen=True, kw_only=True)
class Config:
    """The options of one command. Values are read by their types, so text is as good as a number."""

    budgeted: ClassVar[tuple[str, ...]] = ()  # limits that, where they are not given, are what a budget holds

    def __post_init__(self: Any) -> None:
        for name, one in declared(type(self)).items():
            value = getattr(self, name)
            if value is None or value == ():  # not given
                continue
            object.__setattr__(self, name, _read(name, one, value))
        for name in self.budgeted:
            if getattr(self, name) is None:
                object.__setattr__(self, name, DEFAULT_LIMIT if self.budget is None else MOST_ITEMS)

    @classmethod
    def of(cls, **options: Any) -> Any:
        """Return the Config of ``options``; raises ``UsageError`` for a name that it does not have."""
        known = [one.name for one in fields(cls)]
        for name in options:
            if name not in known and name in MOVED:
                raise UsageError(f"the option {name!r} is gone: {MOVED[name]}")
            if name not in known:
                raise UsageError(f"there is no option {name!r}.{did_you_mean(name, known)}")
        missing = [one.name for one in fields(cls) if one.name not in options and one.default is MISSING]
        if missing:
            raise UsageError(f"the option {missing[0]!r} has to be given")
        return cls(**{name: value for name, value in options.items() if value is not None})


MOVED = {"rerun": "layerprune audit FOLDER --recheck N asks audited items again"}  # options of earlier versions


def _read(name: str, one: Option, value: Any) -> Any:
    try:
        if not one.many:
            return one.type.read(value)
        parts = [one.type.read(part) for part in (value if isinstance(value, list | tuple) else [value])]
    except ValueError as error:
        raise UsageError(f"{name}: {error}") from error
    if not one.type.by_name:
        return tuple(parts)
    together: dict[str, Any] = {}
    for part in parts:
        if twice := together.keys() & part.keys():
            raise UsageError(f"{name}: {min(twice)!r} is named twice")
        together |= part
    return together


BASE = "Where the base model is now."
FOUND = "where export found it"  # the default of BASE
# Items of each task that select when --limit does not say otherwise. One accuracy on 1,000 items has a standard error
# of 1.5 points; with a few hundred a search fits its items and not the model (measured on SmolLM2-135M).
DEFAULT_LIMIT = 1000
BUDGETED = f"{DEFAULT_LIMIT}, or what --budget holds"
# Items of each task that certify --max-drop. Flips of 5 % of the answers each way and no loss at all take about 700
# items in all to rule out a loss of two points.
CERTIFY_LIMIT = 2000
STUDY_METRICS = (
    "ablation", "ablation:signal=probability", "cosine", "perplexity", "angular", "taylor", "relative", "magnitude",
)  # fmt: skip
SEARCHES = "one-shot, greedy[:lazy=true], blocks or exchange[:by=cosine+angular]"


@dataclass(frozen=True, kw_only=True)
class TrustOptions(Config):
    """Whether a model may bring code of its own."""

    trust_remote_code: bool = option(types.flag(), "Run the Python files of the model.", False, default="refuse")


@dataclass(frozen=True, kw_only=True)
class SourceOptions(Config):
    """Where tasks and their data come from."""

    include_path: tuple[Path, ...] = option(
        types.folder, "Folder of lm-eval task YAMLs to add; may be repeated.", (), many=True
    )
    data_dir: Path | None = option(types.folder, "Folder that mirrors Hub dataset ids (owner/name).")


@dataclass(frozen=True, kw_only=True)
class PromptOptions(SourceOptions):
    """How items become prompts; spelled and meant as in lm-eval."""

    num_fewshot: int | None = option(
        types.whole(0, MOST_EXAMPLES),
        "Worked examples before each item; a task that says 0 keeps 0.",
        default="as each task says",
    )
    apply_chat_template: bool | str | None = option(
        types.template, "Prompt through the tokenizer's chat template (or the one of that NAME), not as plain text."
    )
    fewshot_as_multiturn: bool | None = option(
        types.flag(optional=True),
        "Few-shot examples as turns of the chat; under a chat template they are, unless this is false.",
    )
    system_instruction: str | None = option(types.text(), "System message before everything else.")


@dataclass(frozen=True, kw_only=True)
class LoadOptions(TrustOptions):
    """How a model is loaded."""

    dtype: str = option(types.text("NAME"), "float32, bfloat16, float16 or auto.", "auto")
    device: str = option(types.text("NAME"), "cpu, cuda, cuda:1 or auto.", "auto")
    attn_implementation: str = option(
        types.text("NAME"), "eager, sdpa, flash_attention_2 or another that transformers knows.", "auto"
    )
    offload: str = option(
        types.choice("auto", "none", "cpu", "disk"),
        "Where decoder layers stay until they run; auto: on the device if the model fits.",
        "auto",
    )
    seed: int = option(types.whole(0, LARGEST_SEED), "Seed of everything that is drawn.", 0)


@dataclass(frozen=True, kw_only=True)
class MachineOptions(LoadOptions):
    """How a model is loaded and evaluated."""

    batch_size: int | str = option(types.rows, "Rows computed at once.", "auto")
    memory: int | None = option(
        types.size,
        "What evaluating may hold beside the weights.",
        default="of what the weights leave, 40% of a CPU's memory (up to 32GiB) or 80% of a card's",
    )


@dataclass(frozen=True, kw_only=True)
class ModelOptions(Config):
    """Which model."""

    model: str
    revision: str | None = option(types.text("REV"), "Branch, tag or commit of a Hub model.")


@dataclass(frozen=True, kw_only=True)
class InspectConfig(TrustOptions, ModelOptions):
    """Options of ``inspect``."""

    base: str | None = option(
        types.text("MODEL"), "Compare it with this model, too: which of its layers are there, and what else differs."
    )


@dataclass(frozen=True, kw_only=True)
class ScoreConfig(PromptOptions, ModelOptions, MachineOptions):
    """Options of ``score``."""

    budgeted = ("limit",)
    metric: str = option(types.text("SPEC"), "What judges a layer, see `layerprune metrics`.", "ablation")
    tasks: tuple[str, ...] = option(types.names, "lm-eval tasks that supply the items; of a group, each task.", ())
    limit: int = option(ITEMS, "Use at most so many items of each task.", default=BUDGETED)
    budget: float | None = option(
        types.duration,
        "Use as many items of each task as fit into this time, 20m or 1h30m, by the speed on the first of them.",
    )
    objective: str | None = option(
        types.choice("mean", "worst", "weighted"),
        "What counts of several tasks: the mean, the worst of them, or a weighted mean (see --weights).",
    )
    weights: Mapping[str, float] | None = option(
        types.figures, "Weights of tasks in the mean; a task not named counts 1.", many=True
    )
    floor: Mapping[str, float] | None = option(
        types.figures,
        "Share of the intact model's accuracy above chance, or with signal=answers of the tokens of its own answers, "
        "that a task must keep on the search items: gsm8k=0.9.",
        many=True,
    )
    protect: str | None = option(types.layers, "Layers never to remove: 0-3,-1 (negative: from the end).")


VLLM = "vllm"


@dataclass(frozen=True, kw_only=True)
class SpeedOptions(Config):
    """What runs the models that are timed."""

    speed_engine: str = option(
        types.choice("transformers", VLLM),
        "What runs the models that are timed: transformers, or vllm, as a server would (audit only).",
        "transformers",
    )

    def _check_engine(self, owner: str, timed: bool) -> None:
        """Raise ``UsageError`` where the engine is chosen and ``owner``, the option that times, is not given."""
        if self.speed_engine == VLLM and not timed:
            raise UsageError(f"--speed-engine {VLLM} belongs to {owner}, which is not given")


@dataclass(frozen=True, kw_only=True)
class PlanConfig(SpeedOptions, ScoreConfig):
    """Options of ``plan``: those of ``score``, how far to go, and by which search."""

    drop: str | None = option(types.text("N|N%"), "How many layers to remove, or which share of them.")
    target_params: str | None = option(types.text("N"), "Remove layers until so many parameters are left: 1.2B, 110M.")
    target_bytes: str | None = option(types.text("SIZE"), "Remove layers until the weights take so much: 2GB, 500MB.")
    target_speedup: str | None = option(
        types.text("Nx"), "Remove layers until prefill and decoding are so many times as fast on this machine: 1.3x."
    )
    max_drop: str | None = option(
        types.text("N%"), "Remove as much as is certified to lose less accuracy than this: 2% is two points."
    )
    confidence: str | None = option(types.text("N%"), "How sure --max-drop has to be.", default="95%")
    certify_limit: int | None = option(
        ITEMS,
        "Items of each task that certify --max-drop, beyond --limit; no search sees them.",
        default=str(CERTIFY_LIMIT),
    )
    front: bool = option(
        types.flag(), "A plan for each step of one path, in front/, with a table and a plot.", False, in_recipes=False
    )
    up_to: str | None = option(
        types.text("N|N%"),
        "Where --front or --max-drop ends at the latest.",
        default="75% for a front, else all that may go",
    )
    search: str | None = option(
        types.text("SPEC"), f"{SEARCHES}. See `layerprune searches`.", default="the metric's own, greedy for ablation"
    )
    racing: bool | None = option(
        types.flag(negative=True),
        "Stop layers early that are clearly not next.",
        default="yes, but for --objective worst and --floor",
    )
    keep_period: bool = option(
        types.flag(),
        "What repeats from layer to layer goes on repeating; whole periods go with --search blocks.",
        False,
    )
    no_adjacent: bool = option(types.flag(), "No two neighbouring layers.", False)
    contiguous: bool = option(types.flag(), "Only one run of neighbouring layers.", False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_engine("--target-speedup", self.target_speedup is not None)
        if self.speed_engine == VLLM:
            raise UsageError(
                f"--speed-engine {VLLM} reads checkpoints, and a plan has written none yet: plan by transformers, "
                f"export, then layerprune audit FOLDER --speed --speed-engine {VLLM}"
            )


@dataclass(frozen=True, kw_only=True)
class PruneConfig(PlanConfig):
    """Options of ``prune``: those of ``plan``, and what is done with the checkpoint."""

    heal: str | None = option(types.text("SPEC"), "Heal before the audit, see `layerprune healers`: linear.")
    corpus: str | None = option(
        types.text(), "What --heal reads: a file or folder, a Hub dataset, or builtin, a small text of this package."
    )
    audit_tasks: tuple[str, ...] | None = option(types.names, "Tasks of the audit.", default="those of --tasks")
    audit_limit: int | None = option(ITEMS, "Items of each task of the audit.", default="all")


FORMS = ("mergekit", "minitron", "llama-quantize", "list")


@dataclass(frozen=True, kw_only=True)
class ExportConfig(TrustOptions):
    """Options of ``export``."""

    remove: str | None = option(
        types.removal,
        "Remove exactly these layers of MODEL: 21-24 or 3,-1 (0-based), or those that a mergekit passthrough (.yaml) "
        "leaves out.",
        in_recipes=False,
    )
    form: str | None = option(
        types.choice(*FORMS),
        f"Print the removal as another tool takes it, and write nothing: {', '.join(FORMS)}.",
        flag="--as",
        in_recipes=False,
    )
    revision: str | None = option(types.text("REV"), "Branch, tag or commit of a Hub model.", in_recipes=False)
    base: str | None = option(types.text("MODEL"), BASE, default="where the plan found it", in_recipes=False)
    max_shard_size: int | None = option(types.size, "Largest weight file, such as 500MB.", default="5GB")


@dataclass(frozen=True, kw_only=True)
class HealConfig(SourceOptions, LoadOptions):
    """Options of ``heal``."""

    method: str = required(types.text("SPEC"), "How to heal, see `layerprune healers`.")
    corpus: str | None = option(
        types.text(),
        "A text, jsonl or parquet file or folder, a Hub dataset (owner/name:split), or builtin: a small text of this "
        "package.",
    )
    base: str | None = option(types.text("MODEL"), BASE, default=FOUND, in_recipes=False)
    tasks: tuple[str, ...] | None = option(
        types.names, "Tasks whose items must not stand in the corpus.", default="those the plan was made with"
    )
    window: int | None = option(
        types.whole(2, 2**24), "Tokens of a window.", default="512, or what the model reads"
    )  # 2**24: beyond any context


@dataclass(frozen=True, kw_only=True)
class AuditConfig(SpeedOptions, PromptOptions, MachineOptions):
    """Options of ``audit``."""

    tasks: tuple[str, ...] | None = option(
        types.names, "lm-eval tasks and groups.", default="those the plan was made with"
    )
    limit: int | None = option(ITEMS, "Use at most so many items of each task.", default="all")
    base: str | None = option(types.text("MODEL"), BASE, default=FOUND, in_recipes=False)
    compare: Mapping[str, Any] | None = option(
        types.labelled_plans, "Another plan for the same base, run on the same items too.", many=True
    )
    scores: tuple[Any, ...] = option(
        types.document, "scores.json of another metric, to be shown beside.", (), many=True
    )
    text: Path | None = option(types.file, "A .txt or .jsonl text for perplexity and KL, too.")
    generation: bool = option(types.flag(negative=True), "Look at what both models write, too.", True)
    speed: bool = option(types.flag(negative=True), "Time both models, too, at batch sizes 1, 8 and 32.", False)
    layerwise: bool = option(
        types.flag(negative=True),
        "Ask the base without each removed layer alone, too, on up to 200 items a task.",
        True,
    )
    recheck: int | None = option(
        ITEMS,
        "Write nothing: ask N random items of the audit that is there again, the same ones with the same --seed.",
        in_recipes=False,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_engine("--speed", self.speed)
        if self.speed_engine == VLLM and find_spec(VLLM) is None:
            raise UsageError(
                f"--speed-engine {VLLM}: vLLM is not installed; pip install 'layerprune[{VLLM}]' (which also "
                "installs the releases of torch and transformers that it names), or leave the option out"
            )


@dataclass(frozen=True, kw_only=True)
class VerifyConfig(Config):
    """Options of ``verify``."""

    base: str | None = option(types.text("MODEL"), "Compare this base model's weights with the receipt, too.")


@dataclass(frozen=True, kw_only=True)
class CardConfig(Config):
    """Options of ``card``."""

    base: str | None = option(
        types.text("MODEL"), BASE + " Its card has the licence and language for one that is missing.", default=FOUND
    )


@dataclass(frozen=True, kw_only=True)
class PushConfig(Config):
    """Options of ``push``."""

    private: bool = option(types.flag(), "Make a repo that does not exist yet private.", False)
    revision: str | None = option(types.text("BRANCH"), "Branch to push to, made where it is missing.", default="main")
    create_pr: bool = option(types.flag(), "Open a pull request instead of committing.", False)
    base_model: str | None = option(
        types.text("ID"), "Hub id of a base that was a local folder, for the card; its files must be equal."
    )
    dry_run: bool = option(types.flag(), "Verify, and list what would go; nothing is sent.", False)
    allow_unaudited: bool = option(types.flag(), "Push a folder whose losses nobody has measured.", False)


@dataclass(frozen=True, kw_only=True)
class StudyConfig(PromptOptions, ModelOptions, MachineOptions):
    """Options of ``study``."""

    budgeted = ("limit", "audit_limit")
    tasks: tuple[str, ...] = required(types.names, "lm-eval tasks and groups that supply the items.")
    metrics: tuple[str, ...] = option(
        types.text("SPEC"),
        "A metric to study; may be repeated, with ablation among them.",
        STUDY_METRICS,
        many=True,
        flag="--metric",
        default="eight; see `layerprune metrics`",
    )
    limit: int = option(ITEMS, "Items of each task that metrics and searches see.", default=BUDGETED)
    audit_limit: int = option(ITEMS, "Other items that accuracy is measured on.", default=BUDGETED)
    budget: float | None = option(
        types.duration, "Use as many items of each task as fit into this time, as many to choose as to judge: 2h."
    )
    text: Path | None = option(types.file, "A .txt or .jsonl text for metrics to read, too.")
    counts: tuple[int, ...] = option(
        types.list_of(types.whole(1, 10**6), "N,N"),
        "Layers removed where accuracy is measured.",
        (),
        default="ten up to 75 %",
    )
    greedy: str | None = option(types.text("N|N%"), "Also follow greedy ablation so far; as many rounds.")
    protect: str | None = option(types.layers, "Layers never to remove: 0-3,-1 (negative: from the end).")
