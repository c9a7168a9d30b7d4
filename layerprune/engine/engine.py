"""The ablation engine: log-likelihoods of many requests under many removals, at a fraction of the price."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

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
        """``memory`` is in bytes, for hidden states, keys and values; weights and a batch's logits come on top."""
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
        self.longest = 0  # tokens of the longest request the self-test has seen; 0: it has not run

    def choose_path(self, requests: Sequence[Request], groups: Sequence[Sequence[int]]) -> None:
        """Compare the fast paths with plain forwards on a few of the requests and keep the first that agrees."""
        self.path, self.remarks = choose_path(self.subject, requests, groups)
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
        """Return (sums of log-probabilities in nats, all tokens greedy), both (removals, requests).

        ``groups`` are the indices of requests that belong to one question; ``done`` hears of finished requests x
        removals.
        """
        if max(len(request.tokens) for request in requests) > self.longest:
            self.choose_path(requests, groups)  # a window may show only in requests longer than those tested
        sums = np.full((len(removals), len(requests)), np.nan)
        greedy = np.zeros((len(removals), len(requests)), dtype=bool)
        rows = self.path.layout(requests, groups)
        for part in self._portions(removals, max(len(row.beginning) for row in rows)):
            chosen = [removals[number] for number in part]
            for members, (s, g) in self._run(rows, chosen):
                sums[np.ix_(part, members)], greedy[np.ix_(part, members)] = s, g
                done(len(members) * len(part))
        self._count(requests, removals)
        return sums, greedy

    def _portions(self, removals: Sequence[Removal], beginning: int) -> list[list[int]]:
        """Split the removals so that a batch of at least 512 tokens of each fits into the state memory.

        Of a beginning, so many tokens long, every removal keeps keys and values in half of the layers on average.
        """
        kept = beginning * self._cache_size() * len(self.subject.layers) // 2
        most = max(1, self._state_bytes() // (512 * self._state_size() + kept))
        numbers = sorted(range(len(removals)), key=lambda number: removals[number].units)  # like stays with like
        return [numbers[start : start + most] for start in range(0, len(numbers), most)]

    def _budget(self) -> int:
        """Return the tokens of a batch: so few that a state for every layer's removal fits.

        Counted for all layers and not for the removals asked now, so that a batch, and with it the last digit of a
        result, is the same whatever else is measured beside it.
        """
        most = self._state_bytes() // (self._state_size() * (len(self.subject.layers) + 1))
        asked = min(self.tokens, max(512, most))
        return asked if self.fits is None else min(asked, self.fits)

    def _state_bytes(self) -> int:
        return int((1 - KEPT_SHARE) * self.memory)

    def _state_size(self) -> int:
        config = self.subject.model.config.get_text_config()
        return int(config.hidden_size) * self.subject.dtype.itemsize

    def _cache_size(self) -> int:
        """Return the bytes of a token's keys and values in one layer."""
        config = self.subject.model.config.get_text_config()
        heads = int(getattr(config, "num_attention_heads", None) or 1)
        shared = int(getattr(config, "num_key_value_heads", None) or heads)
        width = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
        return 2 * shared * width * self.subject.dtype.itemsize

    def _run(self, rows: Sequence[Row], removals: Sequence[Removal]) -> Iterator[tuple[list[int], Grades]]:
        """Measure batch after batch; out of device memory, halve the batches and go on with what is left."""
        pending = list(rows)
        while pending:
            batch = next(batches(pending, self._budget(), self.rows if self.fits is None else None))
            try:
                result = self.path.run(batch, removals)
            except torch.cuda.OutOfMemoryError as error:
                if len(batch) == 1:
                    length, device = batch[0].length, self.subject.device
                    raise ModelError(f"a single row of {length} tokens does not fit on {device}") from error
                torch.cuda.empty_cache()
                self.fits = max(len(batch) // 2 * batch[0].length, 1)
                continue
            taken = {id(row) for row in batch}
            pending = [row for row in pending if id(row) not in taken]
            yield result

    def _count(self, requests: Sequence[Request], removals: Sequence[Removal]) -> None:
        tokens = sum(row.length for row in chains(requests))
        depth = len(self.subject.layers)
        self.account.naive += sum(tokens * (depth - len(removal)) for removal in removals)
        if isinstance(self.path, TreePath):
            self.account.computed += self.path.walk.work.computed
            self.path.walk.work.computed = 0
        elif isinstance(self.path, PlainPath):
            self.account.computed += self.path.computed
            self.path.computed = 0
