"""report.html: self-contained, complete, readable by machines and people."""

import html.parser
import re
import shlex
import shutil

import pytest

import audit_samples as samples
import audit_tiny as tiny
import report_samples
from layerprune import formatting
from layerprune.artifacts import PRUNED, Audit, Plan
from layerprune.auditor import audit
from layerprune.errors import DocumentError
from layerprune.report import page as layers
from layerprune.report import plots
from layerprune.report.card import write_card
from layerprune.report.page import commands, write_report


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    base = tiny.base_model(folder / "base")
    tiny.eval_set(base, folder / "tasks", test=40)
    out = tiny.exported(base, folder / "out")
    audit(out, ["toy"], include_path=[folder / "tasks"], generation=False)
    return out


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


@pytest.mark.parametrize("healed", [False, True])
def test_the_page_needs_nothing_from_outside_and_is_well_formed(tmp_path, healed):
    text = write_report(report_samples.folder(tmp_path, healed=healed)).read_text(encoding="utf-8")
    page = Page(text)
    assert page.fetched == []
    assert page.open == []
    assert not re.search(r"https?://|@import|url\(|<script", text)
    assert ("html", {"lang": "en"}) in page.tags
    assert any(tag == "meta" and "viewport" in attrs.get("name", "") for tag, attrs in page.tags)
    plots_shown = [attrs for tag, attrs in page.tags if tag == "svg"]
    assert len(plots_shown) == 4
    assert all(attrs["role"] == "img" and attrs["aria-label"] for attrs in plots_shown)
    assert all("scope" in attrs for tag, attrs in page.tags if tag == "th")
    assert "prefers-color-scheme: dark" in text


def test_the_page_says_what_the_audit_says(out):
    document = Audit.load(out / "layerprune" / "audit.json")
    text = write_report(out).read_text(encoding="utf-8")
    task = document.tasks[0]
    assert document.verdict in text
    assert formatting.points_interval(task.models[PRUNED].interval) in text
    assert document.sha256() in text
    assert task.flipped
    lost = [item for item in task.flipped if not item.fixed]
    assert len(lost) == task.models[PRUNED].flips.right_to_wrong
    assert all(item.question in text for item in task.flipped)
    assert "right before, wrong now" in text


def test_text_from_models_and_tasks_is_escaped(out, tmp_path):
    copy = shutil.copytree(out, tmp_path / "copy")
    path = copy / "layerprune" / "audit.json"
    document = Audit.load(path)
    task = document.tasks[0]
    evil = "<script>alert(1)</script>"
    data = task.data.model_copy(update={"task": evil})
    flipped = (task.flipped[0].model_copy(update={"question": evil, "answers": (evil,)}),)
    document.model_copy(update={"tasks": (task.model_copy(update={"data": data, "flipped": flipped}),)}).save(path)
    assert "<script" not in write_report(copy).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    return report_samples.folder(tmp_path_factory.mktemp("sample"))


def documents(folder):
    inside = folder / "layerprune"
    return Plan.load(inside / "plan.json"), Audit.load(inside / "audit.json")


def test_both_rankings_are_drawn_and_stand_in_a_table_with_what_is_removed(sample):
    plan, audit = documents(sample)
    shown = layers.rankings(plan, audit)
    assert [ranks.metric for ranks in shown] == ["ablation", "cosine"]
    rows = layers.layer_table(plan, shown)
    assert [unit for unit, _, _ in rows] == [str(unit) for unit in range(report_samples.DEPTH)]
    assert {int(unit) for unit, removed, _ in rows if removed} == set(report_samples.REMOVAL)
    three = next(one.score for one in plan.ranking if one.unit == 3)
    assert rows[3][2][0] == f"{three:.3g}".replace("-", formatting.MINUS)
    for ranks in shown:
        assert layers.ranking_bars(ranks, plan).count('class="bar marked"') == len(report_samples.REMOVAL)


