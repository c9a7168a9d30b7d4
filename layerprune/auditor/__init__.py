"""What an exported checkpoint lost beside its base, on items no earlier step has seen."""

from layerprune.auditor.auditor import audit

__all__ = ["audit"]
