"""layerprune removes decoder layers from Hugging Face language models and proves what that cost."""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"
VERBS = ("inspect", "score", "plan", "export", "heal", "audit", "verify", "card", "push", "study", "prune")
__all__ = ["VERBS", "__version__", *VERBS]


def __getattr__(name: str) -> Any:
    """Find a verb of the API when it is first asked for: importing layerprune loads nothing heavy."""
    if name not in VERBS:
        raise AttributeError(f"module 'layerprune' has no attribute {name!r}")
    from layerprune import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return sorted(__all__)
