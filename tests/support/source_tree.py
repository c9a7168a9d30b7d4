"""The files of the project, in a git checkout or an unpacked source distribution, and what is built of them."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path

from checkout import ROOT

BUILT = ("PKG-INFO", "setup.cfg", "*.egg-info")  # what setuptools adds to a source distribution


def walked(root: Path) -> set[str]:
    """Return the files below ``root`` that .gitignore does not leave out and setuptools did not add.

    Of its patterns those forms are understood that ours have: a name, a name with a slash behind it, one from the root.
    """
    patterns = [line.rstrip("/") for line in (root / ".gitignore").read_text().splitlines() if line]
    anywhere = [*(pattern for pattern in patterns if "/" not in pattern), ".git", "*.py[cod]"]
    on_top = [*(pattern[1:] for pattern in patterns if pattern.startswith("/")), *BUILT]

    def left_out(path: Path) -> bool:
        parts = path.relative_to(root).parts
        return any(fnmatch(parts[0], pattern) for pattern in on_top) or any(
            fnmatch(part, pattern) for part in parts for pattern in anywhere
        )

    return {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file() and not left_out(path)}


def tracked() -> set[str]:
    """Return the files of the project, relative to its root: what git tracks, or all that lie there without git."""
    if not (ROOT / ".git").exists():
        return walked(ROOT)
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return {name for name in listed.split("\0") if name and (ROOT / name).is_file()}


def copied(names: Iterable[str], folder: Path) -> Path:
    """Copy files of the project to ``folder``: a build leaves its own files beside what it builds."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / name)
    return folder


def unpacked(source: Path, folder: Path) -> Path:
    """Build the source distribution of ``source`` without the network; return where below ``folder`` it is unpacked."""
    code = "import sys; from setuptools.build_meta import build_sdist; build_sdist(sys.argv[1])"
    subprocess.run([sys.executable, "-c", code, folder], check=True, capture_output=True, cwd=source)
    (archive,) = folder.glob("layerprune-*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    return folder / archive.name.removesuffix(".tar.gz")
