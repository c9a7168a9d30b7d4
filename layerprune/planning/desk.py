"""A model on the desk with its items and its metric: what scoring and every search work with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from layerprune.checkpoint import contained, locate
from layerprune.documents import BaseTask, Candidate, EngineReport, Limits, MetricRef, Round, Scores
from layerprune.engine import JOURNAL, Engine, Examiner
from layerprune.errors import TaskError, UsageError
from layerprune.export import rehearse
from layerprune.metrics import METRICS
from layerprune.metrics.ablation import examine_base
from layerprune.metrics.base import Data, Metric
from layerprune.operators import stand_in
from layerprune.planners import Constraints, Judge, parse_drop, parse_protect
from layerprune.planning.limits import candidate_units, check_operator
from layerprune.planning.request import ScoreRequest
from layerprune.planning.versions import tool_versions
from layerprune.progress import Progress
from layerprune.registry import Entry
from layerprune.removal import Removal
from layerprune.specs import build, options_of, spec_of
from layerprune.subject import Subject
from layerprune.tasks import Questions, load_questions


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
        check_operator(request, entry.name, metric)
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
            units=candidate_units(request.unit, anatomy),
            check=anatomy.check,
        )
        if drop is not None:
            constraints.require(parse_drop(drop, anatomy.depth))
        questions = _questions(request, subject) if request.tasks else None
        data = Data(questions=questions, seed=request.seed, progress=progress)
        desk = cls(request, entry, metric, subject, constraints, data, questions, None, {})
        if metric.needs == "items" and questions is not None:
            desk._prepare_items(questions, folder, progress, held_back)
        else:
            desk._correct()
        return desk

    def _correct(self) -> None:
        """Put the operator in the place of removed layers, measured on the items that select."""
        if self.request.operator != "skip":
            self.subject.stand_in = stand_in(self.subject, self.request.operator, self.data)

    def _prepare_items(self, questions: Questions, folder: Path | None, progress: Progress, held_back: float) -> None:
        seen, unseen = questions.held_back(held_back)
        enough = all(task.items for task in (*seen.tasks.values(), *unseen.tasks.values()))
        self.data.questions = seen if enough else questions
        self._correct()
        rows = self.request.batch_size if isinstance(self.request.batch_size, int) else None
        engine = Engine(self.subject, rows=rows)
        if enough:
            self.held_back = Examiner(engine, unseen, progress, folder)
            self.everything = seen.followed_by(unseen)
        self.data.examiner = Examiner(engine, self.data.questions, progress, folder)
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
            config=contained(self._folder, "config.json").read_text(encoding="utf-8"),
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
            operator=self.request.operator,
        )

    def limits(self, keep_period: bool) -> Limits:
        protect, architecture = tuple(sorted(self.constraints.protect)), self.subject.anatomy.remarks
        return Limits(protect=protect, architecture=architecture, keep_period=keep_period)

    def rehearse(self, removal: Removal) -> None:
        """Raise ``RefusedError`` where export would refuse: before a plan is written that nobody can carry out."""
        rehearse(self._folder, removal, trust_remote_code=self.request.trust_remote_code)

    @property
    def _folder(self) -> Path:
        return locate(self.request.model, self.subject.ref.revision).path  # the very snapshot that was scored


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
