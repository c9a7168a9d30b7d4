"""Before a fast path is trusted with a model, it must give what plain forwards give, on the user's own requests."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch

from layerprune.engine.paths import PlainPath, TreePath
from layerprune.engine.trees import tree_size
from layerprune.errors import LayerpruneError
from layerprune.removal import Removal
from layerprune.subject import Subject
from layerprune.tasks.items import Request

# Allowed difference of a log-likelihood, in nats per graded token. float32: rounding alone gives 1e-5 (measured on
# SmolLM2-135M). Half precision: the same forward in another batch shape moves a token by several hundredths; a wrong
# mask or position moves most tokens by more than a nat.
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-8, torch.bfloat16: 0.15, torch.float16: 0.02}


def disagreement(
    kind: type[TreePath], subject: Subject, requests: Sequence[Request], groups: Sequence[Sequence[int]]
) -> str | None:
    """Return None when the path agrees with plain forwards, else what went wrong in words."""
    chosen = _sample(requests, groups)
    few = [requests[index] for group in chosen for index in group]
    where = np.cumsum([0, *(len(group) for group in chosen)])
    own_groups = [list(range(start, stop)) for start, stop in pairwise(where)]
    removals = _removals(subject)
    plain = PlainPath(subject)
    members, (expected, _) = plain.run(plain.layout(few, own_groups), removals)
    wanted = np.empty_like(expected)
    wanted[:, members] = expected
    try:
        path = kind(subject)
        got = np.full_like(wanted, np.nan)
        members, (sums, _) = path.run(path.layout(few, own_groups), removals)
        got[:, members] = sums
    except LayerpruneError:
        raise
    except Exception as error:  # noqa: BLE001  a model's own code may fail in any way on inputs it was not made for
        return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
    graded = np.array([request.scored for request in few])
    worst = float(np.max(np.abs(got - wanted) / graded, initial=0.0))
    if not worst <= TOLERANCE[subject.dtype]:  # NaN fails too
        return f"log-likelihoods differ by {worst:.3g} nats per token from plain forwards"
    return None


def _sample(requests: Sequence[Request], groups: Sequence[Sequence[int]], count: int = 4) -> list[list[int]]:
    """Return the longest group (masks with a window show there), the shortest, and some in between."""
    ordered = sorted(groups, key=lambda group: tree_size(requests[i].tokens[:-1] for i in group))
    picks = sorted({round(i * (len(ordered) - 1) / max(1, count - 1)) for i in range(count)})
    return [list(ordered[pick]) for pick in picks]


def _removals(subject: Subject) -> list[Removal]:
    """Return the intact model and removals at the start, in the middle, at the end, and of several layers."""
    depth = len(subject.layers)
    sets = [(), (0,), (depth // 2,), (depth - 1,), (depth // 3, depth - 1)]
    return [Removal.from_units(units) for units in dict.fromkeys(sets) if len(set(units)) < depth]
