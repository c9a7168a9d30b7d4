"""Where this checkout's folders are, whatever folder a test stands in."""

import os
from pathlib import Path

ROOT = Path(__file__).parents[2]
SUPPORT = ROOT / "tests" / "support"
BENCHMARKS = ROOT / "benchmarks"
EVAL = Path(os.environ.get("LAYERPRUNE_EVAL", ROOT / ".." / "shared" / "eval")).resolve()
