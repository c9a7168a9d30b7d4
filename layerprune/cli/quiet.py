"""Keeps the libraries underneath from talking over our own output."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

VARIABLES = {  # read by the libraries when they are imported
    "TRANSFORMERS_VERBOSITY": "error",
    "DATASETS_VERBOSITY": "error",
    "HF_HUB_VERBOSITY": "error",
    "LMEVAL_LOG_LEVEL": "ERROR",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TQDM_DISABLE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONWARNINGS": "ignore",  # for the processes that export starts
}
LOGGERS = ("transformers", "lm_eval", "datasets", "huggingface_hub", "httpx", "accelerate", "torch")


@contextmanager
def quiet_libraries(quiet: bool) -> Iterator[None]:
    """Silence logs, warnings and progress bars of third parties while the block runs; a user's own settings win."""
    if not quiet:
        yield
        return
    added = {name: value for name, value in VARIABLES.items() if name not in os.environ}
    levels = {name: logging.getLogger(name).level for name in LOGGERS}
    os.environ.update(added)
    for name in LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        for name in added:
            os.environ.pop(name, None)
