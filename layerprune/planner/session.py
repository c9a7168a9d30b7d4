"""A model with its items, its metric and what a search may remove: what scoring and every search work with."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, reduce
from pathlib import Path
from typing import Any

from layerprune.architecture import Architecture
from layerprune.artifacts import MEAN, BaseTask, EngineReport, MetricRef, Objective, PlanLimits, Round, Scores
from layerprune.checkpoint import contained, locate
from layerprune.config import PlanConfig, ScoreConfig, StudyConfig
from layerprune.data.items import EvalSet, is_written
from layerprune.data.tasks import Use, check_turns, load_eval_set, prompting_of
from layerprune.errors import RefusedError, TaskError, UsageError
from layerprune.exporter import weigh
from layerprune.exporter.contents import Weight
from layerprune.models.model import LoadedModel
from layerprune.planner.budget import TimeBudget
from layerprune.planner.search_runner import SearchRunner
from layerprune.registry import Entry, build, options_of, spec_of
from layerprune.removal import Removal, parse_layers
from layerprune.scoring.aggregation import additive, asked_objective, check_tasks, signal_of, unit_of
from layerprune.scoring.cached_evaluator import JOURNAL, CachedEvaluator, own_answers
from layerprune.scoring.engine import Engine
from layerprune.scoring.memory import default_memory
from layerprune.scoring.metrics import METRICS
from layerprune.scoring.metrics.ablation import Ablation, examine_base
from layerprune.scoring.metrics.base import Data, Metric
from layerprune.search import AnyShape, Constraints, Contiguous, NoAdjacent
from layerprune.stats import draw_mixture
from layerprune.util import SILENT, Progress, tool_versions

# What a search may remove at all, from what was asked and what the architecture allows.


@dataclass(frozen=True)
class SearchRules:
    """What a removal has to keep to beside the protected layers and what the architecture demands."""

    keep_period: bool = False  # what repeats from layer to layer goes on repeating
    no_adjacent: bool = False  # no two neighbours
    contiguous: bool = False  # one run of neighbours

    def __post_init__(self) -> None:
        if self.no_adjacent and self.contiguous:
            raise UsageError("no_adjacent and contiguous exclude each other; ask for one of them")

    @classmethod
    def of(cls, config: ScoreConfig) -> SearchRules:
        """Return the rules among the options of ``plan``; scoring has none."""
        plan = isinstance(config, PlanConfig)
        return cls(config.keep_period, config.no_adjacent, config.contiguous) if plan else cls()

    def check(self, architecture: Architecture) -> Callable[[Removal], None]:
        """Return ``Architecture.check``, which raises ``RefusedError`` for a removal that may not be.

        With ``keep_period`` it also refuses what breaks a period or makes other readers misread the model.
        """

        def keeping_period(removal: Removal) -> None:
            architecture.check(removal)
            if broken := architecture.out_of_step(removal):
                raise RefusedError(f"--keep-period: {'; '.join(broken)}")

        return keeping_period if self.keep_period else architecture.check

    def constraints(
        self, depth: int, protect: str | None, architecture: Architecture | None, **moves: Any
    ) -> Constraints:
        """Return them with the protected layers and what the architecture demands; ``moves``: fields that say more."""
        if architecture is not None:
            must_keep, check = architecture.must_keep, self.check(architecture)
            moves = {"together": architecture.together, "must_keep": must_keep, "check": check} | moves
        shape = NoAdjacent() if self.no_adjacent else Contiguous() if self.contiguous else AnyShape()
        return Constraints(depth, parse_layers(protect, depth), shape=shape, **moves)

    def limits(self, protect: frozenset[int], architecture: Architecture | None) -> PlanLimits:
        """Return the rules as a plan records them."""
        return PlanLimits(
            protect=tuple(sorted(protect)),
            architecture=architecture.remarks if architecture is not None else (),
            **asdict(self),
        )


def check_objective(objective: Objective, racing: bool | None, name: str, metric: Metric) -> None:
    """Raise ``UsageError`` for an objective that the metric knows nothing of, or that a race cannot stand on."""
    if objective == MEAN:
        return
    if "items" not in metric.needs:
        raise UsageError(
            f"the metric {name!r} does not answer tasks: leave out --objective, --weights and --floor, or use ablation"
        )
    if racing and not additive(objective):
        raise UsageError(
            f"--racing goes by the mean over items, which {objective.words} is not: leave it out, or take another "
            "objective"
        )


# A model with its items and its metric: what scoring and every search work with.


@dataclass
class ScoringSession:
    """Everything a scoring run works with: first model, metric and constraints, then the items."""

    request: ScoreConfig
    entry: Entry
    metric: Metric
    loaded: LoadedModel
    constraints: Constraints
    data: Data
    progress: Progress = SILENT
    folder: Path | None = None  # the run folder; None: nothing is written down
    everything: EvalSet | None = None  # the items of all slices
    held_back: CachedEvaluator | None = None
    certification: CachedEvaluator | None = None
    base: dict[str, BaseTask] = field(default_factory=dict)
    began: float = field(default_factory=time.monotonic)

    @classmethod
    def open(
        cls, request: ScoreConfig, folder: Path | None, progress: Progress, loaded: LoadedModel | None = None
    ) -> ScoringSession:
        """Validate the request and load the model, where ``loaded`` is not loaded already."""
        began = time.monotonic()
        rules = SearchRules.of(request)
        entry, metric = build(METRICS, request.metric)
        if request.budget is not None and "items" not in metric.needs:
            raise UsageError(f"--budget: the metric {entry.name!r} answers no items; use --limit, or ablation")
        if prompting_of(request).apply_chat_template:
            progress.note("prompts go through the tokenizer's chat template")
        if metric.needs and not request.tasks:
            wanted = " and ".join(metric.needs)
            raise UsageError(f"the metric {entry.name!r} needs {wanted}: give tasks, such as --tasks arc_easy")
        objective = asked_objective(request.objective, request.weights, request.floor)
        racing = request.racing if isinstance(request, PlanConfig) else None
        check_objective(objective, racing, entry.name, metric)
        if loaded is None:
            progress.note(f"loading {request.model}")
            loaded = LoadedModel.load(
                request.model,
                revision=request.revision,
                dtype=request.dtype,
                device=request.device,
                attn_implementation=request.attn_implementation,
                offload=request.offload,
                trust_remote_code=request.trust_remote_code,
                reads_text=bool(request.tasks),  # a metric that needs items or text was refused without them
            )
        if loaded.tokenizer is None:
            progress.note(f"{request.model} has no tokenizer: the metric {entry.name!r} needs none")
        architecture = loaded.architecture
        constraints = rules.constraints(architecture.depth, request.protect, architecture)
        if not constraints.moves and not isinstance(request, PlanConfig):  # a plan's goal says it in its own words
            said = f"none of the {architecture.depth} layers may go"
            raise UsageError(f"{said}: --protect keeps {request.protect}" if request.protect else said)
        rows = request.batch_size if isinstance(request.batch_size, int) else None
        memory = request.memory or default_memory(loaded)
        data = Data(objective=objective, seed=request.seed, progress=progress, rows=rows, memory=memory)
        return cls(request, entry, metric, loaded, constraints, data, progress, folder, began=began)

    def bring_items(self, shares: SplitShares, evaluations: int | None = None) -> None:
        """Load the items, divide them, and see that the intact model is above chance on every task.

        ``evaluations``: how many removals each item will be answered under, for a budget; by default each move alone.
        """
        if not self.request.tasks:
            return
        ablation = self.metric if isinstance(self.metric, Ablation) else None
        answers = ablation is not None and ablation.signal == "answers"
        only_right = answers and ablation.only == "right"

        def load(limit: int) -> EvalSet:
            return load_items(self.request, self.loaded, "selection", limit, ungraded=answers and not only_right)

        if self.request.budget is None:
            eval_set = load(self.request.limit + shares.certify)
        else:
            if shares.certify:
                said = "how many items certify --max-drop has to be fixed beforehand; leave it out"
                raise UsageError(f"--budget: {said}")
            budget = self._budget(evaluations or len(self.constraints.moves))
            moves = [Removal.of(*move) for move in self.constraints.moves]
            most = budget.items(load, self._engine(), moves, answers=answers)
            self.request = replace(self.request, limit=min(most, self.request.limit))
            eval_set = load(self.request.limit)
            budget.say(eval_set)
        for remark in eval_set.remarks():
            self.progress.note(remark)
        check_turns(self.request.fewshot_as_multiturn, eval_set)
        check_tasks(self.data.objective, list(eval_set.tasks))
        judged = "items" in self.metric.needs
        if not judged and not shares.examined:
            self.everything = self.data.eval_set = eval_set
            return
        engine = self._engine()
        if answers:
            eval_set = own_answers(engine, eval_set, only_right=only_right, folder=self.folder, progress=self.progress)
        elif ablation is not None:
            for name in (name for name, task in eval_set.tasks.items() if is_written(task)):
                self.progress.note(
                    f"task {name!r} has the model write, under every removal; ablation:signal=answers reads what the "
                    "intact model wrote instead, at about the cost of choices"
                )
        search, held_back, certification = split_items(eval_set, shares, self.request)
        self.data.eval_set = search
        self.everything = _joined(search, held_back, certification)

        def evaluator(part: EvalSet | None) -> CachedEvaluator | None:
            return None if part is None else CachedEvaluator(engine, part, self.progress, self.folder)

        self.data.evaluator = evaluator(search) if judged else None
        self.held_back, self.certification = evaluator(held_back), evaluator(certification)
        evaluators = [each for each in (self.data.evaluator, self.held_back, self.certification) if each is not None]
        examined = self.everything if judged else _joined(held_back, certification)
        journal = None if self.folder is None else self.folder / JOURNAL
        fresh = journal is not None and not journal.exists()
        try:
            base = examine_base(examined, evaluators, signal_of(self.metric_ref()))
        except TaskError:
            if fresh:  # remove the journal of a run that a task at chance ends before it has begun
                journal.unlink(missing_ok=True)
            raise
        self.base = base if judged else {}
        remarks = "; ".join(engine.remarks) or "it agrees with plain forwards"
        self.progress.note(f"evaluation path: {evaluators[0].path} ({remarks})")

    def _engine(self) -> Engine:
        return Engine(self.loaded, rows=self.data.rows, memory=self.data.memory)

    def _budget(self, evaluations: int) -> TimeBudget:
        request = self.request
        assert request.budget is not None
        asked = {
            "model": self.loaded.marks, "metric": spec_of(self.entry.name, self.metric), "tasks": [*request.tasks],
            "budget": request.budget, "seed": request.seed, "limit": request.limit,
            "prompting": prompting_of(request).model_dump(mode="json"), "num_fewshot": request.num_fewshot,
            "evaluations": evaluations, "rows": self.data.rows, "memory": self.data.memory,
        }  # fmt: skip
        return TimeBudget(request.budget, self.began, evaluations, asked, self.folder, self.progress)

    @cached_property
    def runner(self) -> SearchRunner:
        """What judges and searches on the items; they are there by then."""
        return SearchRunner(self.loaded, self.data, self.folder)

    def scores(self, rounds: tuple[Round, ...]) -> Scores:
        """Write down everything that was looked at."""
        evaluator = self.data.evaluator
        report = None
        if evaluator is not None:
            report = EngineReport(
                path=evaluator.path,
                dtype=str(self.loaded.dtype).removeprefix("torch."),
                device=self.loaded.device.type,
                attention=self.loaded.attention,
                computed=evaluator.account.computed,
                naive=evaluator.account.naive,
            )
        return Scores(
            model=self.loaded.ref,
            metric=self.metric_ref(),
            data=self.everything.data() if self.everything else (),
            base=self.base,
            rounds=rounds,
            engine=report,
            config=contained(self.checkpoint, "config.json").read_text(encoding="utf-8"),
            seed=self.request.seed,
            versions=tool_versions(),
        )

    def metric_ref(self) -> MetricRef:
        return MetricRef(
            name=self.entry.name,
            spec=spec_of(self.entry.name, self.metric),
            options=options_of(self.metric),
            unit=unit_of(self.metric),
            scope=self.metric.scope,
            owner=self.entry.owner,
            objective=self.data.objective,
        )

    def weigh(self, *removals: Removal) -> list[Weight]:
        """Return the sizes that export would write."""
        return weigh(self.checkpoint, removals, trust_remote_code=self.request.trust_remote_code)

    @property
    def checkpoint(self) -> Path:
        """The folder of the model on disk."""
        return locate(self.request.model, self.loaded.ref.revision).path  # the very snapshot that was scored


def load_items(
    request: ScoreConfig | StudyConfig, loaded: LoadedModel, use: Use, limit: int | None, **more: Any
) -> EvalSet:
    """Load up to ``limit`` items of each task as the request has them; ``more`` goes to ``load_eval_set``."""
    return load_eval_set(
        request.tasks,
        loaded.encoder,
        use=use,
        include_path=request.include_path,
        data_dir=request.data_dir,
        limit=limit,
        num_fewshot=request.num_fewshot,
        prompting=prompting_of(request),
        seed=request.seed,
        **more,
    )


# Selection items divided: what the search sees, what is held back for the prediction, what certifies.


@dataclass(frozen=True)
class SplitShares:
    """How to divide the items; what is neither held back nor for certification is the search's."""

    held_back: float = 0.0  # share of the items that do not certify
    certify: int = 0  # items of each task for certification, beyond the request's limit
    examined: bool = False  # answer held-back items even where the metric itself looks at none


