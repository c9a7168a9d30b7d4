"""Before a fast path is trusted with a model, it must give what plain forwards give, on the user's own requests.

In float32 that is one comparison. In half precision rounding would hide a path that is wrong in structure, so there the
structure is tested first, in float64 on a tiny model with the same layers (``twin``), and the real model then shows
whether rounding stays within bounds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise

import numpy as np
import torch

from layerprune.engine.kinds import kinds
from layerprune.engine.paths import BeginningPath, ChainPath, Path, PlainPath, TreePath, Windows, window_of
from layerprune.engine.trees import BEGINNING_GROUPS, batches, beginnings, tree_size
from layerprune.engine.twin import NoTwin, renamed, twin_of
from layerprune.errors import LayerpruneError
from layerprune.removal import Removal
from layerprune.subject import Subject
from layerprune.tasks.items import Request

# Largest difference of a log-likelihood from a plain forward, in nats per graded token. In float32 rounding alone gives
# 3e-5 (measured on SmolLM2-135M, five removals), a wrong mask or position a thousand times that and more. In float64 on
# tiny random models right paths differ by up to 5e-7, where a model computes in float32 on its way (mamba, gemma2), and
# wrong ones by 2e-3 and more (measured on the types of docs/notes/2026-11-28-engine.md).
EXACT = {torch.float64: 1e-5, torch.float32: 1e-3}
# In half precision the same forward in another batch shape moves single answers by up to 0.4 and the median by 0.01 to
# 0.07 (measured, bfloat16, layer 0 removed the worst), so means are compared: chains, which have no mask or position to
# get wrong, with a fixed limit, and what they show as noise is the limit for trees.
HALF_MEAN = 0.1
HALF_NOISE = 2.0  # times the chains' mean difference ...
HALF_FLOOR = 0.01  # ... plus this

Kind = Callable[[Subject], Path]


# Measures requests along a path: (path, requests, groups, removals) to (removals, requests) nats.
Measure = Callable[[Path, Sequence[Request], Sequence[Sequence[int]], Sequence[Removal]], np.ndarray]


def at_once(
    path: Path, requests: Sequence[Request], groups: Sequence[Sequence[int]], removals: Sequence[Removal]
) -> np.ndarray:
    """Measure in one batch for each beginning, whatever memory that takes."""
    found = np.full((len(removals), len(requests)), np.nan)
    rows = path.layout(requests, groups)
    for batch in batches(rows, budget=len(rows) * max(row.length for row in rows)):
        members, (sums, _) = path.run(batch, removals)
        found[:, members] = sums
    return found


def choose_path(
    subject: Subject, requests: Sequence[Request], groups: Sequence[Sequence[int]], measure: Measure
) -> tuple[Path, list[str]]:
    """Return the fastest path that is right for this model on a sample of the requests, and why faster ones are not.

    ``measure`` keeps to the memory. Raises ``UsageError`` where that is too little for plain forwards, ``ModelError``
    where the device has no room for a single one.
    """
    trial = Trial.of(subject, requests, groups, measure)
    if subject.dtype not in EXACT:
        try:
            trial = replace(trial, structure=trial.on_twin())
        except NoTwin as error:
            said = f"{error}; in {subject.dtype} no other test is sharp enough, in --dtype float32 there is one"
            return PlainPath(subject), [f"trees and chains: {said}"]
    return trial.choose()


@dataclass(frozen=True)
class Tried:
    """A path that ran, and |difference| from plain forwards in nats per graded token, (removals, requests)."""

    path: Path
    differences: np.ndarray


@dataclass(frozen=True)
class Trial:
    """A few of the user's requests, and what plain forwards say of them under several removals."""

    subject: Subject
    requests: list[Request]
    groups: list[list[int]]
    removals: list[Removal]
    measure: Measure
    expected: np.ndarray  # (removals, requests) nats
    structure: Trial | None = None  # the same asked of a tiny twin in float64; None: the comparison here is exact

    @classmethod
    def of(
        cls,
        subject: Subject,
        requests: Sequence[Request],
        groups: Sequence[Sequence[int]],
        measure: Measure | None = None,
    ) -> Trial:
        """Ask the plain path about a sample of the groups."""
        chosen = _sample(requests, groups)
        few = [requests[index] for group in chosen for index in group]
        where = np.cumsum([0, *(len(group) for group in chosen)])
        own = [list(range(start, stop)) for start, stop in pairwise(where.tolist())]
        return cls(subject, few, own, _removals(subject), measure or at_once, np.empty(0))._begun()

    def _begun(self) -> Trial:
        return replace(self, expected=self._ask(PlainPath(self.subject)))

    def on_twin(self) -> Trial:
        """Ask the same of a tiny model in float64; raises ``NoTwin`` where there is none, or it cannot run."""
        twin = twin_of(self.subject)
        try:
            return replace(self, subject=twin, requests=renamed(self.requests))._begun()
        except LayerpruneError:  # too little memory is no property of the model
            raise
        except Exception as error:  # modelling code that casts to float32 on its way, or wants sizes of its own
            raise NoTwin(f"a tiny model of this config does not run: {_in_short(error)}") from error

    def choose(self) -> tuple[Path, list[str]]:
        """Return the fastest path that agrees, and why faster ones were not taken."""
        chains = self._tried(ChainPath)
        reason = chains if isinstance(chains, str) else self._excess(chains.differences, HALF_MEAN)
        if isinstance(chains, str) or reason is not None:
            return PlainPath(self.subject), [f"trees and chains: {reason}"]
        limit = HALF_NOISE * float(chains.differences.mean()) + HALF_FLOOR
        reasons: dict[str, None] = {}
        for kind in [BeginningPath, TreePath] if self._has_beginnings() else [TreePath]:
            wrong, failed = list[str](), list[str]()  # one of the windows fits: the others are no fault of the model
            for windows in self._windows():
                trees = self._tried(partial(kind, windows=windows))
                if isinstance(trees, str):
                    failed.append(trees)
                elif (reason := self._excess(trees.differences, limit)) is not None:
                    wrong.append(reason)
                else:
                    return trees.path, list(reasons)
            reasons[f"{kind.name}: {(wrong or failed)[-1]}"] = None
        return chains.path, list(reasons)

    def fault(self, kind: Kind) -> str | None:
        """Return what is wrong with a path where comparison is exact; None: nothing."""
        tried = self._tried(kind)
        return tried if isinstance(tried, str) else self._excess(tried.differences, 0.0)

    def _has_beginnings(self) -> bool:
        return any(shared for shared, _ in beginnings(self.requests, self.groups))

    def _windows(self) -> tuple[Windows, ...]:
        """Return the kinds of mask to try: where no request is longer than the model's window they are all one."""
        window = window_of(self.subject)
        if window is None or max(len(request.tokens) - 1 for request in self.requests) <= window:
            return ("none",)
        return ("by kind", "everywhere")

    def _tried(self, kind: Kind) -> Tried | str:
        """Return a path and how far it is from plain forwards, or why it cannot be right, in words."""
        if self.structure is not None and (fault := self.structure.fault(kind)) is not None:
            return f"on a tiny model of this config in float64, {fault}"
        try:
            path = kind(self.subject)
            found = self._ask(path)
        except Exception as error:  # noqa: BLE001  a model's own code may fail in any way on inputs it was not made for
            return f"the model's code does not take such inputs ({_in_short(error)})"
        overflow = ~np.isfinite(found) & ~np.isfinite(self.expected)  # a removal may make both so: that is agreement
        with np.errstate(invalid="ignore"):
            apart = np.where(overflow, 0.0, np.abs(found - self.expected))
        return Tried(path, apart / np.array([request.scored for request in self.requests]))

    def _excess(self, differences: np.ndarray, half_limit: float) -> str | None:
        exact = EXACT.get(self.subject.dtype)
        seen, limit = (differences.max(), exact) if exact is not None else (differences.mean(), half_limit)
        if seen <= limit:  # NaN is not
            return None
        return f"log-likelihoods differ by {seen:.2g} nats per token from plain forwards (limit {limit:.2g})"

    def _ask(self, path: Path) -> np.ndarray:
        return self.measure(path, self.requests, self.groups, self.removals)


