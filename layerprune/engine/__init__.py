"""Log-likelihoods of many removals at once: ``Engine`` measures requests, ``examine`` and ``Examiner`` judge items."""

from layerprune.engine.engine import Account, Engine
from layerprune.engine.exam import examine
from layerprune.engine.examiner import JOURNAL, Examiner

__all__ = ["JOURNAL", "Account", "Engine", "Examiner", "examine"]
