"""A plan carried out: the pruned checkpoint streamed from disk to disk, checked, proven, and renamed into place."""

from layerprune.exporter.blueprint import rehearse
from layerprune.exporter.exporting import export, removal_plan
from layerprune.exporter.weighing import weigh

__all__ = ["export", "rehearse", "removal_plan", "weigh"]
