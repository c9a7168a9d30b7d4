"""``layerprune verify`` and ``push`` through click's runner, on a folder that export and audit left."""

import json
import shutil

import pytest

import cli_tiny
import hub_standin
from cli_tiny import done, last_line, layerprune, refused
from layerprune.artifacts import Audit
from layerprune.auditor.verification import verify


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = cli_tiny.make(tmp_path_factory.mktemp("verify"))
    tasks = ["--tasks", "toy", "--include-path", folder / "tasks"]
    done("plan", folder / "base", "--metric", "reverse-order", "--drop", 1, "-o", folder / "run")
    done("export", folder / "run", "-o", folder / "bare")
    shutil.copytree(folder / "bare", folder / "smaller")
    done("audit", folder / "smaller", *tasks, "--limit", 20, "--no-generation")
    return folder


@pytest.fixture
def smaller(home, tmp_path):
    return shutil.copytree(home / "smaller", tmp_path / "smaller")


@pytest.fixture
def hub(monkeypatch):
    from huggingface_hub import constants

    server = hub_standin.Hub()
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", hub_standin.TOKEN)
    yield server
    server.shutdown()
    server.server_close()


def test_an_honest_folder_takes_one_line(home):
    found = verify(home / "smaller")
    said = done("verify", home / "smaller", "--base", home / "base").stdout
    assert said.count("\n") == 1
    assert said.startswith(f"{home / 'smaller'} is as it was left: {found.files} files, ")
    assert "audited" in said
    assert "not audited yet" in done("verify", home / "bare").stdout


def test_digests_are_printed_when_asked_for(home):
    said = done("verify", home / "smaller", "--digests").stdout
    for name, digest in verify(home / "smaller").digests.items():
        assert f"{name} sha256 {digest}" in said


def test_a_tampered_folder_ends_with_1_and_lists_what_is_wrong(smaller):
    config = smaller / "config.json"
    config.write_text(config.read_text().replace("5", "6", 1))
    (smaller / "extra.bin").write_bytes(b"1")
    result = layerprune("verify", smaller)
    assert result.exit_code == 1
    lines = result.stdout.splitlines()
    assert lines == [
        "problem: config.json: its sha256 is not the receipt's",
        "problem: extra.bin: not a file that export, heal or audit wrote",
        f"{smaller} is NOT what its documents say: 2 problems",
    ]
    again = layerprune("verify", smaller, "--rerun", 3)
    assert again.exit_code == 1
    assert "no item was asked again" in again.stdout


def test_another_base_is_a_problem(home, smaller):
    result = layerprune("verify", smaller, "--base", home / "bare")
    assert result.exit_code == 1
    assert "is not the base model of this checkpoint" in result.stdout


def test_items_asked_again_agree(home):
    said = done("verify", home / "smaller", "--rerun", 5, "--include-path", home / "tasks", "--device", "cpu").stdout
    assert "5 items asked again, 10 of 10 decisions the same" in said


def test_an_item_that_does_not_repeat_is_a_problem(home, monkeypatch):
    from layerprune.auditor import rerun

    found = rerun.RerunResult(1, 1, 0.4, ("toy: item 0123 does not repeat for the pruned model",))
    monkeypatch.setattr(rerun, "repeat", lambda *args, **kwargs: found)
    result = layerprune("verify", home / "smaller", "--rerun", 1)
    assert result.exit_code == 1
    assert "problem: toy: item 0123 does not repeat" in result.stdout


def test_bad_input_is_one_line(home, tmp_path):
    assert "does not exist" in refused("verify", tmp_path / "nowhere")
    assert "give --rerun N" in refused("verify", home / "smaller", "--device", "cpu")
    items = len(Audit.load(home / "smaller" / "layerprune" / "audit.json").tasks[0].data.fingerprints)
    assert f"the audit has {items}" in last_line("verify", home / "smaller", "--rerun", items + 1)
    assert "does not exist" in refused("push", tmp_path / "nowhere", "me/model")


def test_a_dry_run_lists_what_would_go_and_sends_nothing(home, hub):
    said = done("push", home / "smaller", "me/smaller", "--dry-run").stdout
    assert "model.safetensors" in said
    assert "layerprune/audit.json" in said
    assert "deleted from the repo, where it has others: *.safetensors, " in said
    assert said.splitlines()[-1].endswith("would go to me/smaller")
    assert hub.repos == {}


def test_what_is_pushed_arrives(home, hub):
    said = done("push", home / "smaller", "me/smaller", "--private").stdout
    assert f"pushed to me/smaller: {hub.url}" in said
    stored = hub.repos["me/smaller"]["files"]
    assert json.loads(stored["config.json"])["num_hidden_layers"] == 5
    assert Audit.load(home / "smaller" / "layerprune" / "audit.json").verdict.encode() in stored["README.md"]


def test_the_unaudited_go_only_when_told(home, hub):
    assert "--allow-unaudited" in last_line("push", home / "bare", "me/bare")
    assert hub.repos == {}
    done("push", home / "bare", "me/bare", "--allow-unaudited")
    assert "model.safetensors" in hub.repos["me/bare"]["files"]


def test_a_tampered_folder_is_not_pushed(smaller, hub):
    (smaller / "config.json").write_text("{}")
    assert "nothing was sent" in last_line("push", smaller, "me/smaller")
    assert hub.repos == {}
