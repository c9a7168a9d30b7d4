"""Sizes as people write them: ``5GB``, ``500 MB``, decimal as the Hub and disks count."""

from __future__ import annotations

import math
import re

from layerprune.errors import UsageError

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def parse_size(text: str, option: str) -> int:
    """Return the bytes that ``text`` means; ``option`` is named in the error."""
    match = re.fullmatch(r"\s*(\d{1,18}(?:\.\d{1,18})?)\s*([A-Za-z]*)\s*", text)
    if match is None or match[2].upper() not in UNITS:
        raise UsageError(f"{option} {_short(text)} is not a size; write 5GB or 500MB")
    size = int(float(match[1]) * UNITS[match[2].upper()])
    if size < 1:
        raise UsageError(f"{option} {text!r} is less than one byte")
    return size


def _short(text: str) -> str:
    return repr(text) if len(text) <= 40 else f"{text[:20]!r}... ({len(text)} characters)"


COUNTS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


def parse_count(text: str, option: str) -> int:
    """Return the number of parameters that ``text`` means: ``1.2B``, ``110M``, ``110000000``."""
    match = re.fullmatch(r"\s*(\d{1,18}(?:\.\d{1,18})?)\s*([A-Za-z]?)\s*", text)
    if match is None or match[2].upper() not in COUNTS:
        raise UsageError(f"{option} {_short(text)} is not a number of parameters; write 1.2B or 110M")
    return round(float(match[1]) * COUNTS[match[2].upper()])


def rounded_up(size: int) -> str:
    """Return a size with three digits that is no less: ``1.24GB``; ``parse_size`` reads it."""
    for unit, name in ((10**9, "GB"), (10**6, "MB"), (10**3, "KB")):
        if size >= unit:
            step = 10 ** max(len(str(size // unit)) - 3, -2)  # of the unit
            return f"{round(math.ceil(size / unit / step) * step, 2):.15g}{name}"
    return f"{size}B"


def in_words(size: float) -> str:
    """Return ``269 MB``."""
    for unit, name in ((10**12, "TB"), (10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if size >= unit:
            return f"{size / unit:.3g} {name}" if size < 1000 * unit else f"{size / unit:.0f} {name}"
    return f"{size:.0f} B"
