"""front.json: what the model would lose and weigh after each step of one path of removals."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, StringConstraints

from layerprune.documents.base import Document, Part
from layerprune.documents.common import FileName, Interval, MetricRef, ModelRef, Units
from layerprune.documents.plan import Limits, PredictedTask, Search

FOLDER = "front"  # of a front's files, in the run folder
TABLE, PLOT = "front.csv", "front.png"


def plan_name(removed: int, depth: int) -> str:
    """Return the file name, in a front, of the plan that removes so many of ``depth`` layers; names sort by size."""
    return f"plan-{removed:0{max(2, len(str(depth)))}}.json"


PlanName = Annotated[FileName, StringConstraints(pattern=r"^plan-[0-9]+\.json$")]  # as plan_name gives them


class FrontPoint(Part):
    """One removal of the path; its plan can be exported as it stands."""

    removal: Units
    plan: PlanName = Field(description="file name, beside this one")
    plan_sha256: str
    parameters: int
    bytes: int = Field(description="of the weights that export writes")
    accuracy: float = Field(description="mean over the tasks, on held-back items")
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
    accuracy: float = Field(description="of the intact model, mean over the tasks, on held-back items")
    source: str = Field(description="which items the accuracies are from")
    points: tuple[FrontPoint, ...] = Field(description="smallest removal first, each within the next")
    scores_sha256: str
    seed: int
    versions: dict[str, str]

    @property
    def best(self) -> FrontPoint:
        """The point of the highest accuracy; of several the one that removes most (TALE, arXiv:2510.22767).

        It was chosen on the items its figures are from, so these are too good: an audit uses others. So does
        ``most_at_no_loss``.
        """
        return max(self.points, key=lambda point: (point.accuracy, len(point.removal)))

    @property
    def most_at_no_loss(self) -> FrontPoint | None:
        """The farthest point that is no worse than the intact model; None: each is worse."""
        return next((point for point in reversed(self.points) if point.accuracy_difference >= 0), None)

    def names_of(self, point: FrontPoint) -> tuple[str, ...]:
        """Return what a point is called: best, most at no loss, both or neither."""
        named = {"best": self.best, "most at no loss": self.most_at_no_loss}
        return tuple(name for name, found in named.items() if found == point)
