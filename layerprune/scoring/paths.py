"""The ways to get log-likelihoods out of a model, fastest first. All give the same numbers; the self-test checks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from layerprune.data.items import Request
from layerprune.models.model import LoadedModel
from layerprune.removal import Removal
from layerprune.scoring.prefix_tree import Limit, Row, SharedBeginning, chains, trees, trees_after_beginnings, unlimited
from layerprune.scoring.walk import Tensor, Walk

# The ways to get log-likelihoods out of a model, fastest first. All return the same numbers, or the self-test says so.
#
# beginnings  as trees, and what many questions begin with is read once, its keys and values kept
# trees       a row per prefix tree, with a 4-D mask and explicit positions; one walk for all removals
# chains      a row per distinct input, plain causal attention; one walk for all removals
# plain       a row per distinct input, one ordinary forward per removal with its layers bypassed: the slow, obvious way


# Which layers look back a limited way: none do, all do, or those the config calls "sliding_attention".
Windows = Literal["none", "everywhere", "by kind"]
Groups = Sequence[Sequence[int]]
Grades = tuple[np.ndarray, np.ndarray]  # (removals, requests): sums in nats, how many tokens are greedy


class EvaluationPath(ABC):
    """One way to measure."""

    name: str
    together = True  # the rows of a batch, of whatever length, and all removals run at once

    def __init__(self, loaded: LoadedModel) -> None:
        self.loaded = loaded
        self.walk = Walk(loaded.model, loaded.layers, loaded.held)  # plain forwards only count their work in it
        self.piece = 1  # for how many places logits are computed at once
        self.read: tuple[tuple[int, ...], list[frozenset[int]], SharedBeginning] | None = (
            None  # a beginning that is kept
        )

    def layout(self, requests: Sequence[Request], groups: Groups, most: Limit = unlimited) -> list[Row]:
        """Turn requests into rows; ``groups`` are indices of requests that share a question.

        ``most`` tells how long rows may become by joining groups, given the tokens of the beginning they follow on.
        """
        return chains(requests)

    def masked(self, branches: bool) -> bool:
        """Whether masks and positions are given to the model, not left to it; ``branches``: for rows that are trees."""
        return False

    @abstractmethod
    def run(self, rows: Sequence[Row], removals: Sequence[Removal]) -> tuple[list[int], Grades]:
        """Measure one batch: (indices of the requests in it, their grades in that order)."""


class PlainPath(EvaluationPath):
    """Ordinary forwards of the bypassed model: what the other paths are checked against, and the last resort.

    Rows of one length run together: no padding, no mask, nothing to get wrong.
    """

    name = "plain"
    together = False

    @torch.no_grad()
    def run(self, rows: Sequence[Row], removals: Sequence[Removal]) -> tuple[list[int], Grades]:
        requests = [target.request for row in rows for target in row.targets]
        columns = {request: column for column, request in enumerate(requests)}
        sums = np.zeros((len(removals), len(requests)))
        greedy = np.zeros((len(removals), len(requests)), dtype=np.int64)
        for number, removal in enumerate(removals):
            with self.loaded.without(removal) as model:
                for alike in by_length(rows):
                    ids = torch.from_numpy(np.stack([row.tokens for row in alike])).to(self.loaded.device)
                    logits = model(input_ids=ids, use_cache=False).logits  # (rows, tokens, vocabulary)
                    self.walk.work.computed += ids.numel() * (len(self.loaded.layers) - len(removal))
                    for line, row in zip(logits, alike, strict=True):
                        for target in row.targets:
                            asked = torch.from_numpy(target.tokens).to(line.device)
                            logs = widened(line[torch.from_numpy(target.nodes).to(line.device)]).log_softmax(-1)
                            column = columns[target.request]
                            sums[number, column] = float(logs.gather(1, asked[:, None]).double().sum())
                            greedy[number, column] = int((logs.argmax(-1) == asked).sum())
        return requests, (sums, greedy)


def by_length(rows: Sequence[Row]) -> list[list[Row]]:
    """Return rows in groups of one length, in their order."""
    alike: dict[int, list[Row]] = {}
    for row in rows:
        alike.setdefault(row.length, []).append(row)
    return list(alike.values())


class ChainPath(EvaluationPath):
    """One row per distinct input; padding stands to the right, where causal attention never looks."""

    name = "chains"

    def __init__(self, loaded: LoadedModel) -> None:
        super().__init__(loaded)
        most = CUDA_LOGIT_BYTES if loaded.device.type == "cuda" else LOGIT_BYTES
        self.piece = max(1, most // (4 * loaded.vocabulary))
        few = torch.zeros(1, 2, dtype=torch.long, device=loaded.device)
        self.walk.learn_head(self.walk.learn_outputs({"input_ids": few})[0])

    def run(self, rows: Sequence[Row], removals: Sequence[Removal]) -> tuple[list[int], Grades]:
        self.walk.stage = "inputs", 0
        places = Places(rows, self.loaded.device)
        drops = [frozenset(removal) for removal in removals]
        beginning = self.beginning(rows[0].beginning, drops)
        self.walk.stage = "inputs", 1
        found = self.walk.hidden(self.inputs(rows), drops, places.rows, places.nodes, beginning)
        figures = [graded(self.walk, hidden, places, self.piece) for hidden in found]
        self.walk.stage = "sum", 0
        return places.requests, summed(figures, places)

    def beginning(self, tokens: tuple[int, ...], drops: list[frozenset[int]]) -> SharedBeginning | None:
        """Return what follows on these tokens may look back at; None where there are none."""
        return None

    def inputs(self, rows: Sequence[Row]) -> dict[str, Any]:
        """Return what the model's forward is called with."""
        ids = pad_sequence([torch.from_numpy(row.tokens) for row in rows], batch_first=True)
        return {"input_ids": ids.to(self.loaded.device)}


