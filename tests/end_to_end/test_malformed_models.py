"""Damaged models, tokenizers, templates and tasks, through the command line: one line each, and nothing is written."""

import json
import shutil

import pytest

import audit_tiny
import families
import heal_tiny
from answers import PROBLEMS, REFUSED, broken_rules
from cli_tiny import layerprune, refused
from layerprune.artifacts import Plan
from layerprune.removal import Removal

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 4\n"
TEMPLATES = {
    "half a block": "{% if",
    "an unknown name": "{{ a.b.c }}",
    "a fault of two lines": "{{ raise_exception('no\\nno') }}",
    "too long a range": "{% for i in range(10**9) %}{% endfor %}",
    "itself without end": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "half a pair": "\ud800",
}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Return a folder with base/, tasks/ and pruned-3/."""
    folder = tmp_path_factory.mktemp("models")
    heal_tiny.pruned(folder, 3)
    audit_tiny.eval_set(folder / "base", folder / "tasks", train=4, test=4)
    return folder


@pytest.fixture
def copy(home, tmp_path):
    """Return a copy of it that a test may damage."""
    for name in ("base", "tasks", "pruned-3"):
        shutil.copytree(home / name, tmp_path / name)
    task = (tmp_path / "tasks" / "toy.yaml").read_text().replace(str(home), str(tmp_path))
    (tmp_path / "tasks" / "toy.yaml").write_text(task)
    return tmp_path


def score(copy, *more):
    tasks = ["--tasks", "toy", "--include-path", str(copy / "tasks")]
    return ["score", str(copy / "base"), "--metric", "cosine", *tasks, "-o", str(copy / "out"), *more]


def export(copy):
    return ["export", str(copy / "base"), "--remove", "3", "-o", str(copy / "out")]


def edited(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"])
@pytest.mark.parametrize("command", [score, export])
def test_a_git_lfs_pointer_is_called_one(copy, name, command):
    (copy / "base" / name).write_bytes(POINTER)
    assert not broken_rules(copy, command(copy))
    said = refused(*command(copy))
    assert said.startswith(f"{copy / 'base' / name} is a git-lfs pointer in place of the ")
    assert said.endswith("git lfs pull")


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff\xfe{", b"<html>", b'{"model": ' + b"[" * 10**5], ids=repr)
@pytest.mark.parametrize("command", [score, export])
def test_a_damaged_tokenizer_is_told_of_before_anything_is_written(copy, content, command):
    (copy / "base" / "tokenizer.json").write_bytes(content)
    assert not broken_rules(copy, command(copy))


def test_a_file_that_no_model_has_so_large_is_not_read(copy):
    with (copy / "base" / "tokenizer.json").open("wb") as file:
        file.truncate(20 * 10**9)  # sparse
    for words in (score(copy), export(copy)):
        assert "tokenizer.json is 20 GB long; such a file has at most 134 MB" in refused(*words)


def test_tokens_that_the_model_does_not_know_are_refused(copy):
    path = copy / "base" / "tokenizer.json"
    whole = json.loads(path.read_text())
    whole["model"]["vocab"]["t"] = 9999
    path.write_text(json.dumps(whole))
    assert not broken_rules(copy, score(copy))
    said = layerprune(*score(copy)).stderr.splitlines()[-1]
    assert "the tokenizer gives token 9999, and the model knows 260: they do not belong together" in said


@pytest.mark.parametrize("changes", [{"model_max_length": "1"}, {"bos_token": None, "eos_token": None}])
def test_a_tokenizer_that_cannot_be_worked_with_is_refused(copy, changes):
    edited(copy / "base" / "tokenizer_config.json", **changes)
    assert not broken_rules(copy, score(copy))


@pytest.mark.parametrize("name", list(TEMPLATES))
def test_a_chat_template_that_fails_is_a_users_fault(copy, name):
    edited(copy / "base" / "tokenizer_config.json", chat_template=TEMPLATES[name])
    (copy / "base" / "chat_template.jinja").unlink(missing_ok=True)
    assert not broken_rules(copy, score(copy, "--apply-chat-template"))


def test_a_chat_template_that_never_ends_is_left(copy, monkeypatch):
    monkeypatch.setattr("layerprune.data.corpus.TEMPLATE_SECONDS", 0.3)
    endless = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    edited(copy / "base" / "tokenizer_config.json", chat_template=endless)
    said = layerprune(*score(copy, "--apply-chat-template")).stderr.splitlines()[-1]
    assert said == "layerprune: the model's chat template has not ended after 0.3 s"
    assert not (copy / "out").exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_hidden_layers": 10**7}, "num_hidden_layers 10000000; at most 2,000 are read, and the weights hold 6"),
        ({"num_hidden_layers": 2**70}, "says num_hidden_layers 1180591620717411303424; at most 2,000"),
        ({"num_hidden_layers": 0}, "says num_hidden_layers 0; at least 1 is needed"),
        ({"hidden_size": 0}, "says hidden_size 0; at least 1 is needed"),
        ({"vocab_size": -1}, "says vocab_size -1; at least 1 is needed"),
        ({"num_labels": 10**7}, "says num_labels 10000000; at most 100,000 are read"),
        ({"architectures": 7}, "says architectures 7; a list of class names is expected"),
        ({"num_experts": 10**9}, "says num_experts 1000000000; at most 10,000 are read"),
    ],
)
def test_what_a_config_asks_for_is_looked_at_before_it_is_built(copy, changes, said):
    edited(copy / "base" / "config.json", **changes)
    for words in (["inspect", str(copy / "base")], export(copy)):
        assert not broken_rules(copy, words)
        assert said in refused(*words)


@pytest.mark.parametrize(
    "change",
    [
        {"task: toy": "task: null"}, {"task: toy": "task: 7"}, {"output_type: multiple_choice": "output_type: null"},
        {'doc_to_choice: "{{choices}}"': "doc_to_choice: null"}, {'"{{question}}"': '"{{ question.x.y }}"'},
        {'"{{question}}"': '"{{"'}, {"version: 1.0": "version: 1.0\nnum_fewshot: .inf"},
        {"version: 1.0": "version: 1.0\nfilter_list: []"}, {"metric: acc": "metric: nothing"},
    ],
    ids=str,
)  # fmt: skip
def test_a_task_that_is_none_is_named(copy, change):
    path = copy / "tasks" / "toy.yaml"
    text = path.read_text()
    for old, new in change.items():
        assert old in text
        text = text.replace(old, new)
    path.write_text(text)
    assert not broken_rules(copy, score(copy))


@pytest.mark.parametrize("line", ["{} {}", '{"question": null, "choices": null, "gold": null}', '{"question', "\ud800"])
def test_damaged_items_of_a_task_are_named(copy, line):
    path = copy / "tasks" / "toy-train.jsonl"
    path.write_bytes(path.read_bytes() + line.encode("utf-8", "surrogatepass") + b"\n")
    assert not broken_rules(copy, score(copy))


def test_more_examples_than_there_are_cannot_be_shown(copy):
    assert not broken_rules(copy, score(copy, "--num-fewshot", "1000"))


def test_a_device_without_numbers_and_a_stack_without_a_layer_to_go_are_refused(copy):
    assert refused(*score(copy, "--device", "meta")) == "unknown device 'meta'; use auto, cpu, cuda or cuda:0"
    said = layerprune(*score(copy, "--protect", "0-5")).stderr.splitlines()[-1]
    assert said == "layerprune: none of the 6 layers may go: --protect keeps 0-5"


def test_a_plan_that_speaks_of_another_depth_is_refused_before_the_copy(copy):
    plan = families.make_plan(copy / "base", Removal.of(3))
    for number, (model, removal, said) in enumerate(
        [
            ({"layers": 7}, (3,), "with 7 layers, but"),
        ]
    ):
        changed = plan.model_copy(
            update={"model": plan.model.model_copy(update=model), "removal": removal, "order": removal}
        )
        changed.save(copy / f"{number}" / Plan.filename)
        words = ["export", str(copy / f"{number}" / Plan.filename), "-o", str(copy / "out")]
        assert not broken_rules(copy, words)
        assert said in layerprune(*words).stderr.splitlines()[-1]


def test_a_name_that_looks_like_the_end_of_the_card_does_not_cut_it(copy):
    name = "<b>|&`]( <!-- layerprune: end -->"
    (copy / "base").rename(copy / name)
    assert layerprune("export", copy / name, "--remove", "3", "-o", copy / "out").exit_code == 0
    assert layerprune("verify", copy / "out").exit_code == 0


def test_a_repo_that_is_none_is_refused_in_a_dry_run_too(copy):
    for repo in ("", " ", "a b/c", "\x1b[31m", "a/b/c", "a/..", "https://user:hf_secretsecret@host/x"):
        words = ["push", str(copy / "pruned-3"), repo, "--dry-run"]
        assert not broken_rules(copy, words)
        assert "is no name of a Hub repo; write owner/name" in refused(*words)


def test_a_link_that_leads_to_itself_is_told_of(copy):
    (copy / "pruned-3" / "extra.txt").symlink_to("extra.txt")
    for words in (["verify", str(copy / "pruned-3")], ["inspect", str(copy / "pruned-3")]):
        assert not broken_rules(copy, words, (0, PROBLEMS, REFUSED))
