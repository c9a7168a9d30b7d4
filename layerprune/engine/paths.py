"""The ways to get log-likelihoods out of a model, fastest first. All return the same numbers, or the self-test says so.

beginnings  as trees, and what many questions begin with is read once, its keys and values kept
trees       a row per prefix tree, with a 4-D mask and explicit positions; one walk for all removals
chains      a row per distinct input, plain causal attention; one walk for all removals
plain       a row per distinct input, one ordinary forward per removal with its layers bypassed: the slow, obvious way
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol

import numpy as np
import torch

from layerprune.engine.likelihood import Places, grade, usual_piece, widened
from layerprune.engine.prefix import SharedBeginning
from layerprune.engine.trees import Limit, Row, chains, trees, trees_after_beginnings, unlimited
from layerprune.engine.walk import Stage, Tensor, Walk, Work
from layerprune.removal import Removal
from layerprune.subject import Subject
from layerprune.tasks.items import Request

# Which layers look back a limited way: none do, all do, or those the config calls "sliding_attention".
Windows = Literal["none", "everywhere", "by kind"]
Grades = tuple[np.ndarray, np.ndarray]  # (removals, requests): sums in nats, how many tokens are greedy


class Path(Protocol):
    """One way to measure."""

    name: str
    subject: Subject
    masked: bool  # masks and positions are given to the model, not left to it
    together: bool  # the rows of a batch, and all removals, run at once
    piece: int  # for how many places logits are computed at once
    read: tuple[Any, Any, SharedBeginning] | None  # a beginning that is kept

    def layout(
        self, requests: Sequence[Request], groups: Sequence[Sequence[int]], most: Limit = unlimited
    ) -> list[Row]:
        """Turn requests into rows; ``groups`` are indices of requests that share a question.

        ``most`` tells how long rows may become by joining groups, given the tokens of the beginning they follow on.
        """
        ...

    @property
    def handed_on(self) -> Mapping[int, int]:
        """The bytes that each layer handed on last, for one set of removals."""
        ...

    @property
    def shares(self) -> bool:
        """Whether what a layer holds depends on the layers before it."""
        ...

    @property
    def stage(self) -> Stage:
        """What is being done at the moment."""
        ...

    @property
    def work(self) -> Work:
        """What has been computed so far."""
        ...

    def run(self, rows: Sequence[Row], removals: Sequence[Removal]) -> tuple[list[int], Grades]:
        """Measure one batch: (indices of the requests in it, their grades in that order)."""
        ...


class TreePath:
    """Every shared token once: prefix trees within a batch, one walk over the layers for all removals."""

    name = "trees"
    masked = True
    together = True

    def __init__(self, subject: Subject, windows: Windows = "none") -> None:
        self.subject, self.windows = subject, windows
        self.piece = usual_piece(subject.vocabulary)
        self.read: tuple[tuple[int, ...], list[frozenset[int]], SharedBeginning] | None = None
        self.walk = Walk(subject.model, subject.layers)
        self.walk.learn_outputs({"input_ids": torch.zeros(1, 2, dtype=torch.long, device=subject.device)})

    @property
    def handed_on(self) -> Mapping[int, int]:
        return self.walk.handed_on

    @property
    def shares(self) -> bool:
        return self.walk.shares

    @property
    def stage(self) -> Stage:
        return self.walk.stage

    @property
    def work(self) -> Work:
        return self.walk.work

    def layout(
        self, requests: Sequence[Request], groups: Sequence[Sequence[int]], most: Limit = unlimited
    ) -> list[Row]:
        return trees(requests, groups, most(0))

    def run(self, rows: Sequence[Row], removals: Sequence[Removal]) -> tuple[list[int], Grades]:
        self.walk.stage = "inputs", 0
        places = Places(rows)
        drops = [frozenset(removal) for removal in removals]
        beginning = self._read(rows[0].beginning, drops)
        self.walk.stage = "inputs", 1
        found = self.walk.hidden(self._inputs(rows), drops, places.rows, places.nodes, beginning)
        graded = [grade(self.walk, hidden, places, self.piece) for hidden in found]
        return places.requests, (np.stack([sums for sums, _ in graded]), np.stack([greedy for _, greedy in graded]))

    def _read(self, tokens: tuple[int, ...], drops: list[frozenset[int]]) -> SharedBeginning | None:
        """Return what follows on these tokens may look back at; None where there are none."""
        return None

    def _inputs(self, rows: Sequence[Row]) -> dict[str, Any]:
        device, dtype = self.subject.device, self.subject.dtype
        width = max(row.length for row in rows)
        positions = torch.zeros(len(rows), width, dtype=torch.long)
        for number, row in enumerate(rows):
            positions[number, : row.length] = torch.from_numpy(row.positions)
        full = _mask(rows, width, None, dtype).to(device)
        mask: Any = full
        if self.windows != "none":
            near = _mask(rows, width, window_of(self.subject), dtype).to(device)
            mask = near if self.windows == "everywhere" else {"full_attention": full, "sliding_attention": near}
        return {
            "input_ids": _ids(rows, width).to(device), "attention_mask": mask, "position_ids": positions.to(device)
        }  # fmt: skip


def window_of(subject: Subject) -> int | None:
    """Return how many tokens back a sliding-window layer looks, itself included; None for a model without."""
    config = subject.model.config.get_text_config()
    return getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None


def _mask(rows: Sequence[Row], width: int, window: int | None, dtype: torch.dtype) -> Tensor:
    """Return what to add to attention scores: 0 where a token may look, the lowest number where it may not.

    (rows, 1, width, beginning + width). A padding token sees itself, or its softmax would divide nothing by nothing.
    """
    before = len(rows[0].beginning)
    mask = torch.full((len(rows), 1, width, before + width), torch.finfo(dtype).min, dtype=dtype)
    for number, row in enumerate(rows):
        visible = np.concatenate([np.ones((row.length, before), dtype=bool), row.visible()], axis=1)
        if window is not None:
            visible &= row.positions[:, None] - np.concatenate([np.arange(before), row.positions])[None] < window
        mask[number, 0, : row.length, : before + row.length].masked_fill_(torch.from_numpy(visible), 0.0)
    mask[..., before:].diagonal(dim1=-2, dim2=-1).zero_()
    return mask


class BeginningPath(TreePath):
    """Trees, and what many of them begin with is read once for all batches that follow."""

    name = "beginnings"

    def layout(
        self, requests: Sequence[Request], groups: Sequence[Sequence[int]], most: Limit = unlimited
    ) -> list[Row]:
        return trees_after_beginnings(requests, groups, most)

    def _read(self, tokens: tuple[int, ...], drops: list[frozenset[int]]) -> SharedBeginning | None:
        if not tokens:
            return None
        if self.read is None or self.read[:2] != (tokens, drops):
            self.read = None  # two at once would be twice the memory
            beginning, here = SharedBeginning(), torch.zeros(1, dtype=torch.long)
            ids = torch.tensor([tokens], device=self.subject.device)
            self.walk.hidden({"input_ids": ids}, drops, here, here, beginning)
            beginning.close(tokens)
            self.read = tokens, drops, beginning
        return self.read[2]


class ChainPath(TreePath):
    """One row per distinct input; padding stands to the right, where causal attention never looks."""

    name = "chains"
    masked = False

    def layout(
        self, requests: Sequence[Request], groups: Sequence[Sequence[int]], most: Limit = unlimited
    ) -> list[Row]:
        return chains(requests)

    def _inputs(self, rows: Sequence[Row]) -> dict[str, Any]:
        return {"input_ids": _ids(rows, max(row.length for row in rows)).to(self.subject.device)}


class PlainPath:
    """Ordinary forwards of the bypassed model: what the other paths are checked against, and the last resort."""

    name = "plain"
    masked = False
    together = False
    shares = False
    stage: Stage = ("plain", 0)

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self.piece = 1
        self.handed_on: dict[int, int] = {}
        self.read = None
        self.work = Work()

    def layout(
        self, requests: Sequence[Request], groups: Sequence[Sequence[int]], most: Limit = unlimited
    ) -> list[Row]:
        return chains(requests)

    @torch.no_grad()
    def run(self, rows: Sequence[Row], removals: Sequence[Removal]) -> tuple[list[int], Grades]:
        requests = [target.request for row in rows for target in row.targets]
        sums = np.zeros((len(removals), len(requests)))
        greedy = np.zeros((len(removals), len(requests)), dtype=np.int64)
        for number, removal in enumerate(removals):
            with self.subject.without(removal) as model:
                column = 0
                for row in rows:  # one at a time: no padding, no batch, nothing to get wrong
                    ids = torch.from_numpy(row.tokens)[None].to(self.subject.device)
                    logits = model(input_ids=ids, use_cache=False).logits[0]
                    self.work.computed += row.length * (len(self.subject.layers) - len(removal))
                    for target in row.targets:
                        asked = torch.from_numpy(target.tokens).to(logits.device)
                        lines = widened(logits[torch.from_numpy(target.nodes).to(logits.device)]).log_softmax(-1)
                        sums[number, column] = float(lines.gather(1, asked[:, None]).double().sum())
                        greedy[number, column] = int((lines.argmax(-1) == asked).sum())
                        column += 1
        return requests, (sums, greedy)


def _ids(rows: Sequence[Row], width: int) -> Tensor:
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    for number, row in enumerate(rows):
        ids[number, : row.length] = torch.from_numpy(row.tokens)
    return ids
