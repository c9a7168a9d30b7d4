"""plan.json and front.json: what to remove and why; no weight has been touched."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self, get_args

from pydantic import Field, StringConstraints, model_validator

from layerprune.artifacts.audit import Speed
from layerprune.artifacts.base import Document, FileName, Interval, MetricRef, ModelRef, Part, Ranked, TaskData, Units
from layerprune.artifacts.scores import Scores
from layerprune.errors import DocumentError
from layerprune.removal import Removal

if TYPE_CHECKING:
    from torch import nn


class SearchRef(Part):
    """How the removal was looked for."""

    name: str
    options: dict[str, str | int | float | bool | None] = Field(default_factory=dict)


class PlanLimits(Part):
    """What the search was not allowed to do."""

    protect: Units = ()
    architecture: tuple[str, ...] = Field(default=(), description="constraints of the model type, in words")
    keep_period: bool = Field(default=False, description="what repeats from layer to layer goes on repeating")
    no_adjacent: bool = Field(default=False, description="no two neighbours")
    contiguous: bool = Field(default=False, description="one run of neighbours")


class PredictedTask(Part):
    """The chosen removal on one task."""

    base_accuracy: float
    accuracy: float
    difference: float
    interval: Interval
    items: int
    nats: float | None = Field(
        default=None, description="log-likelihood that the intact model's own answers lose, nats per token"
    )
    nats_interval: Interval | None = Field(default=None, description="95 %; BCa bootstrap; None of a single answer")
    base_agreed: float | None = Field(
        default=None, description="share of those answers' tokens that the intact model finds likeliest: all but ties"
    )
    agreed: float | None = Field(default=None, description="share that is still the likeliest, mean over the prompts")
    agreed_interval: Interval | None = Field(default=None, description="95 %; BCa bootstrap; None of a single answer")


class Prediction(Part):
    """What the removal is expected to cost, on items the search did not choose by."""

    source: str = Field(description="which items: held-back selection items, or the selection items themselves")
    accuracy_difference: float = Field(
        description="in accuracy (0.01 = one point), mean over the tasks that have one; where only own answers are "
        "read, of the share of prompts answered token for token"
    )
    interval: Interval
    tasks: dict[str, PredictedTask]


class Target(Part):
    """What the removal had to reach, and what it reaches."""

    what: Literal["parameters", "bytes", "speed-up"]
    wanted: int | float = Field(
        description="at most so many parameters or bytes of weights; at least so many times as fast"
    )
    base: int | float = Field(description="of the intact model; 1 for the speed-up")
    reached: int | float = Field(
        description="as export writes it; speed-up: the lesser of prefill and decoding, ratio of the medians measured"
    )
    speed: Speed | None = Field(default=None, description="what was measured, on which machine")


class CertifiedStep(Part):
    """One removal of the path on the certification items."""

    removal: Units
    right_to_wrong: int
    wrong_to_right: int
    p_value: float = Field(description="exact, of 'the mean accuracy falls by the limit or more'")
    certified: bool


class Certificate(Part):
    """A guarantee about the accuracy lost, from items that had no say in choosing what to remove."""

    limit: float = Field(description="in accuracy (0.02 = two points)")
    confidence: float
    statement: str
    fingerprints: dict[str, tuple[str, ...]] = Field(description="the certification items, by task")
    steps: tuple[CertifiedStep, ...] = Field(description="from the smallest removal to the first that failed")
    selection_limit: int | None = Field(default=None, description="--limit: items of each task asked for, these aside")
    certify_limit: int | None = Field(default=None, description="--certify-limit: how the items were divided")


class Plan(Document):
    """A reviewable proposal: export carries it out as it stands."""

    filename: ClassVar[str] = "plan.json"
    kind: Literal["plan"] = "plan"
    format: Literal[1] = 1
    model: ModelRef
    metric: MetricRef | None = Field(description="what judged the layers; None: they were named by hand")
    search: SearchRef | None = Field(description="None: the layers were named by hand")
    limits: PlanLimits
    requested: str = Field(description="--drop as given, or what was asked instead: '--target-params 1.2B'")
    removal: Units
    order: Units = Field(description="the removal in the order in which units were chosen")
    ranking: tuple[Ranked, ...] = Field(description="first-round scores, least relevant first")
    scores_sha256: str | None
    data: tuple[TaskData, ...] = Field(description="every item that has had a say; an audit must not use them")
    predicted: Prediction | None = None
    target: Target | None = None
    certificate: Certificate | None = None
    warnings: tuple[str, ...] = ()
    seed: int
    versions: dict[str, str]

    @property
    def headline(self) -> str:
        how = "named by hand"
        if self.search is not None and self.metric is not None:
            how = f"{self.search.name} by {self.metric.words}"
        said = f"remove {', '.join(map(str, self.removal))} of {self.model.layers} layers of {self.model.id}, {how}"
        if self.predicted is not None:
            low, high = (100 * end for end in self.predicted.interval)
            change = f"{100 * self.predicted.accuracy_difference:+.1f} ({low:+.1f} to {high:+.1f}) points"
            said += f"; {change} on {self.predicted.source}"
        return said

    def records(self) -> list[dict[str, Any]]:
        """Return a row for each layer of the ranking, first to go first; ``place`` among those that go, from 1."""
        place = {layer: number for number, layer in enumerate(self.order, 1)}
        return [{"layer": one.unit, "score": one.score, "place": place.get(one.unit)} for one in self.ranking]

    def applied(self, model: nn.Module) -> AbstractContextManager[nn.Module]:
        """Return a context in which a loaded ``model`` runs without the layers of the plan; no weight is changed.

        Generate with ``use_cache=False`` or leave it to the context, which switches the cache off: that of a bypassed
        layer stays empty. Raises ``UsageError`` for a model with fewer layers than the plan names.
        """
        from layerprune.models.bypass import applied

        context: AbstractContextManager[nn.Module] = applied(model, Removal.from_layers(self.removal))
        return context

    @model_validator(mode="after")
    def _has_scores_or_none(self) -> Self:
        made = {"metric": self.metric, "search": self.search, "scores_sha256": self.scores_sha256}
        missing = [name for name, value in made.items() if value is None]
        if len(missing) not in (0, len(made)):
            raise ValueError(f"{missing[0]} is null and {next(name for name in made if name not in missing)} is not")
        return self

    @model_validator(mode="after")
    def _is_about_one_removal(self) -> Self:
        """A plan may be edited: what else it says must not go on speaking of the removal of before."""
        if set(self.order) != set(self.removal):
            raise ValueError(
                f"order names {list(self.order)} and removal {list(self.removal)}; who edits one changes both and sets "
                "to null what was measured of another removal (predicted, target, certificate)"
            )
        if self.certificate is not None:
            certified = [step.removal for step in self.certificate.steps if step.certified]
            if set(certified[-1] if certified else ()) != set(self.removal):
                raise ValueError("certificate is of another removal; set it to null, or make the plan again")
        return self

    @property
    def chosen_by(self) -> str:
        """What chose the layers, for titles: ``ablation (worst task)``, ``hand``."""
        return "hand" if self.metric is None else self.metric.words

    @property
    def seen(self) -> frozenset[str]:
        """Fingerprints of every item that has had a say."""
        return frozenset(mark for data in self.data for mark in data.fingerprints)


# front.json: what the model would lose and weigh after each step of one path of removals.


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
    search: SearchRef
    limits: PlanLimits
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


# Scores and plans read together with what stands beside them: a document that was edited is not used in silence.


def read_scores(path: Path) -> Scores:
    """Read a scores.json; raises ``DocumentError`` where the plan or the front beside it was made from other scores."""
    scores = Scores.load(path)
    for kind, place in ((Plan, Plan.filename), (Front, f"{FOLDER}/{Front.filename}")):
        other = Path(path).parent / place
        if Path(path).name == Scores.filename and other.exists():
            _check(kind.load(other), other, scores, Path(path))
    return scores


def read_plan(path: Path) -> Plan:
    """Read a plan; raises ``DocumentError`` where the scores.json beside it, or beside its front, are other ones.

    A plan may be edited by hand; the scores that it names must still be those.
    """
    plan, folder = Plan.load(path), Path(path).resolve().parent
    scores = (folder.parent if (folder / Front.filename).exists() else folder) / Scores.filename
    if plan.scores_sha256 is not None and scores.exists():
        _check(plan, Path(path), Scores.load(scores), scores)
    return plan


def _check(made: Plan | Front, path: Path, scores: Scores, source: Path) -> None:
    if made.scores_sha256 != scores.sha256():
        raise DocumentError(
            f"{source} are not the scores that {path} was made from: their sha256 is {scores.sha256()[:12]}..., it "
            f"names {str(made.scores_sha256)[:12]}...; put them back, or remove {path} to plan again"
        )
