"""report.html: self-contained, complete, readable by machines and people."""

import html.parser
import re
import shutil
import subprocess

import audit_samples as samples
import audit_tiny as tiny
import pytest

from layerprune.audit import audit
from layerprune.documents import BaseTask, Candidate, MetricRef, Outcomes, Round, Scores, TaskScore
from layerprune.errors import DocumentError
from layerprune.report import plots, words
from layerprune.report.page import write_report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    base = tiny.base_model(folder / "base")
    tiny.questions(base, folder / "tasks", test=40)
    out = tiny.exported(base, folder / "out")
    audit(out, ["toy"], include_path=[folder / "tasks"], generation=False)
    return out


def scores(spec, order):
    def candidate(*removal):
        task = TaskScore(
            relevance=0.5,
            interval=(0, 1),
            accuracy=0.9 - 0.1 * len(removal),
            gold_probability=None,
            items=2,
            outcomes=Outcomes(correct="10", gold_probability=None),
        )
        return Candidate(removal=removal, score=0.1 * removal[0], interval=(-0.1, 0.7), tasks={"toy": task})

    return Scores(
        model=samples.model_ref(),
        metric=MetricRef(name=spec, spec=spec, options={}, unit="relevance", scope="any", owner="layerprune"),
        data=(),
        base={"toy": BaseTask(accuracy=0.9, gold_probability=None, p_value=0, outcomes=Outcomes(correct="11"))},
        rounds=(Round(removed=(), candidates=tuple(candidate(n) for n in range(6))),
                Round(removed=order[:1], candidates=(candidate(*order),))),
        seed=0,
        versions={},
    )  # fmt: skip


class Page(html.parser.HTMLParser):
    """What a browser would fetch, and what stands in the page."""

    def __init__(self, text):
        super().__init__()
        self.fetched, self.tags, self.open = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.fetched += [value for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]
        if tag not in ("meta", "br", "line", "rect", "circle", "polyline"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in ("line", "rect", "circle", "polyline"):
            assert self.open.pop() == tag, tag


def test_the_page_needs_nothing_from_outside_and_is_well_formed(out, tmp_path):
    text = write_report(
        out, [scores("ablation", (3, 4)), scores("cosine", (3, 4))], to=tmp_path / "run.html"
    ).read_text(encoding="utf-8")
    page = Page(text)
    assert page.fetched == []
    assert page.open == []
    assert not re.search(r"https?://|@import|url\(|<script", text)
    assert ("html", {"lang": "en"}) in page.tags
    assert any(tag == "meta" and "viewport" in attrs.get("name", "") for tag, attrs in page.tags)
    plots_shown = [attrs for tag, attrs in page.tags if tag == "svg"]
    assert len(plots_shown) >= 3
    assert all(attrs["role"] == "img" and attrs["aria-label"] for attrs in plots_shown)
    assert all("scope" in attrs for tag, attrs in page.tags if tag == "th")
    assert "prefers-color-scheme: dark" in text


def test_the_page_says_what_the_audit_says(out):
    from layerprune.documents import PRUNED, Audit

    document = Audit.load(out / "layerprune" / "audit.json")
    text = write_report(out).read_text(encoding="utf-8")
    task = document.tasks[0]
    assert document.verdict in text
    assert words.points_interval(task.models[PRUNED].interval) in text
    assert document.sha256() in text
    assert task.flipped
    lost = [item for item in task.flipped if not item.fixed]
    assert len(lost) == task.models[PRUNED].flips.right_to_wrong
    assert all(item.question in text for item in task.flipped)
    assert "right before, wrong now" in text


def test_text_from_models_and_tasks_is_escaped(out, tmp_path):
    from layerprune.documents import Audit

    copy = shutil.copytree(out, tmp_path / "copy")
    path = copy / "layerprune" / "audit.json"
    document = Audit.load(path)
    task = document.tasks[0]
    evil = "<script>alert(1)</script>"
    data = task.data.model_copy(update={"task": evil})
    flipped = (task.flipped[0].model_copy(update={"question": evil, "answers": (evil,)}),)
    document.model_copy(update={"tasks": (task.model_copy(update={"data": data, "flipped": flipped}),)}).save(path)
    assert "<script" not in write_report(copy).read_text(encoding="utf-8")


def test_without_an_audit_there_is_no_report(tmp_path):
    with pytest.raises(DocumentError, match=r"audit\.json does not exist"):
        write_report(samples.exported(tmp_path))


def test_plots_put_values_where_they_belong():
    drawn = plots.bars("title", [plots.Bar("0", 1.0), plots.Bar("1", 0.5, marked=True), plots.Bar("2", -0.5)], "y")
    heights = [float(h) for h in re.findall(r'<rect [^>]*height="([\d.]+)"', drawn)]
    assert heights[0] == pytest.approx(2 * heights[1], rel=0.01)
    assert heights[1] == pytest.approx(heights[2], rel=0.01)
    assert drawn.count('class="bar marked"') == 1
    row = plots.forest("title", [("a", -0.02, (-0.04, 0.0)), ("b", 0.01, (0.0, 0.02))])
    (zero,) = re.findall(r'class="zero" x1="([\d.]+)"', row)
    ends = [(float(a), float(b)) for a, b in re.findall(r'class="whisker" x1="([\d.]+)" x2="([\d.]+)"', row)]
    assert ends[0][1] == pytest.approx(float(zero)) == pytest.approx(ends[1][0])
    assert (ends[0][1] - ends[0][0]) == pytest.approx(2 * (ends[1][1] - ends[1][0]), rel=0.01)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("width", [390, 1100])
def test_the_page_renders_without_scrolling_sideways(out, tmp_path, width):
    """A screenshot at a phone's and a desk's width; the picture has the page's ground and its accent in it."""
    from PIL import Image

    page = write_report(out, [scores("ablation", (3, 4))], to=tmp_path / "run.html")
    shot = tmp_path / f"{width}.png"
    quiet = [f"--disable-{what}" for what in ("gpu", "quic", "background-networking", "component-update", "sync")]
    where = [f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},2400", f"--screenshot={shot}"]
    command = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--no-first-run",
        "--hide-scrollbars",
        *quiet,
        *where,
        page.as_uri(),
    ]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    picture = Image.open(shot).convert("RGB")
    assert picture.size == (width, 2400)
    colours = {colour for _, colour in picture.getcolors(10_000_000)}
    assert {(251, 251, 249), (179, 68, 30)} <= colours  # the light page and the accent: styles and plots arrived
    right_edge = {picture.getpixel((width - 1, y)) for y in range(0, 2400, 7)}
    assert right_edge == {(251, 251, 249)}  # nothing is cut off at the right
