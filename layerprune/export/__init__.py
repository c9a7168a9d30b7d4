"""A plan carried out: the pruned checkpoint streamed from disk to disk, checked, proven, and renamed into place."""

from layerprune.export.blueprint import rehearse
from layerprune.export.exporting import export, removal_plan
from layerprune.export.weighing import weigh

__all__ = ["export", "rehearse", "removal_plan", "weigh"]
