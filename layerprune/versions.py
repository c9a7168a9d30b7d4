"""Which tools made a figure."""

from __future__ import annotations

import platform
from importlib.metadata import version

from layerprune import __version__

JUDGING = ("torch", "transformers", "lm_eval", "datasets")  # have a say in every judgement of a removal


def tool_versions(*packages: str) -> dict[str, str]:
    """Return the versions of layerprune, of Python and of ``packages`` (those that judge removals, unless named)."""
    tools = {name: version(name) for name in packages or JUDGING}
    return {"layerprune": __version__, "python": platform.python_version(), **tools}
