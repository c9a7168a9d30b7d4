"""Where a checkpoint's layers come from: each is matched to a layer of the base by its weights, and the rest compared.

Read are headers and byte ranges of the files, a chunk at a time; neither torch nor transformers is needed.
"""

from layerprune.lineage.lineage import LayerMatch, Lineage, OutsideMatch
from layerprune.lineage.matching import trace

__all__ = ["LayerMatch", "Lineage", "OutsideMatch", "trace"]
