"""``--budget``: the most items of each task that fit into a given time, from the speed on a few of them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from layerprune.artifacts import Candidate
from layerprune.artifacts.base import pretty, write_atomically
from layerprune.data.items import EvalSet
from layerprune.errors import DocumentError, RefusedError, UsageError, one_line
from layerprune.parsing import read_json
from layerprune.removal import Removal
from layerprune.scoring.cached_evaluator import CachedEvaluator, own_answers
from layerprune.scoring.engine import Engine
from layerprune.scoring.metrics.ablation import INTACT
from layerprune.scoring.racing import LEAST_ITEMS
from layerprune.search import Constraints, Greedy, Search
from layerprune.search.base import last_layers_first
from layerprune.util import Progress

FILENAME = "budget.json"  # in the run folder: the number of items that a run began with
FIRST, BLOCK = 2, 16  # items of each task whose speed is measured: a few, then as many as take little time, at most
LITTLE = 0.05  # share of the budget that each of two passes over these may take
RESERVE = 0.1  # share kept for what is not measured: loading again, predicting, writing
DIFFERING = 0.2  # share of answers that differ between two removals, for the width that is said (measured: .1 to .3)


@dataclass(frozen=True)
class TimeBudget:
    """What decides how many items fit."""

    seconds: float  # the budget
    began: float  # time.monotonic() when the command began
    evaluations: int  # removals that every item is answered under
    asked: dict[str, Any]  # what was asked: a run that goes on with the same keeps its number
    folder: Path | None  # the run folder
    progress: Progress

    def items(
        self, load: Callable[[int], EvalSet], engine: Engine, removals: Sequence[Removal], *, answers: bool
    ) -> int:
        """Return how many items of each task fit; says so, and what they tell apart.

        ``load(n)`` gives n items of each task; ``removals`` are those of a round, measured together as they will be.
        Raises ``UsageError`` where not even the items fit that a race asks for.
        """
        if (known := self._recorded()) is not None:
            self.progress.note(f"{self._budget}: {known:,} items of each task, as this run began with")
            return known
        once, under = self.seconds_of(load(FIRST), engine, removals, answers)
        few = min(BLOCK, math.floor(LITTLE * self.seconds / (once + under * (len(removals) + 1))))
        if few >= 2 * FIRST:
            # A shape that is new costs several times one that was met, and a run meets both: the mean of two passes
            # (measured on a CPU: 0.74 and 0.37 s an item, 0.48 to 0.53 over whole blocks).
            passes = [self.seconds_of(load(few), engine, removals, answers) for _ in range(2)]
            once, under = (sum(part) / len(passes) for part in zip(*passes, strict=True))
        each = once + under * self.evaluations  # seconds of one item of each task
        left = self.seconds * (1 - RESERVE) - (time.monotonic() - self.began)
        most = math.floor(left / each)
        if most < LEAST_ITEMS:
            needed = (LEAST_ITEMS * each + self.seconds - left) * (1 + RESERVE)
            raise UsageError(
                f"{self._budget} holds {max(0, most)} items of each task, and {LEAST_ITEMS} are the least to choose "
                f"by; give --budget {math.ceil(needed / 60)}m or more, or fewer tasks"
            )
        self._record(most)
        return most

    def say(self, eval_set: EvalSet) -> None:
        """Say up front how many items there are, and from what difference on they tell two removals apart."""
        count = len(eval_set)
        width = 100 * 1.96 * math.sqrt(DIFFERING / count)
        self.progress.note(
            f"{self._budget}: {count:,} items in all, each under {self.evaluations:,} removals; two removals whose "
            f"accuracies are {width:.1f} points apart are told apart (95 %, where a fifth of the answers differ)"
        )

    def seconds_of(
        self, eval_set: EvalSet, engine: Engine, removals: Sequence[Removal], answers: bool
    ) -> tuple[float, float]:
        """Return the seconds that an item of each task takes once, for the own answer, and under each removal."""
        items = max(len(task.items) for task in eval_set.tasks.values())
        start = time.monotonic()
        if answers:
            eval_set = own_answers(engine, eval_set, progress=self.progress)
        once = time.monotonic() - start
        evaluator = CachedEvaluator(engine, eval_set, self.progress)
        evaluator.prepare()  # the self-test is run once, whatever the number
        start = time.monotonic()
        evaluator.outcomes([INTACT, *removals], "measuring the speed")
        return once / items, (time.monotonic() - start) / items / (len(removals) + 1)

    @property
    def _budget(self) -> str:
        return f"a budget of {self.seconds / 60:.3g} min"

    def _recorded(self) -> int | None:
        path = None if self.folder is None else self.folder / FILENAME
        if path is None or not path.exists():
            return None
        try:
            found = read_json(path)
            items = found["items"] if found["asked"] == self.asked else None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DocumentError(f"{path} cannot be read: {one_line(error)}; remove it to measure anew") from error
        return items if type(items) is int and items >= LEAST_ITEMS else None

    def _record(self, items: int) -> None:
        if self.folder is not None:
            data = {"asked": self.asked, "items": items}
            write_atomically(self.folder / FILENAME, (pretty(data) + "\n").encode())


def evaluations(search: Search, constraints: Constraints, drop: int) -> int:
    """Return how many removals a search judges on the way to ``drop`` layers; raises ``UsageError`` if it can't tell.

    The search is run against a judge that knows no model and prefers the last layers. A lazy one may ask as many as
    one that is not; what a race stops early is not counted.
    """
    if search.asks:
        raise UsageError("--budget: this search asks other metrics, and how often is not known; use --limit instead")
    asked: set[Removal] = set()

    def judge(removals: Sequence[Removal]) -> list[Candidate]:
        asked.update(removals)
        return last_layers_first(removals)

    plain = Greedy() if isinstance(search, Greedy) else search
    with suppress(RefusedError):  # told when it is really looked for
        asked.add(plain.find(judge, constraints, drop).removal)
    return max(1, len(asked))
