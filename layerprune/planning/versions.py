"""Which tools made a figure."""

from __future__ import annotations

import platform
from importlib.metadata import version
from typing import Any

from layerprune import __version__


def tool_versions() -> dict[str, str]:
    """Return the versions of everything that has a say in a figure."""
    names: dict[str, Any] = {name: version(name) for name in ("torch", "transformers", "lm_eval", "datasets")}
    return {"layerprune": __version__, "python": platform.python_version(), **names}
