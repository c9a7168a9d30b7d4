"""What is taken out of a model: a set of units of the decoder stack, in the base model's own 0-based numbering.

Flatten the stack into its sublayers A0 M0 A1 M1 ... (attention, MLP). A unit is two neighbouring sublayers: ``3`` is
the whole layer 3 (A3 M3), ``3.5`` is the half-layer run M3 A4, which leaves A3 and M4 behind as one ordinary layer.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

from layerprune.errors import UsageError

Unit = int | float  # 3 is a whole layer, 3.5 the half-layer run that starts at the MLP of layer 3


def first_sublayer(unit: Unit) -> int:
    """Return the index in A0 M0 A1 M1 ... of the first of the unit's two sublayers."""
    doubled = 2 * unit
    if unit < 0 or doubled != int(doubled):
        raise UsageError(f"{unit!r} is not a unit; write 3 for layer 3, 3.5 for the half-layer run after its attention")
    return int(doubled)


@dataclass(frozen=True)
class Removal:
    """A frozen set of units, sorted; ``Removal(())`` is the intact model."""

    units: tuple[Unit, ...]

    @classmethod
    def of(cls, *units: Unit) -> Removal:
        """Build a removal from units in any order; overlapping or repeated units raise ``UsageError``."""
        return cls.from_units(units)

    @classmethod
    def from_units(cls, units: Iterable[Unit]) -> Removal:
        tidy = sorted(int(unit) if unit == int(unit) else unit for unit in units)
        seen: set[int] = set()
        for unit in tidy:
            start = first_sublayer(unit)
            if start in seen or start + 1 in seen:
                raise UsageError(f"unit {unit} is named twice or overlaps another unit in {tidy}")
            seen.update((start, start + 1))
        return cls(tuple(tidy))

    @cached_property
    def sublayers(self) -> frozenset[int]:
        """Indices of the removed sublayers in A0 M0 A1 M1 ... ."""
        return frozenset(s for unit in self.units for s in (first_sublayer(unit), first_sublayer(unit) + 1))

    @property
    def is_whole(self) -> bool:
        """Whether every unit is a whole layer."""
        return all(isinstance(unit, int) for unit in self.units)

    @property
    def layers(self) -> tuple[int, ...]:
        """The removed layers' indices; raises ``UsageError`` when a half-layer unit is among them."""
        if not self.is_whole:
            raise UsageError(f"the removal {self} has half-layer units where whole layers are needed")
        return tuple(int(unit) for unit in self.units)

    def kept(self, depth: int) -> tuple[int, ...]:
        """Base indices of the layers that stay, of a stack of ``depth`` layers."""
        gone = set(self.layers)
        if gone and max(gone) >= depth:
            raise UsageError(f"layer {max(gone)} does not exist: the model has layers 0 to {depth - 1}")
        return tuple(layer for layer in range(depth) if layer not in gone)

    def add(self, *units: Unit) -> Removal:
        """Return this removal with more units in it."""
        return Removal.from_units((*self.units, *units))

    def __len__(self) -> int:
        return len(self.units)

    def __iter__(self) -> Iterator[Unit]:
        return iter(self.units)

    def __contains__(self, unit: object) -> bool:
        return unit in self.units

    def __str__(self) -> str:
        return "{" + ", ".join(str(unit) for unit in self.units) + "}"
