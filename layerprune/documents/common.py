"""Parts that several documents hold: which model, which metric, which items, which tools."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from layerprune.documents.base import Part
from layerprune.removal import Removal, Unit

Units = tuple[Unit, ...]
Interval = tuple[float, float]  # 95 % unless a field says otherwise
Operator = Literal["skip", "rescale", "mean"]  # what stands in for a removed layer while removals are judged


class ModelRef(Part):
    """One exact model: where it was read from and a fingerprint of its weights."""

    id: str = Field(description="Hub id, or absolute local folder")
    revision: str | None = Field(default=None, description="Hub commit hash; None for a local folder")
    fingerprint: str = Field(description="see checkpoint.Checkpoint.fingerprint")
    model_type: str
    layers: int = Field(description="depth of the decoder stack")
    parameters: int


class MetricRef(Part):
    """A relevance metric as it was run."""

    gained: ClassVar[tuple[str, ...]] = ("operator",)
    name: str
    spec: str = Field(description="what the command line takes, defaults left out: 'cosine:tokens=last'")
    options: dict[str, str | int | float | bool | None]
    unit: str
    scope: str
    owner: str = Field(description="distribution that ships the metric, with its version")
    operator: Operator = Field(
        default="skip", description="what stood in for a removed layer: nothing, or its average effect on the stream"
    )

    @property
    def words(self) -> str:
        """How removals were judged, for titles: ``ablation:signal=margin with rescale``."""
        return self.spec if self.operator == "skip" else f"{self.spec} with {self.operator}"


class Ranked(Part):
    """One unit in the order in which it would be removed."""

    unit: Unit
    score: float
    interval: Interval | None = None


class TaskData(Part):
    """The items of one task that a step has seen."""

    task: str
    split: str = Field(description="which items: 'train', or 'half of test'")
    items: int
    fingerprints: tuple[str, ...] = Field(description="one per item, in the order of the outcomes")
    num_fewshot: int
    metric: str = Field(description="acc_norm, acc or exact_match: the figure that accuracy stands for")
    chance: float = Field(description="accuracy of guessing, mean over the items")


class Outcomes(Part):
    """What happened item by item, in the order of TaskData.fingerprints."""

    correct: str = Field(description="'1' right, '0' wrong, one character an item")
    gold_probability: tuple[float, ...] | None = Field(
        default=None, description="probability of the gold answer among the choices, per item"
    )

    @property
    def accuracy(self) -> float:
        return self.correct.count("1") / len(self.correct)

    @property
    def mean_gold_probability(self) -> float | None:
        return None if self.gold_probability is None else sum(self.gold_probability) / len(self.gold_probability)


def as_removal(units: Units) -> Removal:
    """Turn a document's list of units into a Removal."""
    return Removal.from_units(units)