def _sample(requests: Sequence[Request], groups: Sequence[Sequence[int]], count: int = 4) -> list[list[int]]:
    """Return the largest group, the smallest, some between, that of the longest request, and some that begin alike.

    A mask with a window shows in long requests, and a large group may be one of many short ones.
    """
    ordered = sorted(groups, key=lambda group: tree_size(requests[i].tokens[:-1] for i in group))
    picks = sorted({round(i * (len(ordered) - 1) / max(1, count - 1)) for i in range(count)})
    chosen = [list(ordered[pick]) for pick in picks]
    longest = list(max(groups, key=lambda group: max(len(requests[i].tokens) for i in group)))
    shared, alike = max(beginnings(requests, groups), key=lambda pair: pair[0])
    more = [longest, *(alike[:BEGINNING_GROUPS] if shared else [])]
    return chosen + [group for number, group in enumerate(more) if group not in (*chosen, *more[:number])]


def _removals(subject: Subject) -> list[Removal]:
    """Return the intact model and removals at the start, in the middle, at the end, of several layers, of each kind."""
    depth = len(subject.layers)
    sets = [(), (0,), (depth // 2,), (depth - 1,), (depth // 3, depth - 1)]
    removable = [layer for layer in range(depth) if layer not in subject.anatomy.must_keep]
    like = kinds(subject)
    sets += [(layer,) for layer in sorted({like[layer]: layer for layer in removable}.values())]  # the last of each
    return [Removal.from_layers(set(units)) for units in dict.fromkeys(sets) if len(set(units)) < depth]


def _in_short(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
