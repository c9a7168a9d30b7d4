"""What ``layerprune verify`` shows."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from layerprune.sizes import in_words

if TYPE_CHECKING:
    from layerprune.auditor.rerun import Repeated
    from layerprune.auditor.verify import Verification


def verified(folder: Path, found: Verification, rerun: bool, digests: bool) -> list[str]:
    """Return every problem on its own line, or one line that all is in order; digests last where asked for."""
    repeated = found.repeated
    problems = [*found.problems, *(repeated.problems if repeated else ())]
    lines = [f"problem: {problem}" for problem in problems]
    if rerun and repeated is None:
        lines.append("no item was asked again: what the documents say does not hold together as it is")
    if problems:
        lines.append(f"{folder} is NOT what its documents say: {len(problems)} problem{'s' * (len(problems) > 1)}")
    else:
        audited = "audited" if found.audited else "not audited yet"
        again = f"; {_again(repeated)}" if repeated else ""
        lines.append(f"{folder} is as it was left: {found.files} files, {in_words(found.bytes)}, {audited}{again}")
    return lines + [f"{name} sha256 {digest}" for name, digest in found.digests.items() if digests]


def _again(repeated: Repeated) -> str:
    asked = 2 * repeated.items
    change = repeated.largest_change
    moved = "" if change is None else f", largest change of a gold answer's probability {change:.2g}"
    left = f", {repeated.unexplained} items left out that only the compared plans can explain"
    said = f"{repeated.items} items asked again, {repeated.same_decisions} of {asked} decisions the same{moved}"
    return said + left * bool(repeated.unexplained)
