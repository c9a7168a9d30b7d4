"""The model of a study with its items, its text, and every removal that is asked about; nothing is measured twice."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

from layerprune.artifacts import BaseTask, Outcomes
from layerprune.artifacts.study import TextSource
from layerprune.auditor.performance import read_text, windows_of
from layerprune.config import ScoreConfig, StudyConfig
from layerprune.data.items import EvalItem, EvalSet, EvalTask, Query, Request, fingerprint
from layerprune.models.model import LoadedModel
from layerprune.planner.search_runner import SearchRunner
from layerprune.planner.session import ScoringSession, SplitShares, load_items
from layerprune.registry import build
from layerprune.removal import Removal, parse_drop
from layerprune.scoring.cached_evaluator import CachedEvaluator
from layerprune.scoring.metrics import METRICS
from layerprune.scoring.metrics.ablation import INTACT, examine_base
from layerprune.scoring.metrics.base import Data
from layerprune.search import Constraints
from layerprune.util import Progress

# The model on the bench: items that choose, items that judge, plain text, and every removal that is asked about.


SELECTION, AUDIT, TEXT = "selection", "audit", "text"  # folders of what was measured
TEXT_WINDOWS = 16  # of 512 tokens: about what a few hundred short questions hold


@dataclass
class Bench:
    """Everything a study works with; what it measures is kept in ``folder``."""

    request: StudyConfig
    folder: Path
    progress: Progress
    session: ScoringSession
    audits: dict[str, CachedEvaluator]  # one a task, on items that no choice has seen
    audit_base: dict[str, BaseTask]
    text: TextSource | None
    text_data: Data | None
    known: dict[tuple[Removal, str], Outcomes] = field(default_factory=dict)  # audit outcomes by removal and task

    @classmethod
    def open(cls, request: StudyConfig, folder: Path, progress: Progress) -> Bench:
        """Load model, items and text; raises ``TaskError`` for a task on which the intact model is at chance."""
        content = None if request.text is None else read_text(request.text)
        session = ScoringSession.open(scoring_of(request), folder / SELECTION, progress)
        asked = None if request.budget is None else evaluations(request, len(session.constraints.moves))
        session.bring_items(SplitShares(), asked)
        if request.budget is not None:  # as many to judge as to choose
            most = session.request.limit
            request = replace(request, limit=most, audit_limit=min(most, request.audit_limit))
        text, data = _text(request, content, session) if content is not None else (None, None)
        engine = session.data.evaluator.engine  # type: ignore[union-attr]  # ablation answers items
        chose = session.everything.data() if session.everything else ()
        seen = {mark for data in chose for mark in data.fingerprints}
        eval_set = load_items(request, session.loaded, "evaluation", request.audit_limit, exclude=seen)
        audits = {
            name: CachedEvaluator(engine, EvalSet({name: task}), progress, folder / AUDIT / name)
            for name, task in eval_set.tasks.items()
        }
        bench = cls(request, folder, progress, session, audits, {}, text, data)
        for evaluator in audits.values():
            bench.audit_base |= examine_base(evaluator.eval_set, [evaluator])
        return bench

    @property
    def loaded(self) -> LoadedModel:
        return self.session.loaded

    @property
    def constraints(self) -> Constraints:
        return self.session.constraints

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

    def scorer(self) -> SearchRunner:
        """Return what judges on the selection items of all tasks."""
        return self.session.runner

    def scorer_for(self, task: str) -> SearchRunner:
        """Return what judges on one task's selection items."""
        whole = self.session.data
        assert whole.eval_set is not None
        assert whole.evaluator is not None
        eval_set = EvalSet({task: whole.eval_set.tasks[task]})
        data = replace(whole, eval_set=eval_set, evaluator=OneTask(whole.evaluator, task))  # type: ignore[arg-type]
        return SearchRunner(self.loaded, data, self.folder / SELECTION)

    def scorer_on_text(self) -> SearchRunner | None:
        """Return what judges on the plain text; None without one."""
        return None if self.text_data is None else SearchRunner(self.loaded, self.text_data, self.folder / TEXT)

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

    whole: CachedEvaluator
    task: str

    def outcomes(self, removals: Sequence[Removal], label: str = "scoring") -> dict[Removal, dict[str, Outcomes]]:
        found = self.whole.outcomes(removals, label)
        return {removal: {self.task: outcomes[self.task]} for removal, outcomes in found.items()}


def _text(request: StudyConfig, content: str, session: ScoringSession) -> tuple[TextSource, Data]:
    """Cut the text into windows that metrics read as they read questions with their answers."""
    assert request.text is not None
    windows = [tuple(window) for window in windows_of(content, session.loaded, most=TEXT_WINDOWS)]
    items = tuple(EvalItem(fingerprint(list(ids)), 0.0, (Query((Request(ids, len(ids) - 1),)),)) for ids in windows)
    task = EvalTask("text", request.text.name, "none", 0, items, judge=None)  # type: ignore[arg-type]
    source = TextSource(
        source=request.text.name,
        sha256=hashlib.sha256(content.encode()).hexdigest(),
        windows=len(windows),
        tokens=sum(len(window) - 1 for window in windows),
    )
    data = Data(
        eval_set=EvalSet({"text": task}), seed=request.seed, progress=session.data.progress, rows=session.data.rows,
        memory=session.data.memory,
    )  # fmt: skip
    return source, data


# What a study always compares, and how its options are those of scoring.


BASELINES = ("reverse-order", "random")  # always shown: no metric is worth its price that does not beat them
# Shares of the stack at which accuracy is measured: close together where models still work, up to the paper's 75 %.
SHARES = (0.03, 0.07, 0.1, 0.15, 0.2, 0.25, 0.375, 0.5, 0.625, 0.75)
DRAWS = 3  # of the random baseline: one draw says little
CALIBRATED_SHARES = (0.1, 0.25, 0.5)  # where calibrations are compared


def scoring_of(config: StudyConfig) -> ScoreConfig:
    """Return how the items that choose are had, and ablation on them."""
    names = {one.name for one in fields(ScoreConfig)} & {one.name for one in fields(StudyConfig)}
    return ScoreConfig(**{name: getattr(config, name) for name in names})
