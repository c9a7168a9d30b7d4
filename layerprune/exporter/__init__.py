"""A plan carried out: the pruned checkpoint streamed from disk to disk, checked, proven, and renamed into place."""

from layerprune.exporter.exporter import export, removal_plan, weigh
from layerprune.exporter.pruned_config import rehearse

__all__ = ["export", "rehearse", "removal_plan", "weigh"]
