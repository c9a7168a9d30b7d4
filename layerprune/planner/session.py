"""A model with its items, its metric and what a search may remove: what scoring and every search work with."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import reduce
from pathlib import Path

from layerprune.architecture import Architecture
from layerprune.artifacts import (
    MEAN,
    BaseTask,
    Candidate,
    EngineReport,
    MetricRef,
    Objective,
    PlanLimits,
    Round,
    Scores,
)
from layerprune.checkpoint import contained, locate
from layerprune.config import PlanConfig, ScoreConfig
from layerprune.data.items import EvalSet, is_written
from layerprune.data.tasks import check_turns, load_eval_set, prompting_of
from layerprune.errors import RefusedError, TaskError, UsageError
from layerprune.exporter import dry_run, weigh
from layerprune.exporter.contents import Weight
from layerprune.models.model import LoadedModel
from layerprune.planner.budget import TimeBudget
from layerprune.registry import Entry, build, options_of, spec_of
from layerprune.removal import Removal
from layerprune.scoring.aggregation import additive, asked_objective, check_tasks, signal_of, unit_of
from layerprune.scoring.cached_evaluator import JOURNAL, CachedEvaluator, Journal, journal_key, own_answers
from layerprune.scoring.engine import Engine
from layerprune.scoring.metrics import METRICS
from layerprune.scoring.metrics.ablation import Ablation, examine_base
from layerprune.scoring.metrics.base import Data, Metric
from layerprune.search import Anything, Constraints, Contiguous, Judge, NoAdjacent, Shape, parse_protect
from layerprune.stats import draw_mixture
from layerprune.util import SILENT, Progress, source_of, tool_versions

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
    def of(cls, config: PlanConfig) -> SearchRules:
        """Return the rules among the options of ``plan``."""
        return cls(config.keep_period, config.no_adjacent, config.contiguous)

    @property
    def shape(self) -> Shape:
        """The rule about neighbours."""
        return NoAdjacent() if self.no_adjacent else Contiguous() if self.contiguous else Anything()

    def check(self, architecture: Architecture) -> Callable[[Removal], None]:
        """Return what raises ``RefusedError`` for a removal that may not be."""
        return keeping_period(architecture) if self.keep_period else architecture.check

    def limits(self, protect: frozenset[int], architecture: Architecture | None) -> PlanLimits:
        """Return the rules as a plan records them."""
        return PlanLimits(
            protect=tuple(sorted(protect)),
            architecture=architecture.remarks if architecture is not None else (),
            keep_period=self.keep_period,
            no_adjacent=self.no_adjacent,
            contiguous=self.contiguous,
        )


FREE = SearchRules()


def keeping_period(architecture: Architecture) -> Callable[[Removal], None]:
    """Return ``Architecture.check`` that also refuses what breaks a period or makes other readers misread the model."""

    def check(removal: Removal) -> None:
        architecture.check(removal)
        broken = architecture.out_of_step(removal)
        if broken:
            raise RefusedError(f"--keep-period: {'; '.join(broken)}")

    return check


def check_objective(objective: Objective, racing: bool | None, name: str, metric: Metric) -> None:
    """Raise ``UsageError`` for an objective that the metric knows nothing of, or that a race cannot stand on."""
    if objective == MEAN:
        return
    if metric.needs != "items":
        raise UsageError(
            f"the metric {name!r} does not answer tasks: leave out --objective, --weights and --floor, or use ablation"
        )
    if racing and not additive(objective):
        raise UsageError(
            f"--racing goes by the mean over items, which {objective.words} is not: leave it out, or take another "
            "objective"
        )


# A model on the desk with its items and its metric: what scoring and every search work with.


@dataclass
class ScoringSession:
    """Everything a scoring run has on its desk: first model, metric and constraints, then the items."""

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
    said: set[Removal] = field(default_factory=set)  # removals named as not finite
    began: float = field(default_factory=time.monotonic)

    @classmethod
    def open(
        cls,
        request: ScoreConfig,
        folder: Path | None,
        progress: Progress,
        rules: SearchRules = FREE,
        loaded: LoadedModel | None = None,
    ) -> ScoringSession:
        """Validate the request and load the model, where ``loaded`` is not loaded already."""
        began = time.monotonic()
        entry, metric = build(METRICS, request.metric)
        if request.budget is not None and metric.needs != "items":
            raise UsageError(f"--budget: the metric {entry.name!r} answers no items; use --limit, or ablation")
        if prompting_of(request).apply_chat_template:
            progress.note("prompts go through the tokenizer's chat template")
        if metric.needs != "nothing" and not request.tasks:
            raise UsageError(f"the metric {entry.name!r} needs {metric.needs}: give tasks, such as --tasks arc_easy")
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
                trust_remote_code=request.trust_remote_code,
                reads_text=bool(request.tasks),  # a metric that needs items or text was refused without them
            )
        if loaded.tokenizer is None:
            progress.note(f"{request.model} has no tokenizer: the metric {entry.name!r} needs none")
        architecture = loaded.architecture
        constraints = Constraints(
            architecture.depth,
            protect=parse_protect(request.protect, architecture.depth),
            must_keep=architecture.must_keep,
            together=architecture.together,
            check=rules.check(architecture),
            shape=rules.shape,
        )
        rows = request.batch_size if isinstance(request.batch_size, int) else None
        data = Data(objective=objective, seed=request.seed, progress=progress, rows=rows, memory=request.memory)
        return cls(request, entry, metric, loaded, constraints, data, progress, folder, began=began)

    def bring_items(self, shares: SplitShares, evaluations: int | None = None) -> None:
        """Load the items, divide them, and see that the intact model is above chance on every task.

        ``evaluations``: how many removals each item will be answered under, for a budget; by default each move alone.
        """
        if not self.request.tasks:
            return
        budget = None if self.request.budget is None else self._budget(shares, evaluations)
        answers = isinstance(self.metric, Ablation) and self.metric.signal == "answers"
        only_right = isinstance(self.metric, Ablation) and self.metric.only == "right"
        ungraded = answers and not only_right
        eval_set = _questions(self.request, self.loaded, shares.certify, ungraded=ungraded)
        if budget is not None:
            budget.say(eval_set)
        for remark in eval_set.remarks():
            self.progress.note(remark)
        check_turns(self.request.fewshot_as_multiturn, eval_set)
        check_tasks(self.data.objective, list(eval_set.tasks))
        judged = self.metric.needs == "items"
        if not judged and not shares.examined:
            self.everything = self.data.eval_set = eval_set
            return
        engine = Engine(self.loaded, rows=self.data.rows, memory=self.data.memory)
        if answers:
            eval_set = own_answers(engine, eval_set, only_right=only_right, folder=self.folder, progress=self.progress)
        elif isinstance(self.metric, Ablation):
            for name in (name for name, task in eval_set.tasks.items() if is_written(task)):
                self.progress.note(
                    f"task {name!r} has the model write, under every removal; ablation:signal=answers reads what the "
                    "intact model wrote instead, at about the cost of choices"
                )
        slices = ItemSplit.of(eval_set, shares, self.request)
        self.data.eval_set, self.everything = slices.search, slices.everything

        def evaluator(part: EvalSet | None) -> CachedEvaluator | None:
            return None if part is None else CachedEvaluator(engine, part, self.progress, self.folder)

        self.data.evaluator = evaluator(slices.search) if judged else None
        self.held_back, self.certification = evaluator(slices.held_back), evaluator(slices.certification)
        examiners = [each for each in (self.data.evaluator, self.held_back, self.certification) if each is not None]
        with _nothing_left_when_refused(self.folder):
            judged_items = slices.everything if judged else slices.unseen
            base = examine_base(judged_items, examiners, signal_of(self.metric_ref()))
        self.base = base if judged else {}
        remarks = "; ".join(engine.remarks) or "it agrees with plain forwards"
        self.progress.note(f"evaluation path: {examiners[0].path} ({remarks})")

    def _budget(self, shares: SplitShares, evaluations: int | None) -> TimeBudget:
        """Set the request's limit to the most items that fit into the budget."""
        request, moves = self.request, [Removal.of(*move) for move in self.constraints.moves]
        assert request.budget is not None
        if shares.certify:
            raise UsageError("--budget: how many items certify --max-drop has to be fixed beforehand; leave it out")
        asked = {
            "model": self.loaded.marks, "metric": spec_of(self.entry.name, self.metric), "tasks": [*request.tasks],
            "budget": request.budget, "seed": request.seed, "limit": request.limit,
            "prompting": prompting_of(request).model_dump(mode="json"), "num_fewshot": request.num_fewshot,
            "evaluations": evaluations or len(moves), "rows": self.data.rows, "memory": self.data.memory,
        }  # fmt: skip
        fitting = TimeBudget(request.budget, self.began, evaluations or len(moves), asked, self.folder, self.progress)
        answers = isinstance(self.metric, Ablation) and self.metric.signal == "answers"
        ungraded = isinstance(self.metric, Ablation) and answers and self.metric.only != "right"

        def load(items: int) -> EvalSet:
            return _questions(replace(request, limit=items), self.loaded, 0, ungraded=ungraded)

        engine = Engine(self.loaded, rows=self.data.rows, memory=self.data.memory)
        most = fitting.items(load, engine, moves, answers=answers)
        self.request = replace(request, limit=min(most, request.limit))
        return fitting

    def judge(self, keep: int | None = None) -> Judge:
        """Return the metric as a judge that answers each question once, in this run and the ones it goes on from.

        ``keep`` lets it stop candidates that are not among so many to go next.
        """
        return self._remembered(self.entry, self.metric, replace(self.data, keep=keep))

    def judge_by(self, spec: str) -> Judge:
        """Return the judgements of another metric on the same model and items."""
        entry, metric = build(METRICS, spec)
        return self._remembered(entry, metric, replace(self.data, keep=None))

    def _remembered(self, entry: Entry, metric: Metric, data: Data) -> CachedMetric:
        def ask(removals: Sequence[Removal]) -> list[Candidate]:
            return metric.score(self.loaded, removals, data)

        # what answers items is written down block by block already; what is asked once, or costs nothing, need not be
        worth = metric.needs == "text" and metric.scope == "any set"
        if self.folder is None or not worth:
            return CachedMetric(ask, progress=self.progress, said=self.said)
        journal = Journal(self.folder / JOURNAL, text_key(self.loaded, data, entry, metric))
        return CachedMetric(ask, journal, progress=self.progress, said=self.said)

    def scores(self, rounds: tuple[Round, ...]) -> Scores:
        """Write down everything that was looked at."""
        return Scores(
            model=self.loaded.ref,
            metric=self.metric_ref(),
            data=self.everything.data() if self.everything else (),
            base=self.base,
            rounds=rounds,
            engine=self._engine_report(),
            config=contained(self.checkpoint, "config.json").read_text(encoding="utf-8"),
            seed=self.request.seed,
            versions=tool_versions(),
        )

    def _engine_report(self) -> EngineReport | None:
        evaluator = self.data.evaluator
        if evaluator is None:
            return None
        return EngineReport(
            path=evaluator.path,
            dtype=str(self.loaded.dtype).removeprefix("torch."),
            device=self.loaded.device.type,
            computed=evaluator.account.computed,
            naive=evaluator.account.naive,
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

    def heads(self, removal: Removal) -> tuple[str, ...]:
        """Return a warning where export leaves a multi-token-prediction head out."""
        (weight,) = self.weigh(removal)
        return () if weight.heads is None else (weight.heads.words,)

    def dry_run(self, removal: Removal) -> None:
        """Raise ``RefusedError`` where export would refuse: before a plan is written that nobody can carry out."""
        dry_run(self.checkpoint, removal, trust_remote_code=self.request.trust_remote_code)

    @property
    def checkpoint(self) -> Path:
        """The folder of the model on disk."""
        return locate(self.request.model, self.loaded.ref.revision).path  # the very snapshot that was scored


def _questions(request: ScoreConfig, loaded: LoadedModel, more: int, *, ungraded: bool) -> EvalSet:
    return load_eval_set(
        request.tasks,
        loaded.encoder,
        use="selection",
        include_path=request.include_path,
        data_dir=request.data_dir,
        limit=request.limit + more,
        num_fewshot=request.num_fewshot,
        prompting=prompting_of(request),
        seed=request.seed,
        ungraded=ungraded,
    )


@contextmanager
def _nothing_left_when_refused(folder: Path | None) -> Iterator[None]:
    """Remove the journal of a run that a task at chance ends before it has begun."""
    fresh = folder is not None and not (folder / JOURNAL).exists()
    try:
        yield
    except TaskError:
        if folder is not None and fresh:
            (folder / JOURNAL).unlink(missing_ok=True)
        raise


# A metric as a judge that answers each question once, and writes down what no journal would keep otherwise.


Question = tuple[Removal, ...]


def text_key(loaded: LoadedModel, data: Data, entry: Entry, metric: Metric) -> str:
    """Return the journal key of what a metric says of the texts in ``data``: its code and owner are in it."""
    return journal_key(
        loaded, data.eval_set, metric=spec_of(entry.name, metric), owner=entry.owner, code=source_of(type(metric)),
        seed=data.seed, rows=data.rows, memory=data.memory,
    )  # fmt: skip


def say_failures(candidates: Sequence[Candidate], progress: Progress, said: set[Removal]) -> None:
    """Note that the model's figures are not finite without a removal, unless it was noted of a part of it already."""
    for one in candidates:
        removal = Removal(one.removal)
        if one.not_finite and not any(set(other) <= set(removal) for other in said):
            said.add(removal)
            progress.note(f"without {removal} the model's figures are not finite: it counts as the most harmful")


@dataclass
class CachedMetric:
    """Asks ``judge`` and remembers; ``journal`` is for metrics whose work the examiner's journal does not hold.

    A question is a whole batch: what a race says of one removal depends on those it ran against. ``progress`` hears of
    removals without which the model's figures are not finite.
    """

    judge: Judge
    journal: Journal | None = None
    known: dict[Question, list[Candidate]] = field(default_factory=dict)
    progress: Progress = SILENT
    said: set[Removal] = field(default_factory=set)

    def __post_init__(self) -> None:
        for entry in self.journal.entries if self.journal else []:
            question = tuple(Removal.from_layers(units) for units in entry["removals"])
            self.known[question] = [Candidate.model_validate(candidate) for candidate in entry["candidates"]]

    def __call__(self, removals: Sequence[Removal]) -> list[Candidate]:
        question = tuple(removals)
        if question not in self.known:
            self.known[question] = list(self.judge(removals))
            if self.journal:
                asked = [list(removal.layers) for removal in removals]
                answered = [candidate.model_dump(mode="json") for candidate in self.known[question]]
                self.journal.append({"removals": asked, "candidates": answered})
        say_failures(self.known[question], self.progress, self.said)
        return self.known[question]


# Selection items divided: what the search sees, what is held back for the prediction, what certifies.


@dataclass(frozen=True)
class SplitShares:
    """How to divide the items; what is neither held back nor for certification is the search's."""

    held_back: float = 0.0  # share of the items that do not certify
    certify: int = 0  # items of each task for certification, beyond the request's limit
    examined: bool = False  # answer held-back items even where the metric itself looks at none


@dataclass(frozen=True)
class ItemSplit:
    """The items of each purpose; no item is in two of them. None: there are too few to spare any."""

    search: EvalSet
    held_back: EvalSet | None = None
    certification: EvalSet | None = None

    @classmethod
    def of(cls, eval_set: EvalSet, shares: SplitShares, request: ScoreConfig) -> ItemSplit:
        """Divide ``eval_set`` task by task, by item fingerprint; ``UsageError`` where a slice would have none."""
        rest, certification = eval_set, None
        if shares.certify:
            share = shares.certify / (request.limit + shares.certify)
            rest, spared = eval_set.held_back(share, "certification")
            certification = _mixture(spared, request.seed)
        search, held_back = rest.held_back(shares.held_back)
        if _complete(search) and _complete(held_back):
            return cls(search, held_back, certification)
        if shares.examined:
            raise UsageError(f"{len(rest)} selection items are too few to hold some back; raise --limit")
        return cls(rest, None, certification)

    @property
    def everything(self) -> EvalSet:
        """All items, task by task in the order of the slices."""
        return _joined([self.search, self.held_back, self.certification])

    @property
    def unseen(self) -> EvalSet:
        """The items that no search sees."""
        return _joined([self.held_back, self.certification])


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


def _complete(eval_set: EvalSet) -> bool:
    return all(task.items for task in eval_set.tasks.values())


def _joined(parts: list[EvalSet | None]) -> EvalSet:
    return reduce(EvalSet.followed_by, [part for part in parts if part is not None])
