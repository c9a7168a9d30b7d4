"""The few model types whose config says more about layers than fields alone can: rules as small functions."""

from __future__ import annotations

from typing import Any

from layerprune.anatomy.sources import Sources


def edits(model_type: str, fields: dict[str, Any], sources: Sources) -> dict[str, Any]:
    """Return further config changes that a type needs."""
    return {}


def limits(model_type: str, config: Any, depth: int) -> dict[str, Any]:
    """Return the constraints of a type as arguments of ``Anatomy``."""
    return {}
