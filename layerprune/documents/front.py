"""front.json: what the model would lose and weigh after each step of one path of removals."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self, get_args

from pydantic import Field, StringConstraints, model_validator

from layerprune.documents.base import Document, Part
from layerprune.documents.common import FileName, Interval, MetricRef, ModelRef, Units
from layerprune.documents.plan import Limits, PredictedTask, Search

FOLDER = "front"  # of a front's files, in the run folder
TABLE, PLOT = "front.csv", "front.png"


def plan_name(removed: int, depth: int) -> str:
    """Return the file name, in a front, of the plan that removes so many of ``depth`` layers; names sort by size."""
    return f"plan-{removed:0{max(2, len(str(depth)))}}.json"


PointName = Literal["best", "most-at-no-loss"]
POINTS: tuple[PointName, ...] = get_args(PointName)
PlanName = Annotated[FileName, StringConstraints(pattern=r"^plan-[0-9]+\.json$")]  # as plan_name gives them


class FrontPoint(Part):
    """One removal of the path; its plan can be exported as it stands."""

    removal: Units
    plan: PlanName = Field(description="file name, beside this one")
    plan_sha256: str
    parameters: int
    bytes: int = Field(description="of the weights that export writes")
    accuracy: float = Field(description="on held-back items, of the tasks that Prediction.accuracy_difference is of")
    accuracy_difference: float = Field(description="to the intact model on the same items (0.01 = one point)")
    interval: Interval = Field(description="95 %, of the difference, for this point on its own")
    tasks: dict[str, PredictedTask]


class Front(Document):
    """A nested path of removals, each with what it costs on items that had no say in it."""

    filename: ClassVar[str] = "front.json"
    kind: Literal["front"] = "front"
    format: Literal[1] = 1
    model: ModelRef
    metric: MetricRef
    search: Search
    limits: Limits
    bytes: int = Field(description="of the intact model's weights")
    accuracy: float = Field(description="of the intact model, on held-back items, of the same tasks as the points'")
    source: str = Field(description="which items the accuracies are from")
    points: tuple[FrontPoint, ...] = Field(description="smallest removal first, each within the next")
    named: dict[PointName, PlanName] = Field(
        default_factory=dict, description="plans of named points, see planning.front.named_points"
    )
    scores_sha256: str
    seed: int
    versions: dict[str, str]

    @property
    def headline(self) -> str:
        named = ", ".join(f"{name} {plan}" for name, plan in self.named.items())
        return f"{len(self.points)} plans for {self.model.id}, {self.search.name} by {self.metric.words}; {named}"

    def records(self) -> list[dict[str, Any]]:
        """Return a row for each step of the path: accuracy on held-back items, its difference, bytes, parameters."""
        return [
            {
                "removed": len(one.removal), "layers": one.removal, "accuracy": one.accuracy,
                "difference": one.accuracy_difference, "low": one.interval[0], "high": one.interval[1],
                "parameters": one.parameters, "bytes": one.bytes, "plan": one.plan,
            }
            for one in self.points
        ]  # fmt: skip

    @model_validator(mode="after")
    def _names_points_of_its_own(self) -> Self:
        plans = [point.plan for point in self.points]
        for name, plan in self.named.items():
            if plan not in plans:
                raise ValueError(f"named calls {plan} {name!r}, and no point has that plan")
        return self

    def names_of(self, point: FrontPoint) -> str:
        """Return what a point is called, for tables: ``best, most-at-no-loss``; empty for most."""
        return ", ".join(name for name, plan in self.named.items() if plan == point.plan)
