"""scores.json: what each candidate removal costs, per task, with intervals and per-item outcomes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from layerprune.artifacts.base import Computed, Document, Interval, MetricRef, ModelRef, Outcomes, Part, TaskData, Units

if TYPE_CHECKING:
    from matplotlib.axes import Axes


class TaskScore(Part):
    """One removal on one task."""

    relevance: float = Field(
        description="1 - (acc - chance) / (base acc - chance); negative: removal helped, above 1: it fell below "
        "chance. Of own answers: the share of agreed tokens that is lost"
    )
    interval: Interval = Field(description="95 %, paired over the items")
    accuracy: float
    gold_probability: float | None
    items: int = Field(description="how many items this candidate was judged on")
    outcomes: Outcomes


class Candidate(Part):
    """One removal and its score; higher means more harm in removing."""

    removal: Units
    score: float
    interval: Interval | None = None
    tie_break: float = Field(default=0.0, description="orders equal scores: loss of mean gold probability")
    stopped: bool = Field(default=False, description="left the race early, its place clear; scored on fewer items")
    accepted: bool = Field(default=False, description="left the race early as clearly among the next to go")
    below_floor: dict[str, float] = Field(
        default_factory=dict, description="tasks that keep less than their floor, and the share they miss it by"
    )
    not_finite: bool = Field(
        default=False,
        description="a figure without these layers is no finite number: worst of its round, its score above all others",
    )
    tasks: dict[str, TaskScore] = Field(default_factory=dict)


class Round(Part):
    """All candidates judged while the units in ``removed`` were already gone (a one-shot search has one round)."""

    removed: Units
    candidates: tuple[Candidate, ...]


class BaseTask(Part):
    """The intact model on one task."""

    accuracy: float
    gold_probability: float | None
    p_value: float = Field(description="one-sided exact test of accuracy against the chance level")
    outcomes: Outcomes


class EngineReport(Computed):
    """How the figures were computed."""

    path: str = Field(description="which evaluation path passed the self-test")
    dtype: str
    device: str
    computed: int = Field(description="tokens x layers computed, or left by an earlier round")
    naive: int = Field(description="tokens x layers a full evaluation per candidate would have computed")


class Scores(Document):
    """Every candidate a search has looked at, round by round."""

    filename: ClassVar[str] = "scores.json"
    kind: Literal["scores"] = "scores"
    format: Literal[1] = 1
    model: ModelRef
    metric: MetricRef
    data: tuple[TaskData, ...]
    base: dict[str, BaseTask] = Field(default_factory=dict)
    rounds: tuple[Round, ...] = Field(min_length=1)
    engine: EngineReport | None = None
    config: str | None = Field(
        default=None, description="config.json of the model as it stands: what may be removed follows from it"
    )
    seed: int
    versions: dict[str, str]

    @property
    def headline(self) -> str:
        rounds = f" in {len(self.rounds)} rounds" if len(self.rounds) > 1 else ""
        first = min(self.rounds[0].candidates, key=lambda one: one.score)
        return (
            f"{self.model.id}, {self.model.layers} layers, by {self.metric.words}{rounds}; "
            f"least harm: {', '.join(map(str, first.removal))} ({first.score:.4g})"
        )

    def records(self) -> list[dict[str, Any]]:
        """Return a row for each candidate of each round, least harm first.

        ``score`` and its interval in the metric's unit, higher is more harm; then each task's relevance and accuracy.
        """
        rows = []
        for number, entry in enumerate(self.rounds, 1):
            for one in sorted(entry.candidates, key=lambda each: (each.score, each.tie_break)):
                low, high = one.interval or (None, None)
                row: dict[str, Any] = {"round": number, "removed": entry.removed, "layers": one.removal}
                row |= {"score": one.score, "low": low, "high": high}
                for name, task in one.tasks.items():
                    row |= {f"{name} relevance": task.relevance, f"{name} accuracy": task.accuracy}
                rows.append(row)
        return rows

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw each layer's score of the first round, with its 95 % interval, on matplotlib's ``ax`` or a new one."""
        if ax is None:
            from matplotlib import pyplot

            ax = pyplot.subplots(figsize=(8, 3))[1]
        found = sorted(self.rounds[0].candidates, key=lambda one: one.removal)
        scores, places = [one.score for one in found], range(len(found))
        ax.bar(places, scores, color="#4c78a8")
        whiskers = [(place, *one.interval) for place, one in enumerate(found) if one.interval is not None]
        if whiskers:
            at, low, high = zip(*whiskers, strict=True)
            ax.vlines(at, low, high, color="black", linewidth=1)
        ax.set_xticks(places, [", ".join(map(str, one.removal)) for one in found], fontsize=7)
        ax.set_xlabel("layer")
        ax.set_ylabel(self.metric.unit)
        ax.set_title(f"{self.metric.words}: harm of removing one layer")
        return ax

    @model_validator(mode="after")
    def _every_round_holds_candidates_of_layers_that_are_there(self) -> Self:
        for number, entry in enumerate(self.rounds):
            if not entry.candidates:
                raise ValueError(f"rounds[{number}] holds no candidate: there is nothing to plan from")
            for units in (entry.removed, *(candidate.removal for candidate in entry.candidates)):
                if units and max(units) > self.model.layers - 1:
                    there = f"the model has layers 0 to {self.model.layers - 1}"
                    raise ValueError(f"rounds[{number}] speaks of {list(units)} and {there}")
        return self
