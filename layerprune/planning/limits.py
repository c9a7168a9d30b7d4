"""What a search may remove at all, from what was asked and what the architecture allows."""

from __future__ import annotations

from collections.abc import Callable

from layerprune.anatomy import Anatomy
from layerprune.errors import RefusedError, UsageError
from layerprune.removal import Removal, Unit


def keeping_period(anatomy: Anatomy) -> Callable[[Removal], None]:
    """Return ``Anatomy.check`` that refuses what other readers would misread, too."""

    def check(removal: Removal) -> None:
        anatomy.check(removal)
        misread = anatomy.misread(removal)
        if misread:
            raise RefusedError("; ".join(misread))

    return check


def candidate_units(unit: str, anatomy: Anatomy) -> tuple[Unit, ...] | None:
    """Return what may be removed: None for every whole layer, else whole layers and the half-layer runs between."""
    if unit == "layer":
        return None
    if unit != "half":
        raise UsageError(f"unknown unit {unit!r}; use layer or half")
    anatomy.check(Removal.of(0.5))  # says by name what stands in the way
    return tuple(number / 2 if number % 2 else number // 2 for number in range(2 * anatomy.depth - 1))
