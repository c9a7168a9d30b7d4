"""As far as a loss can be ruled out: the search proposes a path, items it has not seen decide how far to follow it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from layerprune import stats
from layerprune.config import CERTIFY_LIMIT
from layerprune.documents import OWN_ANSWER, Certificate, CertifiedStep, Outcomes
from layerprune.errors import RefusedError, UsageError
from layerprune.metrics.ablation import INTACT
from layerprune.planners import Found
from layerprune.planning.desk import Desk
from layerprune.planning.goals import HELD_BACK, Look, Reached, counts_up_to
from layerprune.planning.slices import Shares
from layerprune.removal import Removal
from layerprune.tasks import Questions
from layerprune.tasks.answers import is_written


@dataclass(frozen=True)
class MaxDrop:
    """The largest removal of the path whose mean accuracy provably falls by less than ``limit`` (0.02: two points)."""

    limit: float
    confidence: float
    requested: str
    items: int = CERTIFY_LIMIT
    up_to: str | None = None

    @property
    def shares(self) -> Shares:
        return Shares(HELD_BACK, certify=self.items, examined=True)

    def require(self, desk: Desk) -> None:
        if not desk.request.tasks:
            raise UsageError(f"{self.requested} needs items that certify: give tasks, such as --tasks arc_easy")
        counts_up_to(desk, self.up_to, self.requested)

    def most(self, desk: Desk) -> int:
        return counts_up_to(desk, self.up_to, self.requested)[-1]

    def pursue(self, desk: Desk, look: Look) -> Reached:
        examiner = desk.certification
        assert examiner is not None  # shares asks for it
        base = _bits(examiner.outcomes([INTACT], "the intact model")[INTACT])
        self._enough(len(base))

        def answers(removal: Removal) -> str:
            return _bits(examiner.outcomes([removal], f"certifying {removal}")[removal])

        counts = counts_up_to(desk, self.up_to, self.requested)
        path, found = walk(look, counts, base, answers, self.limit, self.confidence)
        if not found.certified:
            raise RefusedError(self._nothing(path[0].removal, found.steps[0]))
        fingerprints = {data.task: data.fingerprints for data in examiner.questions.data()}
        certificate = Certificate(
            limit=self.limit,
            confidence=self.confidence,
            statement=self._statement(path[found.certified - 1].removal, examiner.questions, len(base)),
            fingerprints=fingerprints,
            steps=tuple(_step(own.removal, step) for own, step in zip(path, found.steps, strict=True)),
            selection_limit=desk.request.limit,
            certify_limit=self.items,
        )
        return Reached(path[found.certified - 1], path[-1].rounds, certificate=certificate)

    def _enough(self, items: int) -> None:
        """Raise ``UsageError`` where not even a removal that changes no answer could be certified."""
        needed = stats.items_needed(0, 0, 1, self.limit, self.confidence)
        if needed is None or items < needed:
            raise UsageError(
                f"{self.requested}: {items} certification items can certify nothing, not even a removal that changes "
                f"no answer: {needed} at least, more where answers change; raise --certify-limit or add tasks"
            )

    def _nothing(self, removal: Removal, step: stats.Step) -> str:
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

    def _statement(self, removal: Removal, questions: Questions, items: int) -> str:
        tasks = questions.tasks
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
) -> tuple[list[Found], stats.Certificate]:
    """Search removal after removal and certify each, until one fails or the search can go no further.

    The search sees nothing of ``answers``, so the path is fixed beforehand as far as they are concerned, even though it
    is laid only as far as it is walked. Returns the path, the failed step included, and the statistics.
    """
    path: list[Found] = []
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


def _bits(outcomes: dict[str, Outcomes]) -> str:
    return "".join(own.correct for own in outcomes.values())


def _step(removal: Removal, step: stats.Step) -> CertifiedStep:
    return CertifiedStep(
        removal=removal.layers,
        right_to_wrong=step.right_to_wrong,
        wrong_to_right=step.wrong_to_right,
        p_value=float(f"{step.p_value:.4g}"),
        certified=step.certified,
    )
