"""study.json: the paper's questions (arXiv:2605.14075) answered for one model; every figure of the study's page."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field

from layerprune.artifacts.base import Computed, Document, Interval, MetricRef, ModelRef, Part, TaskData, Units

MEAN = "mean of tasks"  # where a task's name stands otherwise
ALL_TASKS, TEXT = "all tasks", "text"  # calibrations; a task's own name is the third kind


class IntactModel(Part):
    """The intact model on one task, on the items that chose and on the items that judged."""

    selection_accuracy: float
    accuracy: float = Field(description="on the audit items")
    p_value: float = Field(description="one-sided exact test of the audit accuracy against guessing")


class Lost(Part):
    """What removing each unit alone costs on the audit items of one task, or on average."""

    task: str
    accuracy: tuple[float, ...] = Field(
        description="by unit: accuracy lost over the intact model's accuracy above chance (relevance)"
    )
    probability: tuple[float, ...] | None = Field(description="share of the gold answer's mean probability lost")


class MetricRanking(Part):
    """What one metric says of every unit; higher means more harm in removing."""

    metric: str = Field(description="its spec")
    calibration: str = Field(description="what it read or answered: all tasks, one task's name, or text")
    scores: tuple[float, ...]


class Estimate(Part):
    """A figure with its 95 % interval; both None where a score is constant."""

    value: float | None
    interval: Interval | None


class Agreed(Part):
    """How far one ranking agrees with the accuracy that is lost on the audit items."""

    metric: str
    calibration: str
    task: str = Field(description="whose accuracy loss")
    ends: bool = Field(description="whether the first and the last layer are among the units")
    units: int
    spearman: Estimate
    kendall: Estimate
    pearson: Estimate
    spearman_by_chance: float = Field(description="95 % of unrelated rankings lie within plus or minus this")
    misplaced: float = Field(description="share of rank positions that hold another unit, ties broken at random")
    misplaced_by_chance: float


class Shared(Part):
    """How many of the lowest units by a metric are among the lowest by accuracy loss."""

    metric: str
    count: int
    shared: float
    by_chance: float
    chance_interval: Interval


class Confusion(Part):
    """Where units stand by accuracy loss (rows) and by a metric (columns), mean over tasks; rows add up to 1."""

    metric: str
    matrix: tuple[tuple[float, ...], ...]
    misplaced: float
    by_chance: float


class Spread(Part):
    """How much the z-scored relevance of a unit varies from task to task."""

    metric: str = Field(description="a metric's spec, or 'accuracy drop'")
    variances: tuple[float, ...] = Field(description="by unit, over the tasks")
    mean: float
    noise: float | None = Field(description="what the draw of items alone would give, from halves of the items")
    wilcoxon_p: float | None = Field(description="two-sided signed-rank test against the accuracy drop, paired by unit")


class SplitHalf(Part):
    """Split-half reliability of the ranking by what is lost."""

    task: str
    signal: Literal["accuracy", "probability"]
    items: int
    halves: float | None
    whole: float | None
    items_needed: int | None = Field(description="for a reliability of 0.9")


class PathPoint(Part):
    """Accuracy on the audit items with some layers gone; several removals are draws of one baseline."""

    count: int
    removals: tuple[Units, ...]
    accuracy: float
    difference: float = Field(description="from the intact model")
    interval: Interval
    tasks: dict[str, float]


class RemovalPath(Part):
    """One way to choose layers, followed from few to many."""

    metric: str
    search: str
    points: tuple[PathPoint, ...]
    remark: str = Field(default="", description="why it ends early")


class Contrast(Part):
    """Ablation's one-shot choice minus another choice of as many layers, on the same items."""

    metric: str
    search: str
    count: int
    difference: float
    interval: Interval
    same: bool = Field(description="both chose the same layers, so that there is nothing to compare")


class Calibrated(Part):
    """One metric's choice after reading other data."""

    metric: str
    calibration: Literal["own task", "all tasks", "text"]
    count: int
    accuracy: float
    difference: float = Field(description="from the same metric calibrated on all tasks")
    interval: Interval
    same: bool = Field(description="the same layers as by all tasks")


class Counterexample(Part):
    """The three-layer llama whose middle layer has the lowest cosine score and decides everything."""

    epsilon: float
    cosine: tuple[float, float, float]
    accuracy: float
    accuracy_without: tuple[float, float, float]


class TextSource(Part):
    """The plain text that the text metrics were also calibrated on."""

    source: str
    sha256: str
    windows: int
    tokens: int


class Study(Computed, Document):
    """Everything a study found."""

    filename: ClassVar[str] = "study.json"
    kind: Literal["study"] = "study"
    format: Literal[1] = 1
    model: ModelRef
    metrics: tuple[MetricRef, ...]
    units: tuple[Units, ...] = Field(description="what is removed in one stroke, mostly one layer")
    selection: tuple[TaskData, ...]
    audit: tuple[TaskData, ...]
    text: TextSource | None
    intact: dict[str, IntactModel]
    lost: tuple[Lost, ...]
    rankings: tuple[MetricRanking, ...]
    agreement: tuple[Agreed, ...]
    shared: tuple[Shared, ...]
    confusion: tuple[Confusion, ...]
    spread: tuple[Spread, ...] = Field(description="empty with a single task")
    reliability: tuple[SplitHalf, ...]
    paths: tuple[RemovalPath, ...]
    contrasts: tuple[Contrast, ...]
    calibration: tuple[Calibrated, ...]
    counterexample: Counterexample
    dtype: str
    device: str
    seed: int
    versions: dict[str, str]

    @property
    def headline(self) -> str:
        tasks = ", ".join(data.task for data in self.selection)
        return f"{len(self.metrics)} metrics on {self.model.id}, {self.model.layers} layers, tasks {tasks}"

    def records(self) -> list[dict[str, Any]]:
        """Return a row for each ranking: the metric, what it read, and the score of each layer (higher: more harm)."""
        names = [", ".join(map(str, unit)) for unit in self.units]
        return [
            {"metric": one.metric, "calibration": one.calibration, **dict(zip(names, one.scores, strict=True))}
            for one in self.rankings
        ]
