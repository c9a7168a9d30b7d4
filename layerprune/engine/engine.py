"""The ablation engine: log-likelihoods of many requests under many removals, at a fraction of the price."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch

from layerprune.engine.allowance import Allowance
from layerprune.engine.paths import Grades, Path, PlainPath, TreePath
from layerprune.engine.selftest import choose_path
from layerprune.engine.trees import Row, batches, chains
from layerprune.engine.trunks import Trunks
from layerprune.errors import ModelError
from layerprune.removal import Removal
from layerprune.subject import Subject
from layerprune.tasks.items import Request

# Tokens in a batch. On two cores 512 to 4,096 take about the same time (measured, SmolLM2-135M, bfloat16): larger ones
# multiply faster and pad more. A card wants more in flight; that figure is not measured yet.
CPU_TOKENS = 1024
CUDA_TOKENS = 32768
# What the engine may hold beside the weights, unless --memory says otherwise. With less, removals are measured in
# portions and batches shrink; with more, more of the intact model's states stay for the rounds to come.
MEMORY = 4 * 1024**3
# The share that the intact model's states from earlier rounds may fill; the rest is for the removals of one batch.
KEPT_SHARE = 0.25


@dataclass
class Account:
    """Tokens x layers: what was computed, and what one evaluation per removal would have computed."""

    computed: int = 0
    naive: int = 0

    @property
    def avoided(self) -> float:
        """Share of the naive work that was not done."""
        return 1 - self.computed / self.naive if self.naive else 0.0


class Engine:
    """Measures requests under removals by the fastest path that a self-test has found right for this model."""

    def __init__(
        self, subject: Subject, *, tokens: int | None = None, rows: int | None = None, memory: int | None = None
    ) -> None:
        """``memory``: bytes of all tensors beside the weights, at any time."""
        self.subject = subject
        self.memory = memory or MEMORY
        self.tokens = tokens or (CUDA_TOKENS if subject.device.type == "cuda" else CPU_TOKENS)
        self.rows = rows  # --batch-size: a fixed number of rows instead of a number of tokens
        # Tokens of a batch that the device had room for, once it ran out. Apart from what was asked for, which stands
        # in journals' keys: a run that is taken up again has not run out yet.
        self.fits: int | None = None
        self.account = Account()
        self.path: Path = PlainPath(subject)
        self.remarks: list[str] = []  # why faster paths were not taken
        self._last: Allowance | None = None  # of the path measured along last
        self.longest = 0  # tokens of the longest request the self-test has seen; 0: it has not run

    def choose_path(self, requests: Sequence[Request], groups: Sequence[Sequence[int]]) -> None:
        """Compare the fast paths with plain forwards on a few of the requests and keep the first that agrees."""
        self.path, self.remarks = choose_path(self.subject, requests, groups, self._sums)
        self.path.work.computed = 0  # the self-test's own work is nobody's
        if isinstance(self.path, TreePath):
            self.path.walk.trunks = Trunks(int(KEPT_SHARE * self.memory))
        self.longest = max(len(request.tokens) for request in requests)

    def measure(
        self,
        requests: Sequence[Request],
        groups: Sequence[Sequence[int]],
        removals: Sequence[Removal],
        done: Callable[[int], None] = lambda tokens: None,
    ) -> Grades:
        """Return (sums of log-probabilities in nats, how many tokens are greedy), both (removals, requests).

        ``groups`` are the indices of requests that belong to one question; ``done`` hears of finished requests x
        removals. Raises ``UsageError`` where the memory does not hold one item under one removal.
        """
        if max(len(request.tokens) for request in requests) > self.longest:
            self.choose_path(requests, groups)  # a window may show only in requests longer than those tested
        found = self._measured(self.path, requests, groups, removals, done)
        self._count(requests, removals)
        return found

    def _sums(
        self, path: Path, requests: Sequence[Request], groups: Sequence[Sequence[int]], removals: Sequence[Removal]
    ) -> np.ndarray:
        return self._measured(path, requests, groups, removals)[0]

    def _measured(
        self,
        path: Path,
        requests: Sequence[Request],
        groups: Sequence[Sequence[int]],
        removals: Sequence[Removal],
        done: Callable[[int], None] = lambda tokens: None,
    ) -> Grades:
        """Measure along one path, in batches and portions of the removals that stay within the memory."""
        allowance = self._allowance(path, max(len(request.tokens) - 1 for request in requests))
        rows = path.layout(requests, groups, allowance.longest_row)
        allowance.check(rows)
        sums = np.full((len(removals), len(requests)), np.nan)
        greedy = np.zeros((len(removals), len(requests)), dtype=np.int64)
        for section in _sections(list(batches(rows, self._budget(), self._most_rows(), allowance.fits))):
            for part in allowance.portions(section, removals):
                for batch in section:
                    for members, numbers, (s, g) in self._run(path, batch, removals, part):
                        sums[np.ix_(numbers, members)], greedy[np.ix_(numbers, members)] = s, g
                        done(len(members) * len(numbers))
        return sums, greedy

    def _allowance(self, path: Path, longest: int) -> Allowance:
        """Return what one batch may hold on this path, the same object as long as the path is.

        ``longest``: tokens of the longest request; the first ones asked about hold the longest.
        """
        if self._last is None or self._last.path is not path:
            self._last = Allowance(path, self.memory, KEPT_SHARE, longest, own=path.subject is self.subject)
        return self._last

    def _budget(self) -> int:
        """Return the tokens of a batch, whatever the memory allows."""
        return self.tokens if self.fits is None else min(self.tokens, self.fits)

    def _most_rows(self) -> int | None:
        return self.rows if self.fits is None else None

    def _run(
        self, path: Path, batch: list[Row], removals: Sequence[Removal], part: list[int]
    ) -> Iterator[tuple[list[int], list[int], Grades]]:
        """Measure a batch under a part of the removals; out of device memory, do it in halves.

        Yields (requests, numbers of removals, their grades). Rows are halved first, and batches to come are no larger.
        """
        tokens = batch[0].length * len(batch)
        fits = self.fits is None or tokens <= self.fits or len(batch) == 1
        if fits:
            try:
                members, grades = path.run(batch, [removals[number] for number in part])
            except (RuntimeError, MemoryError) as error:
                if not _out_of_memory(error):
                    raise
                if len(batch) == len(part) == 1:
                    length, device = batch[0].length, path.subject.device
                    raise ModelError(f"a single row of {length} tokens does not fit on {device}") from error
                fits = False
            else:
                yield members, part, grades
                return
            path.read = None
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        if len(batch) > 1:
            half = len(batch) // 2
            self.fits = min(self.fits or tokens, max(half * batch[0].length, 1))
            yield from self._run(path, batch[:half], removals, part)
            yield from self._run(path, batch[half:], removals, part)
        else:
            half = len(part) // 2
            yield from self._run(path, batch, removals, part[:half])
            yield from self._run(path, batch, removals, part[half:])

    def _count(self, requests: Sequence[Request], removals: Sequence[Removal]) -> None:
        tokens = sum(row.length for row in chains(requests))
        depth = len(self.subject.layers)
        self.account.naive += sum(tokens * (depth - len(removal)) for removal in removals)
        self.account.computed += self.path.work.computed
        self.path.work.computed = 0


def _sections(made: Sequence[list[Row]]) -> Iterator[list[list[Row]]]:
    """Put batches that follow on the same beginning together: what is kept of it serves all of them."""
    for beginning, own in groupby(made, key=lambda batch: batch[0].beginning):
        own = list(own)
        yield from [own] if beginning else [[batch] for batch in own]


def _out_of_memory(error: BaseException) -> bool:
    from accelerate.utils.memory import should_reduce_batch_size

    return isinstance(error, torch.OutOfMemoryError | MemoryError) or should_reduce_batch_size(error)
