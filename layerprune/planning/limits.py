"""What a search may remove at all, from what was asked and what the architecture allows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from layerprune.anatomy import Anatomy
from layerprune.config import PlanConfig
from layerprune.documents import MEAN, Limits, Objective
from layerprune.errors import RefusedError, UsageError
from layerprune.judgement import additive
from layerprune.metrics.base import Metric
from layerprune.planners import Anything, Contiguous, NoAdjacent, Shape
from layerprune.removal import Removal


@dataclass(frozen=True)
class Rules:
    """What a removal has to keep to beside the protected layers and what the architecture demands."""

    keep_period: bool = False  # what repeats from layer to layer goes on repeating
    no_adjacent: bool = False  # no two neighbours
    contiguous: bool = False  # one run of neighbours

    def __post_init__(self) -> None:
        if self.no_adjacent and self.contiguous:
            raise UsageError("no_adjacent and contiguous exclude each other; ask for one of them")

    @classmethod
    def of(cls, config: PlanConfig) -> Rules:
        """Return the rules among the options of ``plan``."""
        return cls(config.keep_period, config.no_adjacent, config.contiguous)

    @property
    def shape(self) -> Shape:
        """The rule about neighbours."""
        return NoAdjacent() if self.no_adjacent else Contiguous() if self.contiguous else Anything()

    def check(self, anatomy: Anatomy) -> Callable[[Removal], None]:
        """Return what raises ``RefusedError`` for a removal that may not be."""
        return keeping_period(anatomy) if self.keep_period else anatomy.check

    def limits(self, protect: frozenset[int], anatomy: Anatomy | None) -> Limits:
        """Return the rules as a plan records them."""
        return Limits(
            protect=tuple(sorted(protect)),
            architecture=anatomy.remarks if anatomy is not None else (),
            keep_period=self.keep_period,
            no_adjacent=self.no_adjacent,
            contiguous=self.contiguous,
        )


FREE = Rules()


def keeping_period(anatomy: Anatomy) -> Callable[[Removal], None]:
    """Return ``Anatomy.check`` that refuses, too, what breaks a period or makes other readers misread the model."""

    def check(removal: Removal) -> None:
        anatomy.check(removal)
        broken = anatomy.out_of_step(removal)
        if broken:
            raise RefusedError(f"--keep-period: {'; '.join(broken)}")

    return check


def check_objective(objective: Objective, racing: bool | None, name: str, metric: Metric) -> None:
    """Raise ``UsageError`` for an objective that the metric knows nothing of, or that a race cannot stand on."""
    if objective == MEAN:
        return
    if metric.needs != "items":
        raise UsageError(
            f"the metric {name!r} does not answer tasks: leave out --objective, --weights and --floor, or use ablation"
        )
    if racing and not additive(objective):
        raise UsageError(
            f"--racing goes by the mean over items, which {objective.words} is not: leave it out, or take another "
            "objective"
        )
