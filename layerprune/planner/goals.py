"""How far a removal goes: a number of layers, a size, a speed, or as far as a loss can be ruled out."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from layerprune import stats
from layerprune.artifacts import OWN_ANSWER, Certificate, CertifiedStep, Outcomes, Round, Speed, Target
from layerprune.auditor.speed import REPEATS, time_both
from layerprune.config import CERTIFY_LIMIT, PlanConfig
from layerprune.data.items import EvalSet, is_written
from layerprune.errors import RefusedError, UsageError
from layerprune.exporter.contents import Weight
from layerprune.exporter.proof import sharing_weights
from layerprune.formatting import in_words, parse_count, parse_size
from layerprune.planner.session import ScoringSession, SplitShares
from layerprune.removal import Removal, check_drop, parse_drop
from layerprune.scoring.metrics.ablation import INTACT
from layerprune.search import SearchResult
from layerprune.search.base import last_layers_first
from layerprune.search.searches import Blocks, OneShot

# Share of the selection items that no search sees: the chosen removal is judged on them once, for the prediction.
HELD_BACK = 0.2

Look = Callable[[int], SearchResult]
"""Searches for the removal of so many units that harms least; asked for more, it goes on from what it knows."""


@dataclass(frozen=True)
class GoalResult:
    """Where a goal led."""

    found: SearchResult
    rounds: tuple[Round, ...]  # everything that was judged on the way
    target: Target | None = None
    certificate: Certificate | None = None


@dataclass(frozen=True)
class Goal:
    """How far to go, as it was asked; unless a goal says otherwise, as far as ``up_to`` and the model allow."""

    requested: str  # what was asked, as the plan records it
    up_to: str | None = field(default=None, kw_only=True)  # a count or a share of the layers
    shares: SplitShares = field(default=SplitShares(HELD_BACK), kw_only=True)  # how the selection items are divided

    def counts(self, session: ScoringSession) -> list[int]:
        """Return every number of units that may go, up to ``--up-to``; raises ``UsageError`` when there is none."""
        depth = session.constraints.depth
        most = depth if self.up_to is None else parse_drop(self.up_to, depth, "--up-to")
        within = [count for count in session.constraints.counts() if count <= most]
        if not within:
            what = f"no {most} layers or fewer" if self.up_to is not None else f"none of the {depth} layers"
            raise UsageError(f"{self.requested} cannot begin: {what} may go")
        return within

    def require(self, session: ScoringSession) -> None:
        """Raise ``UsageError`` when the model cannot get there, before anything slow; the items are not there yet."""
        self.counts(session)

    def most(self, session: ScoringSession) -> int:
        """Return the most layers that may have to go, for what the search costs at most."""
        return self.counts(session)[-1]

    def pursue(self, session: ScoringSession, look: Look) -> GoalResult:
        """Search until it is reached."""
        found = look(self.most(session))
        return GoalResult(found, found.rounds)


class Drop(Goal):
    """A count or a share of the layers."""

    def require(self, session: ScoringSession) -> None:
        session.constraints.require(self.most(session))

    def most(self, session: ScoringSession) -> int:
        return parse_drop(self.requested, session.constraints.depth)


# The goal that the options of ``plan`` amount to.


CONFIDENCE = "95%"
FAR = "75%"  # of the layers, where --up-to does not say how far a front goes: beyond, nothing is left to trade


def goal_of(config: PlanConfig) -> Goal:
    """Return the one goal among the options; none, several, or one that makes no sense is a ``UsageError``."""
    options = {
        "--drop": config.drop,
        "--target-params": config.target_params,
        "--target-bytes": config.target_bytes,
        "--target-speedup": config.target_speedup,
        "--max-drop": config.max_drop,
        "--front": "yes" if config.front else None,
    }
    given = {option: text for option, text in options.items() if text is not None}
    if len(given) != 1:
        said = f"{' and '.join(given)} are given" if given else "nothing says how far to go"
        raise UsageError(f"{said}; give one of {', '.join(options)}")
    [(option, text)] = given.items()
    belongings = {"--confidence": config.confidence, "--certify-limit": config.certify_limit, "--up-to": config.up_to}
    for stray in (name for name, value in belongings.items() if value is not None):
        owners = ("--max-drop", "--front") if stray == "--up-to" else ("--max-drop",)
        if option not in owners:
            raise UsageError(f"{stray} belongs to {' or '.join(owners)}, and {option} is given")
    requested = f"{option} {text}"
    match option:
        case "--drop":
            check_drop(text)
            return Drop(text)
        case "--target-params":
            return Smaller(requested, "parameters", parse_count(text, option))
        case "--target-bytes":
            return Smaller(requested, "bytes", parse_size(text, option))
        case "--target-speedup":
            return Faster(requested, _factor(text))
        case "--max-drop":
            return _max_drop(text, config)
    if config.up_to is not None:
        check_drop(config.up_to, "--up-to")
    up_to = config.up_to or FAR
    return Farthest(f"--front --up-to {up_to}", up_to=up_to, shares=SplitShares(HELD_BACK, examined=True))


def _max_drop(text: str, config: PlanConfig) -> Goal:
    confidence, up_to = config.confidence or CONFIDENCE, config.up_to
    limit, sure = _share(text, "--max-drop", "2%"), _share(confidence, "--confidence", CONFIDENCE)
    if sure < 0.5:
        raise UsageError(f"--confidence {confidence!r} is less than a coin has; write {CONFIDENCE}")
    if up_to is not None:
        check_drop(up_to, "--up-to")
    requested = f"--max-drop {text} --confidence {confidence}" + (f" --up-to {up_to}" if up_to else "")
    items = CERTIFY_LIMIT if config.certify_limit is None else config.certify_limit
    shares = SplitShares(HELD_BACK, certify=items, examined=True)
    return MaxDrop(requested, limit, sure, up_to=up_to, shares=shares)


def _factor(text: str) -> float:
    try:
        wanted = float(text.strip().removesuffix("x"))
    except ValueError:
        wanted = math.nan
    if not 1 < wanted < math.inf:
        raise UsageError(f"--target-speedup {text!r} is not a speed-up; write 1.3x")
    return wanted


def _share(text: str, option: str, example: str) -> float:
    try:
        share = float(text.strip().removesuffix("%")) / 100 if text.strip().endswith("%") else math.nan
    except ValueError:
        share = math.nan
    if not 0 < share < 1:
        raise UsageError(f"{option} {text!r} is not a share between 0% and 100%; write {example}")
    return round(share, 12)  # 2% is 0.02, and not what dividing leaves


# Targets: the fewest units that bring a figure to what is wanted.


class TargetGoal(Goal, ABC):
    """A figure of the pruned model that is worked out or measured after each search."""

    @abstractmethod
    def measure(self, session: ScoringSession, removal: Removal) -> tuple[Target, bool]:
        """Return the figure, and whether it is as wanted."""

    @abstractmethod
    def nearest(self, target: Target) -> str:
        """Complete "was not reached: ..." for the figure that came nearest."""

    @abstractmethod
    def counts_to_try(self, session: ScoringSession) -> Sequence[int]:
        """Return the numbers of units that may do, fewest first."""

    def pursue(self, session: ScoringSession, look: Look) -> GoalResult:
        target: Target | None = None
        refusals: list[RefusedError] = []
        for count in self.counts_to_try(session):
            try:
                found = look(count)
            except RefusedError as error:  # whole periods only, say: the next number may do
                refusals.append(error)
                continue
            target, reached = self.measure(session, found.removal)
            if reached:
                return GoalResult(found, found.rounds, target=target)
        if target is None:
            raise refusals[0]
        raise RefusedError(f"{self.requested} was not reached: {self.nearest(target)}")


# Targets of size: the fewest units that bring the weights down to so many parameters or bytes.


@dataclass(frozen=True)
class Smaller(TargetGoal):
    """At most ``wanted`` parameters, or bytes of weights, are left."""

    what: Literal["parameters", "bytes"]
    wanted: int

    def require(self, session: ScoringSession) -> None:
        self.counts_to_try(session)

    def most(self, session: ScoringSession) -> int:
        """One layer more than if the largest ones went: layers are much alike."""
        return self.counts_to_try(session)[:2][-1]

    def measure(self, session: ScoringSession, removal: Removal) -> tuple[Target, bool]:
        base, left = (self._size(weight) for weight in session.weigh(Removal(()), removal))
        return Target(what=self.what, wanted=self.wanted, base=base, reached=left), left <= self.wanted

    def nearest(self, target: Target) -> str:
        return f"the search's largest removal leaves {self._in_words(target.reached)}"

    def counts_to_try(self, session: ScoringSession) -> Sequence[int]:
        """Return the numbers of units that can reach it if the largest go; raises ``UsageError`` when none can."""
        moves, counts = session.constraints.moves, session.constraints.counts()
        intact, *without = session.weigh(Removal(()), *[Removal.of(*move) for move in moves])
        base = self._size(intact)
        if base <= self.wanted:
            raise UsageError(f"{self.requested}: the model has {self._in_words(base)} as it is; ask for less")
        saved = [(base - self._size(own)) / len(move) for move, own in zip(moves, without, strict=True) for _ in move]
        saved.sort(reverse=True)
        enough = [count for count in counts if base - sum(saved[:count]) <= self.wanted]
        if not enough:
            most = counts[-1] if counts else 0
            least = self._in_words(base - sum(saved[:most]))
            raise UsageError(
                f"{self.requested} cannot be reached: {most} of {session.constraints.depth} layers may go, "
                f"which leaves {least} of {self._in_words(base)}"
            )
        return enough

    def _size(self, weight: Weight) -> int:
        return weight.parameters if self.what == "parameters" else weight.nbytes

    def _in_words(self, size: float) -> str:
        return f"{size:,.0f} parameters" if self.what == "parameters" else in_words(size)


# A target of speed: the fewest units that make the model so many times as fast, as measured on this machine.


STAND_IN_REPEATS = 3  # of stand-ins, which only say where to begin; the chosen removal is timed REPEATS times


@dataclass(frozen=True)
class Faster(TargetGoal):
    """Prefill and decoding both at least ``wanted`` times as fast as the intact model, one sequence at a time.

    Layers of one kind take alike long, so stand-ins are timed first, to say what can be reached and where to begin;
    what the search then chooses is timed itself. Timings vary: the same command may end one layer further on.
    """

    wanted: float

    def require(self, session: ScoringSession) -> None:
        most = self.stand_ins(session)[-1]
        best = speedup(_timed(session, most, STAND_IN_REPEATS))
        if best < self.wanted:
            raise UsageError(
                f"{self.requested} cannot be reached: with {len(most)} of {session.constraints.depth} layers removed, "
                f"as many as may go, the model is {best:.2f} times as fast here"
            )

    def most(self, session: ScoringSession) -> int:
        """One layer more than if all the time were spent in the layers."""
        least = math.ceil(session.constraints.depth * (1 - 1 / self.wanted)) + 1
        counts = session.constraints.counts()
        return next((count for count in counts if count >= least), counts[-1])

    def measure(self, session: ScoringSession, removal: Removal) -> tuple[Target, bool]:
        speed = _timed(session, removal, REPEATS)
        reached = speedup(speed)
        session.progress.note(f"{len(removal)} removed: {reached:.2f} times as fast")
        target = Target(what="speed-up", wanted=self.wanted, base=1.0, reached=round(reached, 4), speed=speed)
        return target, reached >= self.wanted

    def nearest(self, target: Target) -> str:
        return f"the largest removal is {speedup(target.speed):.2f} times as fast here"

    def counts_to_try(self, session: ScoringSession) -> Sequence[int]:
        """Return the numbers from the smallest whose stand-in is fast enough, found by halving."""
        stand_ins = self.stand_ins(session)
        low, high = 0, len(stand_ins) - 1
        while low < high:
            middle = (low + high) // 2
            fast = speedup(_timed(session, stand_ins[middle], STAND_IN_REPEATS)) >= self.wanted
            low, high = (low, middle) if fast else (middle + 1, high)
        return [count for count in session.constraints.counts() if count >= len(stand_ins[low])]

    def stand_ins(self, session: ScoringSession) -> list[Removal]:
        """Return one allowed removal of each size that has one, smallest first; ``UsageError`` when none has.

        From the end layer by layer, else a run of neighbours: step by step there may be no way where whole periods go.
        """
        found = []
        for count in self.counts(session):
            for search in (OneShot(), Blocks()):
                try:
                    found.append(search.find(last_layers_first, session.constraints, count).removal)
                    break
                except (RefusedError, UsageError):
                    pass
        if not found:
            raise UsageError(f"{self.requested} cannot begin: none of the layers may go")
        return found


def speedup(speed: Speed) -> float:
    """Return how many times as fast the pruned model is, in the lesser of prefill and decoding (medians)."""
    names = ("prefill_tokens_per_s", "decode_tokens_per_s")
    return min(speed.pruned[name].median / speed.base[name].median for name in names)


def _timed(session: ScoringSession, removal: Removal, repeats: int) -> Speed:
    """Time the intact model and the pruned one in turn, as export would write it."""
    trust = session.request.trust_remote_code
    pruned = sharing_weights(session.loaded, session.checkpoint, removal, trust_remote_code=trust)
    return time_both(session.loaded, pruned, repeats=repeats, progress=session.progress)


# As far as a path goes: the goal behind a front, whose steps are the path's beginnings.


class Farthest(Goal):
    """The removal of ``up_to`` layers, or of as many as may go where that is fewer."""

    def require(self, session: ScoringSession) -> None:
        if not session.request.tasks:
            raise UsageError("a front shows accuracy: give tasks, such as --tasks arc_easy")
        self.counts(session)


# As far as a loss can be ruled out: the search proposes a path, items it has not seen decide how far to follow it.


@dataclass(frozen=True)
class MaxDrop(Goal):
    """The largest removal of the path whose mean accuracy provably falls by less than ``limit`` (0.02: two points)."""

    limit: float
    confidence: float

    def require(self, session: ScoringSession) -> None:
        if not session.request.tasks:
            raise UsageError(f"{self.requested} needs items that certify: give tasks, such as --tasks arc_easy")
        self.counts(session)

    def pursue(self, session: ScoringSession, look: Look) -> GoalResult:
        evaluator = session.certification
        assert evaluator is not None  # shares asks for it
        base = correct_bits(evaluator.outcomes([INTACT], "the intact model")[INTACT])
        self._require_enough(len(base))

        def answers(removal: Removal) -> str:
            return correct_bits(evaluator.outcomes([removal], f"certifying {removal}")[removal])

        path, found = walk(look, self.counts(session), base, answers, self.limit, self.confidence)
        if not found.certified:
            raise RefusedError(self._nothing_certified(path[0].removal, found.steps[0]))
        fingerprints = {data.task: data.fingerprints for data in evaluator.eval_set.data()}
        certificate = Certificate(
            limit=self.limit,
            confidence=self.confidence,
            statement=self._statement(path[found.certified - 1].removal, evaluator.eval_set, len(base)),
            fingerprints=fingerprints,
            steps=tuple(_step(own.removal, step) for own, step in zip(path, found.steps, strict=True)),
            selection_limit=session.request.limit,
            certify_limit=self.shares.certify,
        )
        return GoalResult(path[found.certified - 1], path[-1].rounds, certificate=certificate)

    def _require_enough(self, items: int) -> None:
        """Raise ``UsageError`` where not even a removal that changes no answer could be certified."""
        needed = stats.items_needed(0, 0, 1, self.limit, self.confidence)
        if needed is None or items < needed:
            raise UsageError(
                f"{self.requested}: {items} certification items can certify nothing, not even a removal that changes "
                f"no answer: {needed} at least, more where answers change; raise --certify-limit or add tasks"
            )

    def _nothing_certified(self, removal: Removal, step: stats.PathStep) -> str:
        lost, won = step.right_to_wrong, step.wrong_to_right
        needed = stats.items_needed(lost, won, step.items, self.limit, self.confidence)
        more = (
            "if that is its true loss, no number of items would do"
            if needed is None
            else f"if that is its true loss, about {needed:,} items would be needed: raise --certify-limit or add tasks"
        )
        return (
            f"no removal can be certified to lose less than {100 * self.limit:g} points with "
            f"{100 * self.confidence:g} % confidence: "
            f"without {removal} {lost} of {step.items} certification items turn wrong and {won} right "
            f"(p = {step.p_value:.2g}); {more}"
        )

    def _statement(self, removal: Removal, eval_set: EvalSet, items: int) -> str:
        tasks = eval_set.tasks
        own = [name for name, task in tasks.items() if task.metric == OWN_ANSWER]
        meant = f" (of {', '.join(own)}: the share of prompts answered token for token as before)" if own else ""
        unseen = "" if own or any(is_written(task) for task in tasks.values()) else ". Not looked at: generated text"
        return (
            f"With {100 * self.confidence:g} % confidence, removing {removal} lowers the mean accuracy on "
            f"{', '.join(tasks)}{meant} by less than {100 * self.limit:g} points, on items drawn like the {items:,} "
            "that certify it, none of which had a say in choosing the layers "
            f"(exact paired test, fixed sequence: arXiv:2110.01052){unseen}"
        )


def walk(
    look: Look,
    counts: Sequence[int],
    base: str,
    answers: Callable[[Removal], str],
    limit: float,
    confidence: float,
) -> tuple[list[SearchResult], stats.CertifiedPath]:
    """Search removal after removal and certify each, until one fails or the search can go no further.

    The search sees nothing of ``answers``, so the path is fixed beforehand as far as they are concerned, even though it
    is laid only as far as it is walked. Returns the path, the failed step included, and the statistics.
    """
    path: list[SearchResult] = []
    refusals: list[RefusedError] = []

    def steps() -> Iterator[str]:
        for count in counts:
            try:
                path.append(look(count))
            except RefusedError as error:  # the architecture: whole periods only, say, or no more than before
                refusals.append(error)
                continue
            yield answers(path[-1].removal)

    certificate = stats.certify(base, steps(), limit, confidence)
    if not path:
        raise refusals[0]
    return path, certificate


def correct_bits(outcomes: dict[str, Outcomes]) -> str:
    """Return which items of all tasks are answered rightly, one digit each."""
    return "".join(own.correct for own in outcomes.values())


def _step(removal: Removal, step: stats.PathStep) -> CertifiedStep:
    return CertifiedStep(
        removal=removal.layers,
        right_to_wrong=step.right_to_wrong,
        wrong_to_right=step.wrong_to_right,
        p_value=float(f"{step.p_value:.4g}"),
        certified=step.certified,
    )
