"""From a model to a plan: score removals by a metric, search, predict what the result costs, write it down."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from layerprune import __version__
from layerprune.anatomy import Anatomy
from layerprune.checkpoint import locate
from layerprune.documents import (
    BaseTask,
    Candidate,
    EngineReport,
    Limits,
    MetricRef,
    Plan,
    PredictedTask,
    Prediction,
    Round,
    Scores,
    Search,
)  # fmt: skip
from layerprune.engine import JOURNAL, Engine, Examiner
from layerprune.errors import RefusedError, TaskError, UsageError
from layerprune.export import rehearse
from layerprune.metrics import METRICS
from layerprune.metrics.ablation import INTACT, examine_base
from layerprune.metrics.base import Data, Metric
from layerprune.planners import SEARCHES, Constraints, Found, Judge, parse_drop, parse_protect, table_judge
from layerprune.planners.cascade import Cascade
from layerprune.progress import SILENT, Progress
from layerprune.registry import Entry
from layerprune.removal import Removal, Unit
from layerprune.specs import build, options_of, spec_of
from layerprune.stats import mean_interval, paired_interval
from layerprune.subject import Subject
from layerprune.tasks import Questions, load_questions

# Items of each task that select when --limit does not say otherwise. One accuracy on 1,000 items has a standard error
# of 1.5 points; with a few hundred a search fits its items and not the model (measured on SmolLM2-135M).
DEFAULT_LIMIT = 1000
# Share of the selection items that no search sees: the chosen removal is judged on them once, for the prediction.
HELD_BACK = 0.2
OPTIMISTIC = "the items that selected; expect it to be too good"
UNREHEARSED = "planned without the model: whether export and other readers take the result was not looked at"


@dataclass(frozen=True)
class ScoreRequest:
    """What ``layerprune score`` is asked."""

    model: str
    metric: str = "ablation"
    tasks: tuple[str, ...] = ()
    include_path: tuple[Path, ...] = ()
    data_dir: Path | None = None
    limit: int = DEFAULT_LIMIT
    num_fewshot: int | None = None
    batch_size: int | str = "auto"
    dtype: str = "auto"
    device: str = "auto"
    seed: int = 0
    revision: str | None = None
    trust_remote_code: bool = False
    protect: str | None = None
    racing: bool = True  # stop candidates that are clearly not among the next to go
    unit: str = "layer"  # "half": the MLP of a layer with the attention of the next is a candidate too


@dataclass(frozen=True)
class PlanRequest:
    """What ``layerprune plan`` is asked."""

    score: ScoreRequest
    drop: str
    search: str | None = None
    keep_period: bool = False  # only removals that llama.cpp and vLLM would read rightly


def score_model(request: ScoreRequest, *, run_folder: Path | None = None, progress: Progress = SILENT) -> Scores:
    """Score every single removal the architecture allows; ``run_folder`` keeps what is measured, for going on."""
    desk = Desk.open(request, run_folder, progress, held_back=0.0)
    removals = [Removal.of(*move) for move in desk.constraints.moves]
    candidates = tuple(desk.judge(removals))
    return desk.scores((Round(removed=(), candidates=candidates),))


def plan_model(request: PlanRequest, *, run_folder: Path, progress: Progress = SILENT) -> tuple[Scores, Plan]:
    """Search for the removal that harms least; writes scores.json and plan.json into ``run_folder``."""
    _, metric = build(METRICS, request.score.metric)
    search_entry, search = build(SEARCHES, request.search or metric.search)
    desk = Desk.open(request.score, run_folder, progress, held_back=HELD_BACK, drop=request.drop)
    if request.keep_period:
        desk.constraints = replace(desk.constraints, check=keeping_period(desk.subject.anatomy))
    drop = parse_drop(request.drop, desk.constraints.depth)
    desk.data.keep = _kept(request.score, desk.constraints, search, drop)

    def watch(removal: Removal, best: Candidate) -> None:
        progress.note(f"{len(removal)} of {drop} chosen: {removal}, {metric.unit} {best.score:.4f}")

    look = search.proposed_by(desk.judge_by(search.by)) if isinstance(search, Cascade) else search
    found = look(desk.judge, desk.constraints, drop, seed=request.score.seed, watch=watch)
    desk.rehearse(found.removal)
    scores = desk.scores(found.rounds)
    plan = _plan(
        scores,
        found,
        Search(name=search_entry.name, options=options_of(search)),
        desk.limits(request.keep_period),
        request.drop,
        desk.predict(found.removal),
        desk.subject.anatomy.misread(found.removal),
    )
    scores.save(run_folder / Scores.filename)
    plan.save(run_folder / Plan.filename)
    return scores, plan


def replan(scores: Scores, drop: str, protect: str | None = None, *, search: str | None = None) -> Plan:
    """Plan from recorded scores, without a model; a search that needs what was not scored is a ``UsageError``."""
    depth = scores.model.layers
    wanted = parse_drop(drop, depth)
    moves = [candidate.removal for candidate in scores.rounds[0].candidates]
    if len({unit for move in moves for unit in move}) < sum(map(len, moves)):
        raise UsageError("scores.json holds whole sets of layers, as its search judged them; plan from the model")
    constraints = Constraints(
        depth,
        protect=parse_protect(protect, depth),
        together=tuple(frozenset(int(unit) for unit in move) for move in moves if len(move) > 1),
        units=tuple(unit for move in moves for unit in move),
    )
    spec = search or ("greedy" if len(scores.rounds) >= wanted > 1 else "one-shot")
    entry, chosen = build(SEARCHES, spec)
    try:
        found = chosen(table_judge(scores.rounds), constraints, wanted, seed=scores.seed)
    except KeyError as error:
        raise UsageError(
            f"scores.json has no score for {error.args[0]}: it was made with {len(scores.rounds)} rounds; "
            "plan from the model, or use --search one-shot"
        ) from error
    limits = Limits(protect=tuple(sorted(constraints.protect)))
    return _plan(scores, found, Search(name=entry.name, options=options_of(chosen)), limits, drop, None, (UNREHEARSED,))


def _plan(
    scores: Scores,
    found: Found,
    search: Search,
    limits: Limits,
    requested: str,
    predicted: Prediction | None,
    warnings: tuple[str, ...],
) -> Plan:
    return Plan(
        model=scores.model,
        metric=scores.metric,
        search=search,
        limits=limits,
        requested=requested,
        removal=found.removal.units,
        order=found.order,
        ranking=found.ranking,
        scores_sha256=scores.sha256(),
        data=scores.data,
        predicted=predicted,
        warnings=warnings,
        seed=scores.seed,
        versions=scores.versions,
    )


@dataclass
class Desk:
    """Everything a scoring run has on its desk: the model, the items, the metric, the constraints."""

    request: ScoreRequest
    entry: Entry
    metric: Metric
    subject: Subject
    constraints: Constraints
    data: Data
    everything: Questions | None  # with the held-back items
    held_back: Examiner | None
    base: dict[str, BaseTask]

    @classmethod
    def open(
        cls, request: ScoreRequest, folder: Path | None, progress: Progress, held_back: float, drop: str | None = None
    ) -> Desk:
        """Validate the request, load model and items, and see that the intact model is above chance on every task."""
        entry, metric = build(METRICS, request.metric)
        if metric.needs != "nothing" and not request.tasks:
            raise UsageError(f"the metric {entry.name!r} needs {metric.needs}: give tasks, such as --tasks arc_easy")
        progress.note(f"loading {request.model}")
        subject = Subject.load(
            request.model,
            revision=request.revision,
            dtype=request.dtype,
            device=request.device,
            trust_remote_code=request.trust_remote_code,
        )
        anatomy = subject.anatomy
        constraints = Constraints(
            anatomy.depth,
            protect=parse_protect(request.protect, anatomy.depth),
            must_keep=anatomy.must_keep,
            together=anatomy.together,
            units=_units(request.unit, anatomy),
            check=anatomy.check,
        )
        if drop is not None:
            constraints.require(parse_drop(drop, anatomy.depth))
        questions = _questions(request, subject) if request.tasks else None
        data = Data(questions=questions, seed=request.seed, progress=progress)
        desk = cls(request, entry, metric, subject, constraints, data, questions, None, {})
        if metric.needs == "items" and questions is not None:
            desk._prepare_items(questions, folder, progress, held_back)
        return desk

    def _prepare_items(self, questions: Questions, folder: Path | None, progress: Progress, held_back: float) -> None:
        rows = self.request.batch_size if isinstance(self.request.batch_size, int) else None
        engine = Engine(self.subject, rows=rows)
        seen, unseen = questions.held_back(held_back)
        if all(task.items for task in (*seen.tasks.values(), *unseen.tasks.values())):
            self.held_back = Examiner(engine, unseen, progress, folder)
            self.everything = seen.followed_by(unseen)
        else:
            seen = questions
        self.data.questions, self.data.examiner = seen, Examiner(engine, seen, progress, folder)
        examiners = [self.data.examiner, *([self.held_back] if self.held_back else [])]
        with _nothing_left_when_refused(folder):
            self.base = examine_base(self.everything or questions, examiners)
        remarks = "; ".join(engine.remarks) or "it agrees with plain forwards"
        progress.note(f"evaluation path: {self.data.examiner.path} ({remarks})")

    def judge(self, removals: Sequence[Removal]) -> list[Candidate]:
        """Score removals with the metric."""
        return self.metric.score(self.subject, removals, self.data)

    def judge_by(self, spec: str) -> Judge:
        """Return the judgements of another metric on the same model and items."""
        _, metric = build(METRICS, spec)
        return lambda removals: metric.score(self.subject, removals, self.data)

    def scores(self, rounds: tuple[Round, ...]) -> Scores:
        """Write down everything that was looked at."""
        return Scores(
            model=self.subject.ref,
            metric=self.metric_ref(),
            data=self.everything.data() if self.everything else (),
            base=self.base,
            rounds=rounds,
            engine=self._engine_report(),
            seed=self.request.seed,
            versions=tool_versions(),
        )

    def _engine_report(self) -> EngineReport | None:
        examiner = self.data.examiner
        if examiner is None:
            return None
        return EngineReport(
            path=examiner.path,
            dtype=str(self.subject.dtype).removeprefix("torch."),
            device=self.subject.device.type,
            computed=examiner.account.computed,
            naive=examiner.account.naive,
        )

    def metric_ref(self) -> MetricRef:
        return MetricRef(
            name=self.entry.name,
            spec=spec_of(self.entry.name, self.metric),
            options=options_of(self.metric),
            unit=self.metric.unit,
            scope=self.metric.scope,
            owner=self.entry.owner,
        )

    def limits(self, keep_period: bool) -> Limits:
        protect, architecture = tuple(sorted(self.constraints.protect)), self.subject.anatomy.remarks
        return Limits(protect=protect, architecture=architecture, keep_period=keep_period)

    def rehearse(self, removal: Removal) -> None:
        """Raise ``RefusedError`` where export would refuse: before a plan is written that nobody can carry out."""
        folder = locate(self.request.model, self.subject.ref.revision)  # the very snapshot that was scored
        rehearse(folder.path, removal, trust_remote_code=self.request.trust_remote_code)

    def predict(self, removal: Removal) -> Prediction | None:
        """Judge the chosen removal on the held-back items; None for a metric that answers no items."""
        examiner = self.held_back or self.data.examiner
        if examiner is None:
            return None
        found = examiner.outcomes([INTACT, removal], "the chosen removal, on items held back")
        tasks: dict[str, PredictedTask] = {}
        for name in examiner.questions.tasks:
            base, own = found[INTACT][name], found[removal][name]
            low, high = paired_interval(base.correct, own.correct)
            tasks[name] = PredictedTask(
                base_accuracy=round(base.accuracy, 6),
                accuracy=round(own.accuracy, 6),
                difference=round(own.accuracy - base.accuracy, 6),
                interval=(round(low, 6), round(high, 6)),
                items=len(own.correct),
            )
        differences = [task.difference for task in tasks.values()]
        low, high = mean_interval(differences, [task.interval for task in tasks.values()])
        items = sum(task.items for task in tasks.values())
        return Prediction(
            source=f"{items} selection items held back from the search" if self.held_back else OPTIMISTIC,
            accuracy_difference=round(sum(differences) / len(differences), 6),
            interval=(round(low, 6), round(high, 6)),
            tasks=tasks,
        )


def keeping_period(anatomy: Anatomy) -> Callable[[Removal], None]:
    """Return ``Anatomy.check`` that refuses what other readers would misread, too."""

    def check(removal: Removal) -> None:
        anatomy.check(removal)
        misread = anatomy.misread(removal)
        if misread:
            raise RefusedError("; ".join(misread))

    return check


def _units(unit: str, anatomy: Anatomy) -> tuple[Unit, ...] | None:
    """Return what may be removed: None for every whole layer, else whole layers and the half-layer runs between."""
    if unit == "layer":
        return None
    if unit != "half":
        raise UsageError(f"unknown unit {unit!r}; use layer or half")
    anatomy.check(Removal.of(0.5))  # says by name what stands in the way
    return tuple(number / 2 if number % 2 else number // 2 for number in range(2 * anatomy.depth - 1))


def _kept(request: ScoreRequest, constraints: Constraints, search: Any, drop: int) -> int | None:
    """Return how many candidates of a round a race has to get right; None: no racing.

    Searches without ``next_to_go`` compare more than the next to go; moves of different sizes are compared per layer,
    which the race does not know of.
    """
    if not request.racing or not hasattr(search, "next_to_go") or len({len(move) for move in constraints.moves}) > 1:
        return None
    return int(search.next_to_go(drop))


def _questions(request: ScoreRequest, subject: Subject) -> Questions:
    return load_questions(
        request.tasks,
        subject.encoder,
        use="selection",
        include_path=request.include_path,
        data_dir=request.data_dir,
        limit=request.limit,
        num_fewshot=request.num_fewshot,
        seed=request.seed,
    )


@contextmanager
def _nothing_left_when_refused(folder: Path | None) -> Iterator[None]:
    """Remove the journal, and the folder, of a run that a task at chance ends before it has begun."""
    made = [path for path in (folder / JOURNAL, folder, *folder.parents) if not path.exists()] if folder else []
    try:
        yield
    except TaskError:
        for path in made:
            if path.is_file():
                path.unlink()
            elif path.is_dir():
                path.rmdir()
        raise


def tool_versions() -> dict[str, str]:
    """Return the versions of everything that has a say in a figure."""
    names: dict[str, Any] = {name: version(name) for name in ("torch", "transformers", "lm_eval", "datasets")}
    return {"layerprune": __version__, "python": platform.python_version(), **names}
