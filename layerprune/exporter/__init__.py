"""A plan carried out: the pruned checkpoint streamed from disk to disk, checked, proven, and renamed into place."""

from layerprune.exporter.exporter import export, removal_plan, weigh
from layerprune.exporter.pruned_config import dry_run

__all__ = ["dry_run", "export", "removal_plan", "weigh"]