class TreePath(ChainPath):
    """Every shared token once: prefix trees within a batch, one walk over the layers for all removals."""

    name = "trees"

    def __init__(self, loaded: LoadedModel, windows: Windows = "none") -> None:
        super().__init__(loaded)
        self.windows = windows

    @staticmethod
    def masks(loaded: LoadedModel, longest: int) -> tuple[Windows, ...]:
        """Return the kinds of mask to try: where no row is longer than the model's window they are all one."""
        window = window_of(loaded)
        return ("none",) if window is None or longest <= window else ("by kind", "everywhere")

    def masked(self, branches: bool) -> bool:
        return branches or self.windows != "none"  # ordinary rows go without, where the fastest kernels run

    def layout(self, requests: Sequence[Request], groups: Groups, most: Limit = unlimited) -> list[Row]:
        return trees(requests, groups, most(0))

    def inputs(self, rows: Sequence[Row]) -> dict[str, Any]:
        if not rows[0].beginning and not self.masked(any(row.branches for row in rows)):
            return super().inputs(rows)
        device, dtype = self.loaded.device, self.loaded.dtype
        positions = pad_sequence([torch.from_numpy(row.positions) for row in rows], batch_first=True)
        full = _mask(rows, None, dtype).to(device)
        mask: Any = full
        if self.windows != "none":
            near = _mask(rows, window_of(self.loaded), dtype).to(device)
            mask = near if self.windows == "everywhere" else {"full_attention": full, "sliding_attention": near}
        return {**super().inputs(rows), "attention_mask": mask, "position_ids": positions.to(device)}


class BeginningPath(TreePath):
    """Trees, and what many of them begin with is read once for all batches that follow."""

    name = "beginnings"

    def layout(self, requests: Sequence[Request], groups: Groups, most: Limit = unlimited) -> list[Row]:
        return trees_after_beginnings(requests, groups, most)

    def beginning(self, tokens: tuple[int, ...], drops: list[frozenset[int]]) -> SharedBeginning | None:
        if not tokens:
            return None
        if self.read is None or self.read[:2] != (tokens, drops):
            self.read = None  # two at once would be twice the memory
            beginning, here = SharedBeginning(), torch.zeros(1, dtype=torch.long)
            ids = torch.tensor([tokens], device=self.loaded.device)
            self.walk.hidden({"input_ids": ids}, drops, here, here, beginning)
            beginning.tokens = tokens
            self.read = tokens, drops, beginning
        return self.read[2]


def window_of(loaded: LoadedModel) -> int | None:
    """Return how many tokens back a sliding-window layer looks, itself included; None for a model without."""
    config = loaded.model.config.get_text_config()
    return getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None


def _mask(rows: Sequence[Row], window: int | None, dtype: torch.dtype) -> Tensor:
    """Return what to add to attention scores: 0 where a token may look, the lowest number where it may not.

    (rows, 1, width, beginning + width). A padding token sees itself, or its softmax would divide nothing by nothing.
    """
    before, width = len(rows[0].beginning), max(row.length for row in rows)
    mask = torch.full((len(rows), 1, width, before + width), torch.finfo(dtype).min, dtype=dtype)
    for number, row in enumerate(rows):
        visible = np.concatenate([np.ones((row.length, before), dtype=bool), row.visible()], axis=1)
        if window is not None:
            visible &= row.positions[:, None] - np.concatenate([np.arange(before), row.positions])[None] < window
        mask[number, 0, : row.length, : before + row.length].masked_fill_(torch.from_numpy(visible), 0.0)
    mask[..., before:].diagonal(dim1=-2, dim2=-1).zero_()
    return mask


