"""Sizes and figures as people write and read them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping

from layerprune.errors import UsageError

# Sizes as people write them: ``5GB``, ``500 MB``, decimal as the Hub and disks count.


UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


COUNTS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


def parse_size(text: str, option: str) -> int:
    """Return the bytes that ``text`` means; ``option`` is named in the error."""
    size = int(_amount(text, option, UNITS, "a size; write 5GB or 500MB"))
    if size < 1:
        raise UsageError(f"{option} {text!r} is less than one byte")
    return size


def parse_count(text: str, option: str) -> int:
    """Return the number of parameters that ``text`` means: ``1.2B``, ``110M``, ``110000000``."""
    return round(_amount(text, option, COUNTS, "a number of parameters; write 1.2B or 110M"))


def _amount(text: str, option: str, units: Mapping[str, int], what: str) -> float:
    match = re.fullmatch(r"\s*(\d{1,18}(?:\.\d{1,18})?)\s*([A-Za-z]*)\s*", text)
    if match is None or match[2].upper() not in units:
        short = repr(text) if len(text) <= 40 else f"{text[:20]!r}... ({len(text)} characters)"
        raise UsageError(f"{option} {short} is not {what}")
    return float(match[1]) * units[match[2].upper()]


def rounded_up(size: int) -> str:
    """Return a size with three digits that is no less: ``1.24GB``; ``parse_size`` reads it."""
    for unit, name in ((10**9, "GB"), (10**6, "MB"), (10**3, "KB")):
        if size >= unit:
            step = 10 ** max(len(str(size // unit)) - 3, -2)  # of the unit
            return f"{round(math.ceil(size / unit / step) * step, 2):.15g}{name}"
    return f"{size}B"


def in_words(size: float, byte: str = "B") -> str:
    """Return bytes in decimal units: 269_000_000 is ``269 MB``."""
    for unit, name in ((10**12, "TB"), (10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if size >= 0.9995 * unit:  # what three digits round up to the unit is said in it
            return f"{size / unit:.3g} {name}" if size < 1000 * unit else f"{size / unit:.0f} {name}"
    return f"{size:.0f} {byte}"


# Text from elsewhere (names, paths, what libraries say) in a line for people.


# What moves the cursor or turns the direction of writing, and halves of surrogate pairs, which cannot be printed.
CONTROL = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2028\u2029\u2066-\u2069\ud800-\udfff]"
)
SECRETS = (
    (re.compile(r"\bhf_[A-Za-z0-9]{8,}"), "hf_***"),
    (re.compile(r"(?<=://)[^/@\s]+(?=@)"), "***"),
    (re.compile(r"(?i)(?<=[?&])((?:[\w-]*token|[\w-]*signature|[\w-]*credential|api_?key|key)=)[^&\s'\"]+"), r"\1***"),
)
LONGEST_LINE = 800  # characters of a message
LONGEST_VALUE = 60


def short(value: object) -> str:
    """Return a value as Python writes it, in at most 60 characters: for a message that shows what was seen."""
    if isinstance(value, int) and abs(value) >= 10**30:
        return f"a number of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= LONGEST_VALUE else f"{text[: LONGEST_VALUE - 3]}..."


def printable(text: str, *, lines: bool = False) -> str:
    """Return text that is safe to print: no character that moves the cursor, no token, no line of more than 800.

    ``lines``: the text may have several, which are kept; else the end of a line is written as ``\\n``, too.
    """
    for pattern, shown in SECRETS:
        text = pattern.sub(shown, text)
    parts = text.split("\n") if lines else [text.replace("\n", "\\n")]
    return "\n".join(_cut(CONTROL.sub(lambda match: ascii(match[0])[1:-1], part)) for part in parts)


def _cut(line: str) -> str:
    if len(line) <= LONGEST_LINE:
        return line
    left = len(line) - 3 * LONGEST_LINE // 4
    return f"{line[: LONGEST_LINE // 2]}... ({left:,} more characters) ...{line[-LONGEST_LINE // 4 :]}"


# Figures as people read them; every report spells them alike.


MINUS = "\N{MINUS SIGN}"


def signed(value: float, digits: int = 1) -> str:
    """Return a number with its sign: ``+1.2``, ``−0.3``, and ``0.0`` without one."""
    text = f"{abs(value):.{digits}f}"
    if float(text) == 0:
        return text
    return f"{MINUS if value < 0 else '+'}{text}"


def points(difference: float) -> str:
    """Return a difference of accuracies in points: 0.012 is ``+1.2``."""
    return signed(100 * difference)


def points_interval(interval: tuple[float, float]) -> str:
    """Return an interval of differences in points: ``−2.6 … −1.0``."""
    return f"{points(interval[0])} … {points(interval[1])}"


def percent(share: float, digits: int = 1) -> str:
    """Return a share in per cent: 0.512 is ``51.2 %``."""
    return f"{100 * share:.{digits}f} %"


def percent_change(share: float) -> str:
    """Return a relative change in per cent with its sign: -0.2 is ``−20.0 %``."""
    return f"{signed(100 * share)} %"


def accuracy(value: float) -> str:
    """Return an accuracy in points: 0.512 is ``51.2``."""
    return f"{100 * value:.1f}"


def p_value(p: float) -> str:
    """Return a p-value that never reads as zero."""
    if p >= 0.9995:
        return "1"
    return f"{p:.3f}" if p >= 0.001 else f"{p:.0e}"


def size(count: float) -> str:
    """Return bytes for a report, which spells the unit out: ``269 MB``, ``512 bytes``."""
    return in_words(count, "bytes")


def number(count: float) -> str:
    """Return a large count shortly: 134_515_008 is ``134.5 M``."""
    for unit, scale in (("T", 1e12), ("B", 1e9), ("M", 1e6)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count:,}"


def units(removal: Iterable[int]) -> str:
    """Return removed layers in words: ``layers 3, 5 and 11``."""
    gone = [str(layer) for layer in removal]
    return f"{'layer' if len(gone) == 1 else 'layers'} {listed(gone)}" if gone else "nothing"


def listed(words: Iterable[str]) -> str:
    """Join words as a sentence does: ``a, b and c``."""
    *most, last = [*words] or [""]
    return f"{', '.join(most)} and {last}" if most else last


def percent_interval(interval: tuple[float, float]) -> str:
    """Return an interval of shares in per cent: ``55.1 … 69.0 %``."""
    return f"{100 * interval[0]:.1f} … {percent(interval[1])}"
