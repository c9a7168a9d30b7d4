"""The goal that the options of ``plan`` amount to."""

from __future__ import annotations

import math
from collections.abc import Callable

from layerprune.config import CERTIFY_LIMIT, PlanConfig
from layerprune.errors import UsageError
from layerprune.planners import check_drop
from layerprune.planning.certifying import MaxDrop
from layerprune.planning.farthest import Farthest
from layerprune.planning.goals import Drop, Goal
from layerprune.planning.speeding import Faster
from layerprune.planning.targets import Smaller
from layerprune.sizes import parse_count, parse_size

CONFIDENCE = "95%"


def goal_of(config: PlanConfig) -> Goal:
    """Return the one goal among the options; none, several, or one that makes no sense is a ``UsageError``."""
    confidence, certify_limit, up_to = config.confidence, config.certify_limit, config.up_to
    makers: dict[str, tuple[str | None, Callable[[str], Goal]]] = {
        "--drop": (config.drop, _drop),
        "--target-params": (config.target_params, _params),
        "--target-bytes": (config.target_bytes, _bytes),
        "--target-speedup": (config.target_speedup, _speedup),
        "--max-drop": (config.max_drop, lambda text: _max_drop(text, confidence or CONFIDENCE, certify_limit, up_to)),
        "--front": ("yes" if config.front else None, lambda _: _front(up_to)),
    }
    given = {option: text for option, (text, _) in makers.items() if text is not None}
    if len(given) != 1:
        said = f"{' and '.join(given)} are given" if given else "nothing says how far to go"
        raise UsageError(f"{said}; give one of {', '.join(makers)}")
    option, text = next(iter(given.items()))
    belongings = {"--confidence": confidence, "--certify-limit": certify_limit, "--up-to": up_to}
    for stray in (name for name, value in belongings.items() if value is not None):
        owners = ("--max-drop", "--front") if stray == "--up-to" else ("--max-drop",)
        if option not in owners:
            raise UsageError(f"{stray} belongs to {' or '.join(owners)}, and {option} is given")
    return makers[option][1](text)


def _drop(text: str) -> Goal:
    check_drop(text)
    return Drop(text)


def _params(text: str) -> Goal:
    return Smaller("parameters", parse_count(text, "--target-params"), f"--target-params {text}")


def _bytes(text: str) -> Goal:
    return Smaller("bytes", parse_size(text, "--target-bytes"), f"--target-bytes {text}")


def _speedup(text: str) -> Goal:
    try:
        wanted = float(text.strip().removesuffix("x"))
    except ValueError:
        wanted = math.nan
    if not 1 < wanted < math.inf:
        raise UsageError(f"--target-speedup {text!r} is not a speed-up; write 1.3x")
    return Faster(wanted, f"--target-speedup {text}")


def _max_drop(text: str, confidence: str, items: int | None, up_to: str | None) -> Goal:
    limit, sure = _share(text, "--max-drop", "2%"), _share(confidence, "--confidence", CONFIDENCE)
    if sure < 0.5:
        raise UsageError(f"--confidence {confidence!r} is less than a coin has; write {CONFIDENCE}")
    if up_to is not None:
        check_drop(up_to, "--up-to")
    requested = f"--max-drop {text} --confidence {confidence}" + (f" --up-to {up_to}" if up_to else "")
    return MaxDrop(limit, sure, requested, CERTIFY_LIMIT if items is None else items, up_to)


def _front(up_to: str | None) -> Goal:
    if up_to is None:
        return Farthest()
    check_drop(up_to, "--up-to")
    return Farthest(up_to)


def _share(text: str, option: str, example: str) -> float:
    try:
        share = float(text.strip().removesuffix("%")) / 100 if text.strip().endswith("%") else math.nan
    except ValueError:
        share = math.nan
    if not 0 < share < 1:
        raise UsageError(f"{option} {text!r} is not a share between 0% and 100%; write {example}")
    return round(share, 12)  # 2% is 0.02, and not what dividing leaves
