"""Ridge regression from sums alone: rows come and go, what is kept does not grow with them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

Tensor = torch.Tensor


@dataclass
class Sums:
    """The normal equations of ``rows @ map = targets``, all in float64."""

    gram: Tensor  # (features, features) sum of x x^T
    cross: Tensor  # (features, outputs) sum of x r^T
    square: float = 0.0  # sum of |r|^2
    rows: int = 0

    @classmethod
    def of(cls, features: int, outputs: int, device: torch.device | str = "cpu") -> Sums:
        """Return empty sums."""
        gram = torch.zeros(features, features, dtype=torch.float64, device=device)
        return cls(gram, torch.zeros(features, outputs, dtype=torch.float64, device=device))

    def add(self, rows: Tensor, targets: Tensor) -> None:
        """Take rows, (rows, features), and targets, (rows, outputs).

        Products within one call are in float32 (float64 for float64 rows); sums over calls are in float64.
        """
        wide = torch.float64 if rows.dtype == torch.float64 else torch.float32
        x, r = rows.to(wide), targets.to(wide)
        self.gram += x.T @ x
        self.cross += x.T @ r
        self.square += float(r.double().square().sum())
        self.rows += len(x)

    def error(self, found: Tensor) -> float:
        """Return the mean squared distance from the targets, per row, of a map (features, outputs)."""
        fitted = (found * (self.gram @ found)).sum() - 2 * (found * self.cross).sum()
        return (self.square + float(fitted)) / self.rows


def solve(sums: Sums, ridges: Sequence[float]) -> list[Tensor]:
    """Return the map that minimises ``|rows @ map - targets|^2 + ridge * mean(diag gram) * |map|^2`` for each ridge.

    One eigendecomposition serves them all. A ridge of 0 gives the least-norm solution.
    """
    values, vectors = torch.linalg.eigh(sums.gram)
    scale = float(sums.gram.diagonal().mean())
    turned = vectors.T @ sums.cross
    floor = float(values[-1]) * len(values) * torch.finfo(torch.float64).eps  # below: rounding, not a direction
    found = []
    for ridge in ridges:
        inverse = torch.where(values > floor, 1 / (values.clamp_min(floor) + ridge * scale), 0.0)
        found.append(vectors @ (inverse[:, None] * turned))
    return found


def best(sums: Sums, heldout: Sums, ridges: Sequence[float]) -> tuple[float, Tensor]:
    """Return the ridge whose map is closest to the targets on rows it was not fitted to, and that map."""
    maps = solve(sums, ridges)
    errors = [heldout.error(found) for found in maps]
    chosen = errors.index(min(errors))
    return ridges[chosen], maps[chosen]
