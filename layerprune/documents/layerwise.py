"""The part of an audit that goes layer by layer: what each removed layer costs alone, and what the path to it cost."""

from __future__ import annotations

from pydantic import Field

from layerprune.documents.base import Part
from layerprune.documents.common import Interval, Ranked, Units


class Without(Part):
    """The base without some units, on the layerwise items."""

    units: Units
    correct: dict[str, str] = Field(description="by task: '1' right, '0' wrong, in the order of the task's items")
    difference: float | None = Field(description="accuracy - base accuracy, mean of the informative tasks, if any")
    interval: Interval | None


class Compensated(Part):
    """One task: what the removed units cost one at a time, and what they cost together."""

    task: str
    items: int
    alone: float = Field(description="sum over the units of the accuracy lost when one alone is gone (0.01 = a point)")
    together: float = Field(description="accuracy lost when all are gone")
    excess: float = Field(description="together - alone; positive: single-layer scores understate the loss")
    interval: Interval = Field(description="95 % of the excess, paired: normal, one item of +1 and one of -1 added")
    relevance_alone: float | None = Field(
        description="sum of the single relevances, each at most 1; None for an uninformative task"
    )
    relevance_together: float | None


class Compensation(Part):
    """Whether single-layer scores tell the truth about this removal."""

    tasks: tuple[Compensated, ...]
    alone: float | None = Field(description="mean of the informative tasks, if any, as all here")
    together: float | None
    excess: float | None
    interval: Interval | None
    verdict: str = Field(description="one plain sentence")


class Layerwise(Part):
    """The base without one unit at a time, and along the order of the plan, on some of the audit's items."""

    items: dict[str, int] = Field(description="by task: how many of its items, chosen by hash")
    parts: tuple[Units, ...] = Field(description="what of the removal goes by itself, in the plan's order")
    alone: tuple[Without, ...] = Field(description="each part by itself, as far as the architecture allows")
    path: tuple[Without, ...] = Field(description="the first 1, 2, ... parts, the last one: all")
    compensation: Compensation | None = Field(description="None for a single part, or one that cannot go by itself")


class Ranking(Part):
    """What one metric says of every layer, to be seen beside the plan's own."""

    metric: str = Field(description="spec, such as 'cosine'")
    unit: str
    source: str = Field(description="which items it was measured on")
    ranking: tuple[Ranked, ...]
