"""Text as full windows of token ids: packed, so that there is no padding, with a mask of the tokens that count."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from layerprune.errors import UsageError

IGNORED = -100  # the label that transformers and torch leave out of a loss


@dataclass(frozen=True)
class Passage:
    """One document as token ids; ``counted`` says of each token whether predicting it is part of the loss."""

    ids: tuple[int, ...]
    counted: tuple[bool, ...]

    @classmethod
    def of_text(cls, ids: Iterable[int], head: int | None) -> Passage:
        """Return a plain text, all of it counted but the token that stands before it, where there is one."""
        before, ids = () if head is None else (head,), tuple(ids)
        return cls((*before, *ids), (False,) * len(before) + (True,) * len(ids))


@dataclass(frozen=True)
class Windows:
    """Windows of equal length; every place holds a token of the text."""

    ids: NDArray[np.int64]  # (windows, tokens)
    counted: NDArray[np.bool_]  # (windows, tokens)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def window(self) -> int:
        """Tokens of a window."""
        return int(self.ids.shape[1])

    @property
    def tokens(self) -> int:
        """Tokens of all windows together."""
        return int(self.ids.size)

    @property
    def labels(self) -> NDArray[np.int64]:
        """Token ids as transformers takes labels (unshifted), IGNORED where the loss does not count."""
        return np.where(self.counted, self.ids, IGNORED)

    def first(self, count: int) -> Windows:
        """Return at most ``count`` windows from the beginning."""
        return Windows(self.ids[:count], self.counted[:count])

    def spread(self, count: int) -> Windows:
        """Return at most ``count`` windows, evenly spread from the first to the last."""
        chosen = np.unique(np.linspace(0, len(self) - 1, min(count, len(self))).round().astype(int))
        return Windows(self.ids[chosen], self.counted[chosen])


def pack(passages: Iterable[Passage], window: int) -> Windows:
    """Join passages and cut full windows; what is left over at the end is dropped.

    Windows in which nothing counts are left out.
    """
    ids: list[int] = []
    counted: list[bool] = []
    for passage in passages:
        ids.extend(passage.ids)
        counted.extend(passage.counted)
    whole = len(ids) // window * window
    found = Windows(
        np.array(ids[:whole], dtype=np.int64).reshape(-1, window),
        np.array(counted[:whole], dtype=bool).reshape(-1, window),
    )
    keep = found.counted[:, 1:].any(axis=1)  # the first token of a window is predicted from nothing
    return Windows(found.ids[keep], found.counted[keep])


def check_enough(windows: Windows, what: str, tokens: int) -> None:
    """Raise ``UsageError`` when a text does not fill one window."""
    if not len(windows):
        raise UsageError(f"{what} has {tokens} tokens, not one full window; give more text or a smaller window")