def split_items(
    eval_set: EvalSet, shares: SplitShares, request: ScoreConfig
) -> tuple[EvalSet, EvalSet | None, EvalSet | None]:
    """Divide ``eval_set`` task by task, by item fingerprint: for the search, held back, for certification.

    No item is in two of them. None: there are too few to spare any. ``UsageError`` where a slice would have none.
    """
    rest, certification = eval_set, None
    if shares.certify:
        share = shares.certify / (request.limit + shares.certify)
        rest, spared = eval_set.held_back(share, "certification")
        certification = _mixture(spared, request.seed)
    search, held_back = rest.held_back(shares.held_back)
    if all(task.items for part in (search, held_back) for task in part.tasks.values()):
        return search, held_back, certification
    if shares.examined:
        raise UsageError(f"{len(rest)} selection items are too few to hold some back; raise --limit")
    return rest, None, certification


def _mixture(eval_set: EvalSet, seed: int) -> EvalSet:
    """Draw the items whose outcomes together are about the mean of the tasks; see ``stats.draw_mixture``."""
    sizes = {name: len(task.items) for name, task in eval_set.tasks.items()}
    drawn = draw_mixture(sizes, seed) if all(sizes.values()) else {}
    parts = {
        name: replace(task, items=tuple(task.items[place] for place in drawn.get(name, ())))
        for name, task in eval_set.tasks.items()
    }
    empty = [name for name, task in parts.items() if not task.items]
    if empty:
        raise UsageError(f"task {empty[0]!r} has too few items to spare any for certification; leave it out")
    return EvalSet(parts)


def _joined(*parts: EvalSet | None) -> EvalSet:
    """Return all items, task by task in the order of the parts."""
    return reduce(EvalSet.followed_by, [part for part in parts if part is not None])
