"""``layerprune verify``, ``audit --recheck``, ``card`` and ``push`` through click's runner, on an audited folder."""

import json
import shutil

import pytest

import cli_tiny
import hub_standin
from cli_tiny import done, last_line, layerprune, refused
from layerprune import api
from layerprune.artifacts import Audit
from layerprune.auditor.verification import verify
from layerprune.errors import UsageError


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
    line = refused("audit", smaller, "--recheck", 3)
    assert "config.json: its sha256 is not the receipt's (and 1 more); no item was asked again" in line


def test_another_base_is_a_problem(home, smaller):
    result = layerprune("verify", smaller, "--base", home / "bare")
    assert result.exit_code == 1
    assert "is not the base model of this checkpoint" in result.stdout


def test_items_asked_again_agree(home):
    before = {path: path.read_bytes() for path in (home / "smaller").rglob("*") if path.is_file()}
    said = done("audit", home / "smaller", "--recheck", 5, "--include-path", home / "tasks", "--device", "cpu").stdout
    assert said.startswith(f"the audit in {home / 'smaller'} repeats; 5 items asked again, 10 of 10 decisions the same")
    assert {path: path.read_bytes() for path in (home / "smaller").rglob("*") if path.is_file()} == before


def test_an_item_that_does_not_repeat_is_a_problem(home, monkeypatch):
    from layerprune.auditor import auditor, recheck

    found = recheck.RecheckResult(1, 2, 1, 0.4, ("toy: item 0123 does not repeat for the pruned model",))
    monkeypatch.setattr(auditor, "recheck", lambda *args, **kwargs: found)
    result = layerprune("audit", home / "smaller", "--recheck", 1)
    assert result.exit_code == 1
    assert "problem: toy: item 0123 does not repeat" in result.stdout
    assert "does NOT repeat: 1 problem; 1 items asked again, 1 of 2 decisions the same" in result.stdout


def test_what_the_audit_has_settled_is_not_asked_otherwise(home):
    for words, name in (
        (["--tasks", "toy"], "tasks"), (["--num-fewshot", 0], "num-fewshot"), (["--no-generation"], "generation"),
        (["--dtype", "float32"], "dtype"), (["--limit", 3], "limit"),
    ):  # fmt: skip
        line = refused("audit", home / "smaller", "--recheck", 1, *words)
        assert f"--recheck asks items as audit.json says they were asked: leave --{name} out" in line


def test_the_option_of_earlier_versions_says_what_to_use(home):
    line = last_line("verify", home / "smaller", "--rerun", 20)
    assert line == "--rerun is gone: layerprune audit FOLDER --recheck N asks audited items again"
    with pytest.raises(UsageError, match="the option 'rerun' is gone: layerprune audit FOLDER --recheck N"):
        api.verify(home / "smaller", rerun=20)


def test_a_card_is_renewed_alone(home, smaller):
    card, ours = smaller / "README.md", (smaller / "README.md").read_bytes()
    before = {path: path.read_bytes() for path in smaller.rglob("*") if path.is_file() and path != card}
    mine = b"\r\nMy words,  byte for byte\t"
    card.write_bytes(ours.replace(b"## ", b"### ") + mine)
    assert done("card", smaller).stdout == f"written: {card}\n"
    assert card.read_bytes() == ours + mine
    front = b"---\nlicense:   mit   # as I like it\n---\n"
    card.write_bytes(front + b"My model, with no part of layerprune's\r\n")
    done("card", smaller)
    text = card.read_bytes()
    assert text.endswith(b"end -->\n\nMy model, with no part of layerprune's\r\n")
    assert b"license: mit\n" in text
    done("card", smaller)
    assert card.read_bytes() == text
    edited = text.replace(b"license: mit\n", b"license:   mit   # as I like it\n")
    card.write_bytes(edited)
    done("card", smaller)
    assert card.read_bytes() == edited  # metadata that say what they should are left as they are written
    assert verify(smaller).problems == ()
    assert {path: path.read_bytes() for path in smaller.rglob("*") if path.is_file() and path != card} == before


def test_a_card_that_is_missing_has_the_licence_of_the_bases(home, smaller, tmp_path):
    card = smaller / "README.md"
    ours = card.read_bytes()
    card.unlink()
    base = shutil.copytree(home / "base", tmp_path / "base")
    (base / "README.md").write_text("---\nlicense: mit\n---\n")
    done("card", smaller, "--base", base)
    assert "license: mit" in card.read_text()
    assert "is not the base of" in refused("card", smaller, "--base", home / "bare")
    card.unlink()
    done("card", smaller)
    assert card.read_bytes() == ours


def test_a_card_is_not_made_from_an_edited_audit(smaller):
    path, card = smaller / "layerprune" / "audit.json", (smaller / "README.md").read_bytes()
    Audit.load(path).model_copy(update={"device": "a faster one"}).save(path)
    assert "layerprune/audit.json is not the one that README.md names; put it back" in refused("card", smaller)
    assert (smaller / "README.md").read_bytes() == card
    assert "is not an exported checkpoint" in refused("card", smaller / "layerprune")


def test_bad_input_is_one_line(home, tmp_path):
    assert "does not exist" in refused("verify", tmp_path / "nowhere")
    items = len(Audit.load(home / "smaller" / "layerprune" / "audit.json").tasks[0].data.fingerprints)
    assert f"the audit has {items}" in last_line("audit", home / "smaller", "--recheck", items + 1)
    assert "does not exist" in refused("push", tmp_path / "nowhere", "me/model")


def test_a_dry_run_lists_what_would_go_and_sends_nothing(home, hub):
    said = done("push", home / "smaller", "me/smaller", "--dry-run").stdout
    assert "model.safetensors" in said
    assert "layerprune/audit.json" in said
    assert "deleted from the repo, where an earlier push left others: *.safetensors, " in said
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