def test_the_path_goes_through_every_step_and_the_others_stand_beside_it(sample):
    _, audit = documents(sample)
    drawn = layers.path_to_removal(audit)
    for one in audit.layerwise.path:
        lost = f"{formatting.points(one.difference)} points ({formatting.points_interval(one.interval)})"
        said = f"{len(one.units)} removed: {lost}"
        assert said in drawn
    assert drawn.count('class="dot beside"') == 1
    assert f"cosine: {formatting.points(audit.overall['cosine'].difference)} points" in drawn
    assert layers.path_to_removal(audit.model_copy(update={"layerwise": None})) is None


def test_the_compensation_check_reaches_page_and_card_in_words(sample):
    _, audit = documents(sample)
    said = audit.layerwise.compensation.verdict
    assert said in write_report(sample).read_text(encoding="utf-8")
    assert said in write_card(sample).read_text(encoding="utf-8")


@pytest.mark.parametrize("healed", [False, True])
def test_the_commands_to_reproduce_are_commands_that_exist(tmp_path, healed):
    import click

    from layerprune.cli.command import app

    plan, audit = documents(report_samples.folder(tmp_path, healed=healed))
    log = healing_log() if healed else None
    lines = commands(plan, audit, log)
    assert [line.split()[1] for line in lines] == ["plan", "export", *(["heal"] * healed), "audit", "verify", "audit"]
    context = click.Context(app)
    for line in lines:
        _, name, *words_given = shlex.split(line)
        made = app.get_command(context, name).make_context(name, words_given)  # every option is known and well formed
        assert made.params
    asked = dict(zip(lines[-3].split()[2:], lines[-3].split()[3:], strict=False))
    assert asked["--limit"] == "240"
    assert asked["--compare"] == "cosine=cosine/plan.json"
    assert "unhealed" not in lines[-3]


def test_the_text_that_healed_is_named_with_its_window_and_what_was_looked_for(sample):
    from layerprune.artifacts.heal_log import CorpusOverlap, CorpusRef

    plan, audit = documents(sample)
    own = [data.task for data in plan.data]
    for tasks, named in ((own, False), ([*own, "more"], True)):
        corpus = CorpusRef(
            source="text.jsonl", fingerprint="f", documents=9, heldout_documents=1, dropped_documents=0, window=384,
            windows=8, heldout_windows=1, counted=100, answers_only=False,
            overlap={task: CorpusOverlap(split="test", items=5, unlooked=0, found=()) for task in tasks},
        )  # fmt: skip
        line = commands(plan, audit, healing_log().model_copy(update={"corpus": corpus}))[2]
        assert "--corpus text.jsonl --window 384" in line
        assert ("--tasks" in line) is named


def test_everything_that_had_a_say_in_a_plan_stands_in_its_command(sample):
    from layerprune.artifacts import Objective, PlanLimits, SearchRef

    objective = Objective(name="weighted", weights={"toy": 2.0}, floors={"toy": 0.9})
    metric = samples.plan().metric.model_copy(update={"objective": objective})
    limits = PlanLimits(protect=(0, 29), keep_period=True, no_adjacent=True)
    plan = samples.plan(
        metric=metric,
        limits=limits,
        requested="--target-params 110M",
        search=SearchRef(name="greedy", options={"lazy": True}),
    )
    said = commands(plan, documents(sample)[1], None)[0]
    for words_given in (
        "--objective weighted --weights toy=2 --floor toy=0.9", "--target-params 110M",
        "--search greedy:lazy=True --protect 0,29 --keep-period --no-adjacent --seed 0",
    ):  # fmt: skip
        assert words_given in said


def test_a_certified_plan_is_asked_for_without_the_items_that_certified(sample):
    from layerprune.artifacts import Certificate, CertifiedStep

    marks = tuple(f"m{number}" for number in range(90))
    data = samples.plan().data[0].model_copy(update={"items": 90, "fingerprints": marks})
    step = CertifiedStep(removal=(3, 11), right_to_wrong=0, wrong_to_right=1, p_value=0.01, certified=True)
    known = {"limit": 0.02, "confidence": 0.95, "statement": "", "fingerprints": {"toy": marks[30:]}, "steps": (step,)}
    asked = "--max-drop 2% --confidence 95%"
    for more, words_given in (
        ({}, "--tasks toy --limit 30 --num-fewshot 0 --max-drop"),  # a plan made before the certificate said more
        ({"selection_limit": 1000, "certify_limit": 2000}, "--limit 1000 --certify-limit 2000 --num-fewshot 0"),
    ):
        plan = samples.plan(data=(data,), requested=asked, certificate=Certificate(**known, **more))
        assert words_given in commands(plan, documents(sample)[1], None)[0]


