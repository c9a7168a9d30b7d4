"""Names to implementations: built-ins as "module:attribute", third parties by entry points, loaded when asked for."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any

from layerprune import __version__
from layerprune.errors import RegistryError, did_you_mean


@dataclass(frozen=True)
class Entry:
    """One registered name, not yet imported."""

    name: str
    target: str  # "package.module:attribute"
    owner: str  # distribution and version, e.g. "layerprune 0.1.0"

    def load(self) -> Any:
        """Import and return the object; raises ``RegistryError`` naming the owner when that fails."""
        module, _, attribute = self.target.partition(":")
        try:
            return getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            raise RegistryError(
                f"{self.name!r} of {self.owner} cannot be loaded from {self.target}: {error}"
            ) from error


class Registry:
    """All names of one kind ("metric"): built-ins plus the entry points of ``group``."""

    def __init__(self, kind: str, group: str, builtin: Mapping[str, str]) -> None:
        self.kind, self.group, self.builtin = kind, group, dict(builtin)

    def entries(self) -> dict[str, Entry]:
        """Return every entry by name; two owners of one name raise ``RegistryError`` naming both."""
        found = {name: Entry(name, target, f"layerprune {__version__}") for name, target in self.builtin.items()}
        for point in entry_points(group=self.group):
            owner = f"{point.dist.name} {point.dist.version}" if point.dist else "an unnamed distribution"
            entry = Entry(point.name, point.value, owner)
            other = found.get(point.name)
            if other is not None and (other.target, other.owner) != (entry.target, entry.owner):
                raise RegistryError(
                    f"two distributions register the {self.kind} {point.name!r}: "
                    f"{other.owner} and {owner}; uninstall one"
                )
            found[point.name] = entry
        return dict(sorted(found.items()))

    def get(self, name: str) -> Entry:
        """Return one entry; an unknown name raises ``RegistryError`` with the closest known one."""
        entries = self.entries()
        if name not in entries:
            raise RegistryError(
                f"unknown {self.kind} {name!r}.{did_you_mean(name, entries)} Known: {', '.join(entries)}"
            )
        return entries[name]
