"""The real model of slow tests, and the reasons to skip them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from checkout import EVAL

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not EVAL.is_dir(), reason=f"no benchmarks at {EVAL}; set LAYERPRUNE_EVAL"),
]


@pytest.fixture(scope="module")
def model() -> Path:
    from demo.model import fetch_model

    return Path(os.environ["LAYERPRUNE_MODEL"]) if "LAYERPRUNE_MODEL" in os.environ else fetch_model()
