"""``heal``: from a pruned checkpoint to a healed one, with its account."""

from layerprune.heal.step import HealRequest, clear, heal

__all__ = ["HealRequest", "clear", "heal"]