# Log-likelihoods of answers from last-layer states: the head is computed at answer positions only, in pieces.


# Logits are computed for at most this many bytes (float32) at a time, and for no more than ``--memory`` leaves. On a
# CPU larger pieces are no faster (measured); on a card (not measured) 130 places at a vocabulary of 128k would be a
# whole call of the model for little work.
LOGIT_BYTES, CUDA_LOGIT_BYTES = 64 * 1024**2, 2 * 1024**3
# A CPU passes over so many bytes of them (float32) at a time, which its cache holds: measured on two cores,
# 130 x 128,256 bfloat16, all at once 34 ms, in these parts 15 ms. What --memory counts is all at once.
CACHE_BYTES = 8 * 1024**2


class Places:
    """The distinct places of a batch whose next token is graded, and which answer tokens are graded there.

    What indexes tensors is on the device, brought there once for all removals.
    """

    def __init__(self, rows: Sequence[Row], device: torch.device) -> None:
        targets = [(number, target) for number, row in enumerate(rows) for target in row.targets]
        read_at = [(number, node) for number, target in targets for node in target.nodes.tolist()]
        index = {place: position for position, place in enumerate(dict.fromkeys(read_at))}
        self.requests = [target.request for _, target in targets]
        self.rows = torch.tensor([row for row, _ in index], device=device)
        self.nodes = torch.tensor([node for _, node in index], device=device)
        place = np.array([index[place] for place in read_at])
        order = np.argsort(place, kind="stable")
        self.place = place[order]  # (graded,) which place each answer token is read at, ascending
        owner = np.repeat(np.arange(len(targets)), [len(target.tokens) for _, target in targets])
        self.owner = owner[order]  # (graded,) which of ``requests`` it belongs to
        self.which = torch.from_numpy(self.place).to(device)
        self.asked = torch.from_numpy(np.concatenate([target.tokens for _, target in targets])[order]).to(device)


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
    chosen = wide[which, asked]
    top, first = wide.max(dim=-1)  # of equal logits the first is the greedy one, and torch names the first
    total = wide.sub_(top[:, None]).exp_().sum(dim=-1, dtype=wide.dtype)
    return chosen - top[which] - total.log()[which], first[which] == asked


def graded(walk: Walk, hidden: Tensor, places: Places, piece: int) -> tuple[Tensor, Tensor]:
    """Return log-probabilities and greedy flags of a batch's answer tokens, (graded,) in the order of their places.

    ``hidden`` is (places, hidden), the last layer's output; ``piece``: for how many places logits are computed at once.
    Both stay on the device: nothing here waits for it. Log-probabilities are taken in float32 whatever the dtype.
    """
    walk.stage = "grade", 0
    logs, greedy = [], []
    for start in range(0, len(hidden), piece):
        logits = walk.logits(hidden[start : start + piece])  # (piece, vocabulary)
        stop, step = start + len(logits), len(logits)
        if logits.device.type == "cpu":
            step = max(1, CACHE_BYTES // (4 * logits.shape[-1]))
        for first in range(start, stop, step):
            inside = slice(*np.searchsorted(places.place, [first, min(first + step, stop)]).tolist())
            which, asked = (numbers[inside].to(logits.device) for numbers in (places.which, places.asked))
            found, best = _normalised(logits[first - start : first - start + step], which - first, asked)
            logs.append(found)
            greedy.append(best)
        del logits  # they go before the next ones are made
    return torch.cat(logs), torch.cat(greedy)


def summed(found: Sequence[tuple[Tensor, Tensor]], places: Places) -> Grades:
    """Bring what ``graded`` found for each removal to the host, at once, and add it up by request."""
    logs = torch.stack([logs for logs, _ in found]).cpu().double().numpy()  # (removals, graded)
    greedy = torch.stack([greedy for _, greedy in found]).cpu().numpy()
    sums = np.zeros((len(found), len(places.requests)))
    np.add.at(sums, (slice(None), places.owner), logs)
    counts = np.zeros(sums.shape, dtype=np.int64)
    np.add.at(counts, (slice(None), places.owner), greedy)
    return sums, counts
