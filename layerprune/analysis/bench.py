"""The model on the bench: items that choose, items that judge, plain text, and every removal that is asked about."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from layerprune.analysis.asked import BASELINES, CALIBRATED_SHARES, DRAWS, SHARES, scoring_of
from layerprune.analysis.scorer import Scorer
from layerprune.auditor.running_text import read_text, windows_of
from layerprune.config import StudyConfig
from layerprune.documents import BaseTask, Outcomes
from layerprune.documents.study import TextSource
from layerprune.engine import Examiner
from layerprune.metrics import METRICS
from layerprune.metrics.ablation import INTACT, examine_base
from layerprune.metrics.base import Data
from layerprune.planners import Constraints, parse_drop
from layerprune.planning.desk import Desk
from layerprune.planning.slices import Shares
from layerprune.progress import Progress
from layerprune.removal import Removal
from layerprune.specs import build
from layerprune.subject import Subject
from layerprune.tasks import Item, Questions, Request, TaskQuestions, load_questions, prompting_of
from layerprune.tasks.items import Query, fingerprint

SELECTION, AUDIT, TEXT = "selection", "audit", "text"  # folders of what was measured
TEXT_WINDOWS = 16  # of 512 tokens: about what a few hundred short questions hold


@dataclass
class Bench:
    """Everything a study works with; what it measures is kept in ``folder``."""

    request: StudyConfig
    folder: Path
    progress: Progress
    desk: Desk
    audits: dict[str, Examiner]  # one a task, on items that no choice has seen
    audit_base: dict[str, BaseTask]
    text: TextSource | None
    text_data: Data | None
    known: dict[tuple[Removal, str], Outcomes] = field(default_factory=dict)  # audit outcomes by removal and task

    @classmethod
    def open(cls, request: StudyConfig, folder: Path, progress: Progress) -> Bench:
        """Load model, items and text; raises ``TaskError`` for a task on which the intact model is at chance."""
        content = None if request.text is None else read_text(request.text)
        desk = Desk.open(scoring_of(request), folder / SELECTION, progress)
        asked = None if request.budget is None else evaluations(request, len(desk.constraints.moves))
        desk.bring_items(Shares(), asked)
        if request.budget is not None:  # as many to judge as to choose
            most = desk.request.limit
            request = replace(request, limit=most, audit_limit=min(most, request.audit_limit))
        text, data = _text(request, content, desk) if content is not None else (None, None)
        engine = desk.data.examiner.engine  # type: ignore[union-attr]  # ablation answers items
        questions = _audit_questions(request, desk)
        audits = {
            name: Examiner(engine, Questions({name: task}), progress, folder / AUDIT / name)
            for name, task in questions.tasks.items()
        }
        bench = cls(request, folder, progress, desk, audits, {}, text, data)
        for examiner in audits.values():
            bench.audit_base |= examine_base(examiner.questions, [examiner])
        return bench

    @property
    def subject(self) -> Subject:
        return self.desk.subject

    @property
    def constraints(self) -> Constraints:
        return self.desk.constraints

    @property
    def specs(self) -> list[str]:
        """Every metric once, then the baselines that can score what goes in one stroke here."""
        grouped = any(len(move) > 1 for move in self.constraints.moves)
        able = [spec for spec in BASELINES if not grouped or build(METRICS, spec)[1].scope == "any set"]
        return list(dict.fromkeys([*(spec for spec in self.request.metrics if spec not in BASELINES), *able]))

    @property
    def units(self) -> list[Removal]:
        """What can be removed in one stroke, each alone."""
        return [Removal.of(*move) for move in self.constraints.moves]

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(self.audits)

    def scorer(self) -> Scorer:
        """Return what judges on the selection items of all tasks."""
        return Scorer(self.subject, self.desk.data, self.folder / SELECTION)

    def scorer_for(self, task: str) -> Scorer:
        """Return what judges on one task's selection items."""
        whole = self.desk.data
        assert whole.questions is not None
        assert whole.examiner is not None
        questions = Questions({task: whole.questions.tasks[task]})
        data = replace(whole, questions=questions, examiner=OneTask(whole.examiner, task))  # type: ignore[arg-type]
        return Scorer(self.subject, data, self.folder / SELECTION)

    def scorer_on_text(self) -> Scorer | None:
        """Return what judges on the plain text; None without one."""
        if self.text_data is None:
            return None
        return Scorer(self.subject, self.text_data, self.folder / TEXT)

    def answer(self, removals: Iterable[Removal], task: str) -> None:
        """Answer a task's audit items under all removals in one go, so that what they share is computed once."""
        ordered = [INTACT, *sorted(set(removals) - {INTACT}, key=lambda removal: removal.layers)]
        found = self.audits[task].outcomes(ordered, f"audit of {len(ordered)} removals on {task}")
        self.known |= {(removal, task): outcomes[task] for removal, outcomes in found.items()}

    def outcomes(self, removal: Removal, task: str) -> Outcomes:
        """Return the audit outcomes of a removal that was answered."""
        return self.known[removal, task]


def evaluations(request: StudyConfig, moves: int) -> int:
    """Return about how many removals each item is answered under, those that choose and those that judge together."""
    paths = len(request.metrics) + 1 + DRAWS  # of each metric, reverse order, and the draws of random
    reading = sum(METRICS.get(name.partition(":")[0]).load().scope == "any set" for name in request.metrics)
    points = len(request.counts) or len(SHARES)
    greedy = 0 if request.greedy is None else moves * parse_drop(request.greedy, moves, "--greedy")
    return moves * (1 + reading) + paths * (points + len(CALIBRATED_SHARES)) + greedy


@dataclass(frozen=True)
class OneTask:
    """An examiner that shows one of its tasks: what was answered for all tasks is not asked again for one."""

    whole: Examiner
    task: str

    def outcomes(self, removals: Sequence[Removal], label: str = "scoring") -> dict[Removal, dict[str, Outcomes]]:
        found = self.whole.outcomes(removals, label)
        return {removal: {self.task: outcomes[self.task]} for removal, outcomes in found.items()}


def _audit_questions(request: StudyConfig, desk: Desk) -> Questions:
    seen = {mark for data in desk.everything.data() for mark in data.fingerprints} if desk.everything else set()
    return load_questions(
        request.tasks,
        desk.subject.encoder,
        use="evaluation",
        include_path=request.include_path,
        data_dir=request.data_dir,
        limit=request.audit_limit,
        num_fewshot=request.num_fewshot,
        prompting=prompting_of(request),
        seed=request.seed,
        exclude=seen,
    )


def _text(request: StudyConfig, content: str, desk: Desk) -> tuple[TextSource, Data]:
    """Cut the text into windows that metrics read as they read questions with their answers."""
    assert request.text is not None
    windows = [tuple(window) for window in windows_of(content, desk.subject, most=TEXT_WINDOWS)]
    items = tuple(Item(fingerprint(list(ids)), 0.0, (Query((Request(ids, len(ids) - 1),)),)) for ids in windows)
    task = TaskQuestions("text", request.text.name, "none", 0, items, judge=None)  # type: ignore[arg-type]
    source = TextSource(
        source=request.text.name,
        sha256=hashlib.sha256(content.encode()).hexdigest(),
        windows=len(windows),
        tokens=sum(len(window) - 1 for window in windows),
    )
    data = Data(questions=Questions({"text": task}), seed=request.seed, progress=desk.data.progress)
    return source, data