def test_a_plan_of_a_front_is_exported_from_where_the_front_leaves_it(sample):
    lines = commands(samples.plan(requested="--front --up-to 75%"), documents(sample)[1], None)
    assert "--front --up-to 75%" in lines[0]
    assert lines[1] == "layerprune export run/front/plan-02.json -o smaller/"


def healing_log():
    from layerprune.artifacts import HealerRef, HealLog

    method = HealerRef(name="linear", spec="linear:ridge=0.01", options={}, gradients=False, owner="layerprune")
    receipt = samples.receipt()
    return HealLog(
        method=method, base=receipt.base, unhealed=receipt.result, result=receipt.result, changed=(), files={},
        plan_sha256="1" * 64, receipt_sha256="2" * 64, tokens=1000, seconds=3.0, dtype="float32", device="cpu",
        seed=0, versions={},
    )  # fmt: skip


def test_a_local_base_is_a_folder_in_commands(sample):
    plan, audit = documents(sample)
    local = plan.model_copy(update={"model": plan.model.model_copy(update={"id": "base", "revision": None})})
    assert commands(local, audit, None)[0].startswith("layerprune plan base/ ")


def test_without_an_audit_there_is_no_report(tmp_path):
    with pytest.raises(DocumentError, match=r"audit\.json does not exist"):
        write_report(samples.exported(tmp_path))


def test_plots_put_values_where_they_belong():
    drawn = plots.bars("title", [plots.Bar("0", 1.0), plots.Bar("1", 0.5, marked=True), plots.Bar("2", -0.5)], "y")
    heights = [float(h) for h in re.findall(r'<rect [^>]*height="([\d.]+)"', drawn)]
    assert heights[0] == pytest.approx(2 * heights[1], rel=0.01)
    assert heights[1] == pytest.approx(heights[2], rel=0.01)
    assert drawn.count('class="bar marked"') == 1
    line = plots.curve(
        "title",
        [plots.PlotPoint(0, 0.0, "a"), plots.PlotPoint(2, -4.0, "b", (-6.0, -2.0))],
        "x",
        "y",
        [plots.PlotPoint(2, -1, "c")],
    )
    ((first, second),) = re.findall(r'class="line" points="[\d.]+,([\d.]+) [\d.]+,([\d.]+)"', line)
    ((low, high),) = re.findall(r'class="whisker" [^>]*y1="([\d.]+)" y2="([\d.]+)"', line)
    (beside,) = re.findall(r'class="dot beside" cx="[\d.]+" cy="([\d.]+)"', line)
    assert float(second) == pytest.approx((float(low) + float(high)) / 2, abs=0.1)
    assert float(beside) - float(first) == pytest.approx((float(second) - float(first)) / 4, abs=0.1)
    row = plots.forest("title", [("a", -0.02, (-0.04, 0.0)), ("b", 0.01, (0.0, 0.02))])
    (zero,) = re.findall(r'class="zero" x1="([\d.]+)"', row)
    ends = [(float(a), float(b)) for a, b in re.findall(r'class="whisker" x1="([\d.]+)" x2="([\d.]+)"', row)]
    assert ends[0][1] == pytest.approx(float(zero)) == pytest.approx(ends[1][0])
    assert (ends[0][1] - ends[0][0]) == pytest.approx(2 * (ends[1][1] - ends[1][0]), rel=0.01)


@pytest.mark.parametrize(
    ("count", "said"),
    [(999, "999 bytes"), (269_000_000, "269 MB"), (999_400_000, "999 MB"), (999_700_000, "1 GB"), (999_900, "1 MB")],
)
def test_a_size_is_said_in_the_unit_that_its_digits_round_to(count, said):
    assert formatting.size(count) == said
