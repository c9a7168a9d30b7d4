"""Pushing over HTTP against a stand-in for the Hub on loopback."""

import hashlib
import shutil

import audit_tiny as tiny
import hub_standin
import pytest

from layerprune.audit import audit
from layerprune.audit.verify import verify
from layerprune.documents import FileEntry, Receipt
from layerprune.errors import UsageError
from layerprune.hub import PushError, push


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    base = tiny.base_model(folder / "base")
    tiny.questions(base, folder / "tasks", test=20)
    out = tiny.exported(base, folder / "out")
    path = out / "layerprune" / "receipt.json"
    files = {
        file.name: FileEntry(sha256=hashlib.sha256(file.read_bytes()).hexdigest(), bytes=file.stat().st_size)
        for file in out.iterdir()
        if file.is_file()
    }
    Receipt.load(path).model_copy(update={"files": files}).save(path)
    audit(out, ["toy"], include_path=[folder / "tasks"], generation=False)
    return out


@pytest.fixture
def hub(monkeypatch):
    """The stand-in, and huggingface_hub told to use it (its settings are read at import, so they are set there)."""
    from huggingface_hub import constants

    server = hub_standin.Hub()
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", hub_standin.TOKEN)
    yield server
    server.shutdown()
    server.server_close()


def pushed(folder, **options):
    waits = []
    return push(folder, "me/smaller", wait=waits.append, **options), waits


def refused(folder, **options):
    waits = []
    with pytest.raises(PushError) as raised:
        push(folder, "me/smaller", wait=waits.append, **options)
    return str(raised.value), waits


def test_what_arrives_is_the_folder_and_verifies(hub, made, tmp_path):
    found, _ = pushed(made)
    stored = hub.repos["me/smaller"]["files"]
    assert {"model.safetensors", "README.md", "report.html", "layerprune/audit.json"} <= set(stored) == set(found.files)
    for name, content in stored.items():
        path = tmp_path / "again" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    assert verify(tmp_path / "again").problems == ()
    assert found.url.startswith(hub.url)


def test_a_cut_upload_is_taken_up_again_and_nothing_is_sent_twice(hub, made):
    hub.faults = [("/api/repos/create", "cut"), ("/commit/", 504), ("/commit/", "cut"), ("/preupload/", "cut")]
    _, waits = pushed(made)
    assert "model.safetensors" in hub.repos["me/smaller"]["files"]
    assert len(hub.puts) == len(set(hub.puts)) == 1
    assert hub.faults == []
    assert len(waits) >= 2


def test_a_hub_that_stays_down_is_given_up_in_words(hub, made):
    hub.faults = [("/api/repos/create", 503)] * 50
    said, waits = refused(made)
    assert "HTTP 503: the Hub failed" in said
    assert waits == [2.0, 4.0, 8.0]


@pytest.mark.parametrize(("status", "said"), [(403, "may not write there"), (400, "does not accept the content")])
def test_a_refusal_says_why_and_is_not_repeated(hub, made, status, said):
    hub.faults = [("/commit/", status)]
    message, waits = refused(made)
    assert said in message
    assert waits == []


def test_too_many_requests_are_waited_out(hub, made):
    hub.faults = [("/api/repos/create", 429)]
    _, waits = pushed(made)
    assert waits == [2.0]


def test_a_wrong_token_is_named_and_not_shown(hub, made, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "hf_wrong_and_secret")
    said, _ = refused(made)
    assert "HTTP 401: the token is missing or not valid" in said
    assert "secret" not in said + "".join(capsys.readouterr())


def test_a_name_that_is_no_repo_is_refused(hub, made):
    with pytest.raises(PushError, match="is not a repo name"):
        push(made, "a/b/c", wait=lambda _: None)


def test_a_pull_request_and_a_private_repo(hub, made):
    found, _ = pushed(made, create_pr=True, private=True)
    assert found.url.endswith("/discussions/1")
    assert hub.repos["me/smaller"]["private"]


def test_a_dry_run_sends_nothing(hub, made):
    found, _ = pushed(made, dry_run=True)
    assert found.url is None
    assert "model.safetensors" in found.files
    assert hub.seen == []


def test_unaudited_or_changed_folders_are_refused_before_anything_is_sent(made, tmp_path):
    changed = shutil.copytree(made, tmp_path / "changed")
    (changed / "config.json").write_text("{}")
    with pytest.raises(UsageError, match=r"config\.json"):
        push(changed, "me/smaller", dry_run=True)
    unaudited = shutil.copytree(made, tmp_path / "unaudited")
    (unaudited / "layerprune" / "audit.json").unlink()
    (unaudited / "report.html").unlink()
    from layerprune.report.card import write_card

    write_card(unaudited)
    with pytest.raises(UsageError, match="has not been audited"):
        push(unaudited, "me/smaller", dry_run=True)
    assert push(unaudited, "me/smaller", dry_run=True, allow_unaudited=True).url is None
