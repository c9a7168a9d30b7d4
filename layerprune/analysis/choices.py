"""Which layers each metric would remove, how many at a time, after reading what."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from layerprune.analysis.asked import CALIBRATED_SHARES, DRAWS, SHARES
from layerprune.analysis.bench import Bench
from layerprune.analysis.scorer import Scorer
from layerprune.config import StudyConfig
from layerprune.errors import LayerpruneError, RefusedError
from layerprune.metrics import METRICS
from layerprune.planners import Constraints, parse_drop
from layerprune.removal import Removal
from layerprune.specs import build


@dataclass
class Choice:
    """One way to choose, and what it removes at each count (several removals: draws of a baseline)."""

    metric: str
    search: str
    removals: dict[int, tuple[Removal, ...]] = field(default_factory=dict)
    remark: str = ""  # why it ends early


@dataclass(frozen=True)
class CalibratedChoice:
    """What one metric removes after reading each task alone, and after reading plain text."""

    metric: str
    count: int
    own: dict[str, Removal]  # by task
    text: Removal | None


def counts_of(request: StudyConfig, constraints: Constraints) -> list[int]:
    """Return how many units go at each point: those asked for, or the usual shares of the stack as far as it allows.

    Where greedy's path is to end is one of them, so that every choice can be compared with it there.
    """
    usual = [count for count in _rounded(SHARES, constraints.depth) if _possible(count, constraints)]
    ends = () if request.greedy is None else (parse_drop(request.greedy, constraints.depth, "--greedy"),)
    return sorted({*(request.counts or usual), *ends})


def calibrated_counts(counts: Sequence[int], depth: int) -> list[int]:
    """Return the counts nearest to those at which calibrations are compared."""
    wanted = _rounded(CALIBRATED_SHARES, depth)
    return sorted({min(counts, key=lambda count, near=near: (abs(count - near), count)) for near in wanted})


def _rounded(shares: Sequence[float], depth: int) -> list[int]:
    return sorted({max(1, min(depth - 1, round(share * depth))) for share in shares})


def _possible(count: int, constraints: Constraints) -> bool:
    try:
        constraints.require(count)
    except LayerpruneError:
        return False
    return True


def metric_choices(bench: Bench, counts: Sequence[int]) -> Iterator[Choice]:
    """Yield each metric's choice by scores of single units (of whole blocks where it scores those), baselines last."""
    scorer, first = bench.scorer(), bench.request.seed
    for spec in bench.specs:
        search = search_of(spec)
        seeds = range(first, first + DRAWS) if spec == "random" else [first]
        yield _followed(Choice(spec, search), scorer, bench.constraints, counts, seeds)


def greedy_choice(bench: Bench, counts: Sequence[int]) -> Choice | None:
    """Return ablation's greedy path as far as it was asked for."""
    if bench.request.greedy is None:
        return None
    most = parse_drop(bench.request.greedy, bench.constraints.depth, "--greedy")
    wanted = [count for count in counts if count <= most]
    choice, seeds = Choice("ablation", "greedy"), [bench.request.seed]
    return _followed(choice, bench.scorer(), bench.constraints, wanted, seeds)


def calibrated_choices(bench: Bench, counts: Sequence[int]) -> Iterator[CalibratedChoice]:
    """Yield what the one-shot metrics that need data choose by other data than all tasks together."""
    on_text = bench.scorer_on_text()
    for spec in bench.specs:
        _, metric = build(METRICS, spec)
        if metric.needs == "nothing" or search_of(spec) != "one-shot":
            continue
        for count in counts:
            try:
                own = {task: _one_shot(bench.scorer_for(task), spec, bench.constraints, count) for task in bench.tasks}
                text = None
                if on_text is not None and metric.needs == "text":
                    text = _one_shot(on_text, spec, bench.constraints, count)
            except RefusedError:  # the architecture allows no further by this ranking; smaller counts are compared
                break
            yield CalibratedChoice(spec, count, own, text)


def search_of(spec: str) -> str:
    """Return the search that turns a metric's scores into a removal without scoring again."""
    _, metric = build(METRICS, spec)
    return "blocks" if metric.scope == "contiguous blocks" else "one-shot"


def _one_shot(scorer: Scorer, spec: str, constraints: Constraints, count: int) -> Removal:
    return scorer.find(spec, "one-shot", constraints, count, racing=False).removal


def _followed(
    choice: Choice, scorer: Scorer, constraints: Constraints, counts: Sequence[int], seeds: Sequence[int]
) -> Choice:
    for count in counts:
        try:
            racing = choice.search == "greedy"  # one-shot scores were all measured in full
            found = [
                scorer.find(choice.metric, choice.search, constraints, count, seed=s, racing=racing) for s in seeds
            ]
        except RefusedError as error:  # the architecture allows no further: the path ends here, and says so
            choice.remark = str(error)
            break
        choice.removals[count] = tuple(one.removal for one in found)
    return choice
