"""Which tools made a figure."""

from __future__ import annotations

import inspect
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

from layerprune import __version__

JUDGING = ("torch", "transformers", "lm_eval", "datasets")  # have a say in every judgement of a removal


def tool_versions(*packages: str) -> dict[str, str]:
    """Return the versions of layerprune, of Python and of ``packages`` (those that judge removals, unless named)."""
    tools = {name: version(name) for name in packages or JUDGING}
    return {"layerprune": __version__, "python": platform.python_version(), **tools}


def source_of(value: Any) -> str | None:
    """Return the name of a function or class and the text of the file it stands in; None for what stands in none.

    The whole file: it may call what stands beside it. What that file imports is not in it.
    """
    try:
        file = inspect.getsourcefile(value)
        return value.__qualname__ + "\n" + Path(file).read_text(errors="replace") if file else None
    except (TypeError, OSError, AttributeError):
        return None
