"""The study as a folder: study.html, which holds everything it shows, its figures (CSV), plots (SVG) and study.json."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from layerprune.analysis import prose
from layerprune.analysis.condensed import (
    Shown,
    agreement,
    calibration,
    counterexample,
    lead,
    overlap,
    paths,
    reliability,
    spread,
)
from layerprune.analysis.findings import Findings
from layerprune.analysis.plots import Plot, plots
from layerprune.analysis.tables import tables
from layerprune.documents import Study
from layerprune.documents.base import write_atomically
from layerprune.errors import DocumentError
from layerprune.output import check_places, published_together
from layerprune.paths import refuse_link
from layerprune.report.card import base_name
from layerprune.report.templating import environment

PAGE = "study.html"
PLOTS, TABLES = "plots", "tables"


@dataclass(frozen=True)
class Section:
    """One question and its answer."""

    anchor: str
    question: str
    paragraphs: Sequence[str]
    plots: Sequence[Plot] = ()
    tables: Sequence[Shown] = ()


def write_study(study: Study, folder: Path) -> list[Path]:
    """Write tables, plots, the page and study.json into ``folder``; return the page and study.json.

    study.json comes last: where it stands, everything stands.
    """
    for name in (PLOTS, TABLES):
        refuse_link(folder / name)
    it = Findings(study)
    drawn = list(plots(it))
    with published_together(folder) as new:
        for table in tables(study):
            _write(new / TABLES / f"{table.name}.csv", table.as_csv())
        for plot in drawn:
            _write(new / PLOTS / f"{plot.name}.svg", plot.svg)
        _write(new / PAGE, render(it, drawn))
        study.save(new / Study.filename)
    for stale in {*(folder / PLOTS).glob("*.svg")} - {folder / PLOTS / f"{plot.name}.svg" for plot in drawn}:
        stale.unlink()  # of a study that this one replaces
    return [folder / PAGE, folder / Study.filename]


def read_study(folder: Path) -> Study:
    """Read a folder's study.json; raises ``DocumentError`` where the page beside it was written from another one."""
    study, page = Study.load(folder / Study.filename), folder / PAGE
    if page.exists() and study.sha256() not in page.read_text(encoding="utf-8", errors="replace"):
        raise DocumentError(
            f"{folder / Study.filename} is not the one that {page} was written from; put it back, or remove it to do "
            "the study again: what was measured is kept"
        )
    return study


def check_room(folder: Path) -> None:
    """Raise ``UsageError`` where something else lies in the place of what ``write_study`` will write."""
    check_places(folder, files=(PAGE, Study.filename), folders=(TABLES, PLOTS))


def verdict_of(study: Study) -> str:
    """Return a study in one paragraph."""
    return prose.verdict(Findings(study))


def render(it: Findings, drawn: Sequence[Plot]) -> str:
    """Return study.html; the page holds everything it shows: no script, no external request."""
    given = {
        "study": it.study,
        "title": f"What the layers of {base_name(it.study.model.id)} are worth",
        "verdict": prose.verdict(it),
        "sections": sections(it, {plot.name: plot for plot in drawn}),
        "sha256": it.study.sha256(),
    }
    html = environment(("accuracy", "p_value", "number"), autoescape=True)
    html.filters["data_uri"] = _data_uri
    return html.get_template("study.html.jinja").render(given)


def sections(it: Findings, drawn: dict[str, Plot]) -> list[Section]:
    """Return the page's questions in order."""
    return [
        Section(
            "reference",
            "How sure is the accuracy that is lost?",
            prose.on_reliability(it),
            [drawn["layers"]],
            [reliability(it)],
        ),
        Section(
            "agreement",
            "Which metric ranks the layers as accuracy does?",
            prose.on_agreement(it),
            [drawn["agreement"], drawn["confusion"]],
            [agreement(it), overlap(it)],
        ),
        Section(
            "spread",
            "Does a layer's worth depend on the task?",
            prose.on_spread(it),
            [drawn["spread"]] if "spread" in drawn else [],
            [spread(it)] if it.study.spread else [],
        ),
        Section("paths", "What is left when layers go?", prose.on_paths(it), [drawn["paths"]], [paths(it), lead(it)]),
        Section("calibration", "What should a metric read?", prose.on_calibration(it), [], [calibration(it)]),
        Section(
            "counterexample",
            "Can a layer that turns nothing decide everything?",
            prose.on_counterexample(it),
            [],
            [counterexample(it)],
        ),
    ]


def _data_uri(svg: str) -> str:
    return f"data:image/svg+xml;base64,{base64.b64encode(svg.encode()).decode()}"


def _write(path: Path, text: str) -> None:
    write_atomically(path, text.encode())
