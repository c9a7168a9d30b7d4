"""plan.json: what to remove and why; no weight has been touched."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from layerprune.documents.base import Document, Part
from layerprune.documents.common import Interval, MetricRef, ModelRef, TaskData, Units
from layerprune.removal import Unit


class Search(Part):
    """How the removal was looked for."""

    name: str
    options: dict[str, str | int | float | bool | None] = Field(default_factory=dict)


class Limits(Part):
    """What the search was not allowed to do."""

    gained: ClassVar[tuple[str, ...]] = ("keep_period",)
    protect: Units = ()
    architecture: tuple[str, ...] = Field(default=(), description="constraints of the model type, in words")
    keep_period: bool = Field(default=False, description="only removals that llama.cpp and vLLM read rightly")


class Ranked(Part):
    """One unit in the order in which it would be removed."""

    unit: Unit
    score: float
    interval: Interval | None = None


class PredictedTask(Part):
    """The chosen removal on one task."""

    base_accuracy: float
    accuracy: float
    difference: float
    interval: Interval
    items: int


class Prediction(Part):
    """What the removal is expected to cost, on items the search did not choose by."""

    source: str = Field(description="which items: held-back selection items, or the selection items themselves")
    accuracy_difference: float = Field(description="mean over the tasks, in accuracy (0.01 = one point)")
    interval: Interval
    tasks: dict[str, PredictedTask]


class Plan(Document):
    """A reviewable proposal: export carries it out as it stands."""

    filename: ClassVar[str] = "plan.json"
    kind: Literal["plan"] = "plan"
    format: Literal[1] = 1
    model: ModelRef
    metric: MetricRef
    search: Search
    limits: Limits
    requested: str = Field(description="--drop as given")
    removal: Units
    order: Units = Field(description="the removal in the order in which units were chosen")
    ranking: tuple[Ranked, ...] = Field(description="first-round scores, least relevant first")
    scores_sha256: str
    data: tuple[TaskData, ...] = Field(description="every item that has had a say; an audit must not use them")
    predicted: Prediction | None = None
    warnings: tuple[str, ...] = ()
    seed: int
    versions: dict[str, str]
