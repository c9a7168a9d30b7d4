"""A config class asked again: what it makes of other fields than those it was read from."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def reread(kind: type[PretrainedConfig], fields: dict[str, Any]) -> dict[str, Any] | None:
    """Return all fields of a config of class ``kind`` made from ``fields``; None where the class refuses them."""
    with _quiet():
        try:
            return kind.from_dict(_with_infinities(copy.deepcopy(fields))).to_dict()
        except Exception:  # noqa: BLE001  config classes raise what they like, and a refusal is the answer
            return None


def _with_infinities(value: Any) -> Any:
    """Return JSON content with the floats that JSON has not, as transformers reads them from a file."""
    if isinstance(value, dict):
        if value.keys() == {"__float__"}:  # what PretrainedConfig.to_json_string writes for them
            return float(value["__float__"])
        return {key: _with_infinities(entry) for key, entry in value.items()}
    return [_with_infinities(entry) for entry in value] if isinstance(value, list) else value


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the remarks of transformers, which were made when the config was loaded."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        logger.setLevel(level)
