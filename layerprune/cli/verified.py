"""What ``layerprune verify`` does and shows beside the check itself."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layerprune.errors import UsageError
from layerprune.progress import Progress
from layerprune.sizes import in_words

if TYPE_CHECKING:
    from layerprune.auditor.rerun import Repeated
    from layerprune.auditor.verify import Verification


def check(folder: Path, rerun: int | None, options: Mapping[str, Any]) -> None:
    """Raise ``UsageError`` for a folder that is not there and for options of ``--rerun`` without it."""
    if not folder.is_dir():
        raise UsageError(f"{folder} does not exist; give the folder that layerprune export wrote")
    if rerun is None and options:
        first = next(iter(options)).replace("_", "-")
        raise UsageError(f"--{first} says how items are asked again: give --rerun N, too")


def ask_again(
    folder: Path,
    count: int,
    base: str | None,
    progress: Progress,
    *,
    device: str = "auto",
    trust_remote_code: bool = False,
    **sources: Any,
) -> Repeated:
    """Repeat random items of the audit; ``sources`` are where tasks and their data are."""
    from layerprune.auditor.models import Loading
    from layerprune.auditor.rerun import repeat

    loading = Loading(device=device, trust_remote_code=trust_remote_code)
    return repeat(folder, count, base=base, loading=loading, progress=progress, **sources)


def verified(
    folder: Path, found: Verification, repeated: Repeated | None, rerun: int | None, digests: bool
) -> list[str]:
    """Return every problem on its own line, or one line that all is in order; digests last where asked for."""
    problems = [*found.problems, *(repeated.problems if repeated else ())]
    lines = [f"problem: {problem}" for problem in problems]
    if rerun is not None and repeated is None:
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
