"""Selection items divided: what the search sees, what is held back for the prediction, what certifies."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import reduce

from layerprune.config import ScoreConfig
from layerprune.errors import UsageError
from layerprune.stats import draw_mixture
from layerprune.tasks import Questions


@dataclass(frozen=True)
class Shares:
    """How to divide the items; what is neither held back nor for certification is the search's."""

    held_back: float = 0.0  # share of the items that do not certify
    certify: int = 0  # items of each task for certification, beyond the request's limit
    examined: bool = False  # answer held-back items even where the metric itself looks at none


@dataclass(frozen=True)
class Slices:
    """The items of each purpose; no item is in two of them. None: there are too few to spare any."""

    search: Questions
    held_back: Questions | None = None
    certification: Questions | None = None

    @classmethod
    def of(cls, questions: Questions, shares: Shares, request: ScoreConfig) -> Slices:
        """Divide ``questions`` task by task, by item fingerprint; ``UsageError`` where a slice would have none."""
        rest, certification = questions, None
        if shares.certify:
            share = shares.certify / (request.limit + shares.certify)
            rest, spared = questions.held_back(share, "certification")
            certification = _mixture(spared, request.seed)
        search, held_back = rest.held_back(shares.held_back)
        if _complete(search) and _complete(held_back):
            return cls(search, held_back, certification)
        if shares.examined:
            raise UsageError(f"{len(rest)} selection items are too few to hold some back; raise --limit")
        return cls(rest, None, certification)

    @property
    def everything(self) -> Questions:
        """All items, task by task in the order of the slices."""
        return _joined([self.search, self.held_back, self.certification])

    @property
    def unseen(self) -> Questions:
        """The items that no search sees."""
        return _joined([self.held_back, self.certification])


def _mixture(questions: Questions, seed: int) -> Questions:
    """Draw the items whose outcomes together are about the mean of the tasks; see ``stats.draw_mixture``."""
    sizes = {name: len(task.items) for name, task in questions.tasks.items()}
    drawn = draw_mixture(sizes, seed) if all(sizes.values()) else {}
    parts = {
        name: replace(task, items=tuple(task.items[place] for place in drawn.get(name, ())))
        for name, task in questions.tasks.items()
    }
    empty = [name for name, task in parts.items() if not task.items]
    if empty:
        raise UsageError(f"task {empty[0]!r} has too few items to spare any for certification; leave it out")
    return Questions(parts)


def _complete(questions: Questions) -> bool:
    return all(task.items for task in questions.tasks.values())


def _joined(parts: list[Questions | None]) -> Questions:
    return reduce(Questions.followed_by, [part for part in parts if part is not None])
