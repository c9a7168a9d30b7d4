"""What every test stands on: no network, and none of the user's caches."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import pytest

from rooms import TESTS, Refusal, is_pure

# Set before anything imports datasets, huggingface_hub or transformers, which read them once. `datasets` keys its
# cache of a local folder by file names alone: a test that found yesterday's items there would test nothing.
_CACHE = Path(tempfile.mkdtemp(prefix="layerprune-tests-"))
os.environ["HF_DATASETS_CACHE"] = str(_CACHE / "datasets")
os.environ["HF_MODULES_CACHE"] = str(_CACHE / "modules")  # models' own code
os.environ["LAYERPRUNE_CACHE"] = str(_CACHE / "layerprune")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TQDM_DISABLE"] = "1"  # or a failing test prints pages of other libraries' progress bars


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--pure",
        action="store_true",
        help="only the tests of the pure rooms of docs/ARCHITECTURE.md; importing torch, transformers, ... is an error",
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--pure"):
        Refusal().install()


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave out what is not pure before it is imported, if asked; None leaves the decision to pytest."""
    if config.getoption("--pure") and collection_path.is_file() and collection_path.is_relative_to(TESTS):
        return None if is_pure(collection_path) else True
    return None


def pytest_unconfigure() -> None:
    shutil.rmtree(_CACHE, ignore_errors=True)
