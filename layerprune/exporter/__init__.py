"""A plan carried out: the pruned checkpoint streamed from disk to disk, checked, proven, and renamed into place."""

from layerprune.exporter.contents import dry_run
from layerprune.exporter.exporter import export, removal_plan, translated, weigh

__all__ = ["dry_run", "export", "removal_plan", "translated", "weigh"]
