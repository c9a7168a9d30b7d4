"""Log-likelihoods of answers from last-layer states: the head is computed at answer positions only, in pieces."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from layerprune.engine.trees import Row
from layerprune.engine.walk import Tensor, Walk

# Logits are computed for at most this many bytes (float32) at a time; measured: larger pieces are no faster.
LOGIT_BYTES = 64 * 1024**2


class Places:
    """The distinct places of a batch whose next token is graded, and which answer tokens are graded there."""

    def __init__(self, rows: Sequence[Row]) -> None:
        index: dict[tuple[int, int], int] = {}
        self.requests: list[int] = []
        place: list[int] = []
        tokens: list[int] = []
        owner: list[int] = []
        for number, row in enumerate(rows):
            for target in row.targets:
                for node, token in zip(target.nodes.tolist(), target.tokens.tolist(), strict=True):
                    place.append(index.setdefault((number, node), len(index)))
                    tokens.append(token)
                    owner.append(len(self.requests))
                self.requests.append(target.request)
        self.rows = torch.tensor([row for row, _ in index])
        self.nodes = torch.tensor([node for _, node in index])
        self.place = np.array(place)  # (graded,) which place each answer token is read at
        self.tokens = np.array(tokens)  # (graded,)
        self.owner = np.array(owner)  # (graded,) which of ``requests`` it belongs to


def widened(logits: Tensor) -> Tensor:
    """Return logits in float32 where they are in half precision; others as they are."""
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


def _normalised(logits: Tensor, which: Tensor, asked: Tensor) -> tuple[Tensor, Tensor]:
    """Return the log-probabilities (float32) of the tokens ``asked`` in the rows ``which``, and whether each is argmax.

    A log_softmax, spelt out to pass over the logits as few times as can be: with the head computed at answer positions
    only, these passes and not its matrix product are most of its price (measured on two cores, 341 x 49,152 bfloat16:
    conversion, log_softmax and argmax 128 ms, this 30 ms, the product 15 ms).
    """
    wide = widened(logits)
    wide = logits.clone() if wide is logits else wide
    chosen, top = wide[which, asked], wide.amax(dim=-1)
    best = chosen == top[which]
    for place in torch.nonzero(best)[:, 0].tolist():  # of equal logits the first is the greedy one
        best[place] = not (wide[which[place], : asked[place]] == top[which[place]]).any()
    total = wide.sub_(top[:, None]).exp_().sum(dim=-1, dtype=wide.dtype)
    return chosen - top[which] - total.log()[which], best


def _graded(walk: Walk, hidden: Tensor, which: np.ndarray, asked: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return ``_normalised`` of one piece; its logits are gone before the next one's are made."""
    logits = walk.logits(hidden)  # (piece, vocabulary)
    rows, tokens = (torch.as_tensor(numbers, device=logits.device) for numbers in (which, asked))
    found, best = _normalised(logits, rows, tokens)
    return found.double().cpu().numpy(), best.cpu().numpy()


def usual_piece(vocabulary: int) -> int:
    """Return for how many places logits are computed at once, where memory does not ask for fewer."""
    return max(1, LOGIT_BYTES // (4 * vocabulary))


def grade(walk: Walk, hidden: Tensor, places: Places, piece: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (sums of log-probabilities in nats, how many tokens are greedy) of a batch's requests, both (requests,).

    ``hidden`` is (places, hidden), the last layer's output; ``piece``: for how many places logits are computed at once.
    Log-probabilities are taken in float32 whatever the model's dtype.
    """
    order = np.argsort(places.place, kind="stable")
    logs = np.empty(len(order), dtype=np.float64)
    greedy = np.empty(len(order), dtype=bool)
    walk.stage = "grade", 0
    sorted_places = places.place[order]
    for start in range(0, len(hidden), piece):
        inside = slice(*np.searchsorted(sorted_places, [start, start + piece]))
        which, asked = sorted_places[inside] - start, places.tokens[order[inside]]
        logs[order[inside]], greedy[order[inside]] = _graded(walk, hidden[start : start + piece], which, asked)
    sums = np.zeros(len(places.requests))
    np.add.at(sums, places.owner, logs)
    counts = np.zeros(len(places.requests), dtype=np.int64)
    np.add.at(counts, places.owner, greedy)
    return sums, counts
