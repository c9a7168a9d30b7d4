"""Pushing over HTTP against a stand-in for the Hub on loopback."""

import hashlib
import json
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest

import audit_tiny as tiny
import heal_tiny
import hub_standin
from layerprune.artifacts import HealLog, Receipt
from layerprune.auditor import audit
from layerprune.auditor.verification import verify
from layerprune.errors import UsageError
from layerprune.hub import PushError, check_no_path, push
from layerprune.report.card import END, read_card, write_card


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return tiny.audited(tmp_path_factory.mktemp("made"), 20)


@pytest.fixture(scope="module")
def base(made):
    return made.parent / "base"


@pytest.fixture
def hub(monkeypatch):
    """The stand-in, and huggingface_hub told to use it (its settings are read at import, so they are set there)."""
    from huggingface_hub import constants

    server = hub_standin.Hub()
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", hub_standin.TOKEN)
    yield server
    server.shutdown()
    server.server_close()


class Told:
    """A progress that keeps what it is told."""

    def __init__(self):
        self.notes = []

    def task(self, description, total, unit=""):
        return nullcontext(lambda amount=1: None)

    def note(self, message):
        self.notes.append(message)


def pushed(folder, **options):
    waits = []
    return push(folder, "me/smaller", wait=waits.append, **options), waits


def refused(folder, **options):
    waits = []
    with pytest.raises(PushError) as raised:
        push(folder, "me/smaller", wait=waits.append, **options)
    return str(raised.value), waits


def test_what_arrives_is_the_folder_and_verifies_when_downloaded_again(hub, made, tmp_path):
    from huggingface_hub import snapshot_download

    found, _ = pushed(made)
    stored = hub.repos["me/smaller"]["files"]
    assert {"model.safetensors", "README.md", "report.html", "layerprune/audit.json"} <= set(stored) == set(found.files)
    again = snapshot_download("me/smaller", local_dir=tmp_path / "again")
    assert verify(Path(again)).problems == ()
    assert (Path(again) / "model.safetensors").read_bytes() == (made / "model.safetensors").read_bytes()
    assert found.url.startswith(hub.url)


def test_what_an_earlier_push_left_is_replaced_and_other_files_stay(hub, made, tmp_path):
    earlier(hub, made, tmp_path)
    stored, old = hub.repos["me/smaller"]["files"], dict(hub.repos["me/smaller"]["files"])
    others = ("examples.py", "pictures/plot.png", ".gitattributes", "lora/adapter_model.safetensors", "layerprune/x")
    stored |= dict.fromkeys(others, b"theirs")
    found, _ = pushed(made)
    assert set(stored) == {*found.files, *others}
    assert {"model-00001-of-00002.safetensors", "pooling/model.safetensors", "layerprune/heal.json"} <= {*old}
    for name in ("model.safetensors", "config.json", "layerprune/receipt.json"):
        assert stored[name] == (made / name).read_bytes() != old[name]
    assert [stored[name] for name in others] == [b"theirs"] * len(others)
    for name in others:
        del stored[name]
    assert verify(published(hub, tmp_path / "again")).problems == ()


def earlier(hub, made, folder):
    """Have the repo hold the push of another export, one that was sharded and healed."""
    other = tiny.exported(made.parent / "base", folder / "earlier", layer=2)
    (other / "config.json").write_text((other / "config.json").read_text() + "\n")
    push(tiny.with_files(other), "me/smaller", allow_unaudited=True)
    files = hub.repos["me/smaller"]["files"]
    shards = {"model-00001-of-00002.safetensors": b"1", "pooling/model.safetensors": b"2"}
    shards["model.safetensors.index.json"] = b"{}"
    named = {name: {"sha256": hashlib.sha256(data).hexdigest(), "bytes": 1} for name, data in shards.items()}
    files |= {**shards, "layerprune/heal.json": json.dumps({"kind": "heal", "files": named}).encode()}
    hub.seen.clear()


def stopped(hub, made, files):
    """What a push says to files that somebody put into the repo; nothing is sent, and the repo stays as it is."""
    hub.change("me/smaller", files)
    before = dict(hub.repos["me/smaller"]["files"])
    with pytest.raises(UsageError) as raised:
        pushed(made)
    assert hub.repos["me/smaller"]["files"] == before
    assert not any(part in path for _, path in hub.seen for part in ("preupload", "lfs", "commit/"))
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_files_of_others_in_the_way_stop_a_push_before_anything_is_sent(hub, made):
    hub.repos["me/smaller"] = {"files": {"notes.txt": b"theirs"}, "private": False}
    assert stopped(hub, made, {"config.json": b"{}"}) == (
        "me/smaller holds files that no push of layerprune left there as they are, in the way of this one: "
        "config.json; nothing was sent: move them away in the repo, or push to another one"
    )
    ways = ["config.json", "layerprune/plan.json", "model.safetensors", "pytorch.safetensors", "report.html"]
    said = stopped(hub, made, dict.fromkeys(ways, b"theirs"))
    assert f"in the way of this one: {', '.join(ways)}; nothing was sent" in said
    more = stopped(hub, made, {"tokenizer.json": b"theirs"})
    assert f"in the way of this one: {', '.join(ways)} and 1 more; nothing was sent" in more
    hub.change("me/smaller", dict.fromkeys([*ways, "tokenizer.json"]))
    pushed(made)
    assert hub.repos["me/smaller"]["files"]["notes.txt"] == b"theirs"


def test_files_that_are_there_and_equal_are_in_nobodys_way(hub, made):
    files = {name: (made / name).read_bytes() for name in ("model.safetensors", "config.json")}
    hub.repos["me/smaller"] = {"files": files, "private": False}
    pushed(made)
    assert "layerprune/receipt.json" in files


def test_what_was_changed_since_the_earlier_push_is_somebodys(hub, made, tmp_path):
    earlier(hub, made, tmp_path)
    config = hub.repos["me/smaller"]["files"]["config.json"]
    assert "in the way of this one: config.json;" in stopped(hub, made, {"config.json": config + b"\n"})
    weights = {"config.json": config, "model-00001-of-00002.safetensors": b"3"}
    assert "in the way of this one: model-00001-of-00002.safetensors;" in stopped(hub, made, weights)


THEIRS = b"""---
license: cc0-1.0  # as they like it
tags:
- theirs
pipeline_tag: fill-mask
model-index:
- name: Theirs
  results: []
widget: []
---
# Their title\r
\r
Their words.  """


def test_a_card_of_others_gets_our_part_and_keeps_its_words_and_metadata(hub, made, tmp_path):
    hub.repos["me/smaller"] = {"files": {"README.md": THEIRS}, "private": False}
    stored, local = hub.repos["me/smaller"]["files"], (made / "README.md").read_bytes()
    pushed(made)
    assert (made / "README.md").read_bytes() == local
    assert stored["README.md"].endswith(f"{END}\n\n# Their title\r\n\r\nTheir words.  ".encode())
    out = published(hub, tmp_path)
    (metadata, body), own = read_card(out / "README.md"), read_card(made / "README.md")
    assert "| audit.json | `sha256:" in body
    assert "cc0-1.0" in body
    assert (metadata["license"], metadata["widget"]) == ("cc0-1.0", [])
    assert metadata["tags"] == ["theirs", *own[0]["tags"]]
    assert metadata["pipeline_tag"] == own[0]["pipeline_tag"]
    assert metadata["model-index"] == [*own[0]["model-index"], {"name": "Theirs", "results": []}]
    assert verify(out).problems == ()
    first = stored["README.md"]
    changed = first.replace(b"Their words.", b"Their new words.").replace(b"## ", b"### ")
    hub.change("me/smaller", {"README.md": changed})
    pushed(made)
    assert stored["README.md"] == first.replace(b"Their words.", b"Their new words.")


def test_words_of_both_sides_are_told_of_and_a_card_that_holds_theirs_goes(hub, made, tmp_path):
    copy, said, again = shutil.copytree(made, tmp_path / "copy"), Told(), Told()
    card = copy / "README.md"
    card.write_text(card.read_text() + "\nMy own words.\n")
    hub.repos["me/smaller"] = {"files": {"README.md": b"Theirs.\n"}, "private": False}
    push(copy, "me/smaller", progress=said)
    stored = hub.repos["me/smaller"]["files"]
    assert stored["README.md"].endswith(b"\nTheirs.\n")
    assert b"My own words" not in stored["README.md"]
    assert any("the words of the card in me/smaller are kept" in note for note in said.notes)
    card.write_text(card.read_text() + "Theirs.\n")
    push(copy, "me/smaller", progress=again)
    assert stored["README.md"].endswith(b"\nMy own words.\nTheirs.\n")
    assert not any("are kept" in note for note in again.notes)


def test_a_card_of_others_that_cannot_be_read_stops_the_push(hub, made):
    hub.repos["me/smaller"] = {"files": {}, "private": False}
    for card, why in (
        (b"---\nlicense: [\n---\n", "README.md: the metadata between the --- lines is not YAML"),
        (b"\xff", "README.md cannot be read, a card is text in UTF-8"),
    ):
        said = stopped(hub, made, {"README.md": card})
        assert said.startswith(f"the card in me/smaller cannot be joined: {why}")


def test_a_commit_of_others_meanwhile_is_looked_at_and_never_overwritten(hub, made):
    hub.repos["me/smaller"] = {"files": {"README.md": b"Old.\n"}, "private": False}
    hub.meanwhile = [lambda: hub.change("me/smaller", {"README.md": b"New.\n"})]
    _, waits = pushed(made)
    assert waits == [2.0]
    assert hub.repos["me/smaller"]["files"]["README.md"].endswith(b"\nNew.\n")
    hub.repos, hub.meanwhile = {}, [lambda: hub.change("me/smaller", {"config.json": b"{}"})]
    with pytest.raises(UsageError, match=r"in the way of this one: config\.json"):
        pushed(made)
    assert hub.repos["me/smaller"]["files"] == {"config.json": b"{}"}
    hub.repos, hub.meanwhile = {}, [lambda: hub.change("me/smaller", {"a": b""})] * 4
    said, _ = refused(made)
    assert "HTTP 412: others commit to it at the same time" in said


def test_a_download_that_breaks_is_taken_up_again(hub, made):
    hub.repos["me/smaller"] = {"files": {"README.md": b"Theirs.\n"}, "private": False}
    hub.faults = [("/resolve/", "cut"), ("/resolve/", 503)]
    pushed(made)
    assert hub.faults == []
    assert hub.repos["me/smaller"]["files"]["README.md"].endswith(b"\nTheirs.\n")


def test_a_hub_id_that_cannot_be_one_is_refused_before_anything_is_asked(hub, made, tmp_path):
    with pytest.raises(UsageError, match="'/models/base' is not a Hub id"):
        push(made, "me/smaller", base_model="/models/base")
    assert hub.seen == []


def published(hub, folder):
    for name, content in hub.repos["me/smaller"]["files"].items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


def test_documents_arrive_as_they_are_and_no_file_holds_a_path(hub, made, tmp_path):
    before = {path.name: path.read_bytes() for path in (made / "layerprune").iterdir()}
    assert str(made.parent / "base").encode() in before["locator.json"]
    said = Told()
    push(made, "me/smaller", progress=said)
    assert "the card names no base_model: give --base-model org/name if the base is on the Hub" in said.notes
    files = hub.repos["me/smaller"]["files"]
    assert "layerprune/locator.json" not in files
    assert not any(str(made.parent).encode() in content for content in files.values())
    out = published(hub, tmp_path)
    assert Receipt.load(out / "layerprune" / "receipt.json").base.id == "base"
    assert verify(out).problems == ()
    assert verify(out).digests == verify(made).digests
    assert "base_model" not in read_card(out / "README.md")[0]
    assert before == {path.name: path.read_bytes() for path in (made / "layerprune").iterdir()}


def test_a_published_folder_is_audited_with_its_base_named(hub, made, base, tmp_path):
    push(made, "me/smaller")
    out = published(hub, tmp_path)
    words = ["audit", out, "--tasks", "toy", "--include-path", made.parent / "tasks", "--no-generation"]
    # another process, which has not read the base, as on another machine
    elsewhere = subprocess.run(
        [sys.executable, "-m", "layerprune", *words], capture_output=True, text=True, check=False
    )
    assert elsewhere.returncode == 2
    assert "base was a local folder, and nothing here says where it lies; give --base" in elsewhere.stderr
    audit(out, ["toy"], base=str(base), include_path=[made.parent / "tasks"], generation=False)
    assert verify(out, base=str(base)).problems == ()


def test_a_named_base_has_the_very_files_that_the_hub_has(hub, made, base, tmp_path):
    weights = (base / "model.safetensors").read_bytes()
    hub.blobs[hashlib.sha256(weights).hexdigest()] = weights
    hub.repos["org/base"] = {"files": {"model.safetensors": weights, "config.json": b"{}"}, "private": False}
    copy, said = shutil.copytree(made, tmp_path / "copy"), Told()
    push(copy, "me/smaller", base_model="org/base", dry_run=True)
    assert "base_model" not in read_card(copy / "README.md")[0]
    push(copy, "me/smaller", base_model="org/base", progress=said)
    assert said.notes == ["base_model: org/base (sha256 of 1 weight file equal on the Hub)"]
    out = published(hub, tmp_path / "again")
    metadata = read_card(out / "README.md")[0]
    assert (metadata["base_model"], metadata["base_model_relation"]) == ("org/base", "finetune")
    assert verify(out).problems == verify(copy).problems == ()
    assert verify(out).digests == verify(made).digests
    push(copy, "me/smaller")  # the card keeps what it was told
    assert read_card(published(hub, tmp_path / "third") / "README.md")[0]["base_model"] == "org/base"


def test_the_log_of_a_healing_is_published_in_the_same_chain(hub, tmp_path, monkeypatch):
    from layerprune.healing import HEALERS
    from layerprune.healing.healer import heal

    monkeypatch.setitem(HEALERS.builtin, "scaling", "heal_tiny:Scaling")
    pruned = heal_tiny.pruned(tmp_path, 2)
    heal(pruned, tmp_path / "once", method="scaling:factor=2")
    heal(tmp_path / "once", tmp_path / "twice", method="scaling:factor=0.5")
    push(tmp_path / "twice", "me/smaller", allow_unaudited=True)
    out = published(hub, tmp_path / "again")
    assert verify(out).problems == ()
    log = HealLog.load(out / "layerprune" / "heal.json")
    assert [step.base.id for step in log.steps] == ["base", "base"]
    assert verify(out).digests == verify(tmp_path / "twice").digests
    assert not any(str(tmp_path).encode() in content for content in hub.repos["me/smaller"]["files"].values())


def test_another_model_is_not_taken_for_the_base(hub, made):
    other = b"other weights"
    hub.blobs[hashlib.sha256(other).hexdigest()] = other
    hub.repos["org/base"] = {"files": {"model.safetensors": other}, "private": False}
    with pytest.raises(UsageError, match=r"org/base is not the base of this checkpoint.*has another file of that name"):
        push(made, "me/smaller", base_model="org/base")
    said, _ = refused(made, base_model="org/nowhere")
    assert "HTTP 404" in said
    assert "me/smaller" not in hub.repos


def test_a_folder_that_holds_another_model_by_now_names_no_base(hub, made, base, tmp_path):
    weights = base / "model.safetensors"
    kept = weights.read_bytes()
    other = (made / "model.safetensors").read_bytes()
    hub.repos["org/base"] = {"files": {"model.safetensors": other}, "private": False}
    weights.write_bytes(other)  # what the Hub has, and not what was pruned
    try:
        for dry_run in (False, True):
            with pytest.raises(UsageError, match="the folder base no longer holds the base of this checkpoint"):
                push(made, "me/smaller", base_model="org/base", dry_run=dry_run)
    finally:
        weights.write_bytes(kept)
    assert hub.seen == []


def test_a_base_that_is_gone_is_named_without_proof_and_says_so(hub, made, base, tmp_path):
    hub.repos["org/base"] = {"files": {}, "private": False}
    copy, said = shutil.copytree(made, tmp_path / "copy"), Told()
    moved = base.rename(base.parent / "moved")
    try:
        push(copy, "me/smaller", base_model="org/base", progress=said)
    finally:
        moved.rename(base)
    assert said.notes == ["base_model: org/base (not compared, the base's folder is not known here)"]


def test_a_path_in_any_other_file_stops_the_push(hub, made, tmp_path):
    copy = shutil.copytree(made, tmp_path / "copy")
    card = copy / "README.md"
    card.write_text(card.read_text() + f"\nMade from {made.parent / 'base'}\n")
    with pytest.raises(UsageError, match=r"README\.md holds the path of the local folder base"):
        push(copy, "me/smaller")
    assert hub.seen == []


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('from_pretrained("path/or/repo/of/this/model")', False),
        ("./model", False),
        ("/models and /model-2 and /model.bin and /model_3", False),
        ("/model", True),
        ("made from /model.", True),
        ("made from /model. It is", True),
        ('{"id": "/model"}', True),
        ("/model/config.json", True),
        ("file:///model", True),
    ],
)
def test_a_path_is_found_whole_and_not_as_a_part_of_another(tmp_path, text, found):
    (tmp_path / "README.md").write_text(text)
    for path in ("/model", "/model/"):
        if found:
            with pytest.raises(UsageError, match="holds the path of the local folder model"):
                check_no_path(tmp_path, ["README.md"], path)
        else:
            check_no_path(tmp_path, ["README.md"], path)


def test_metadata_that_the_hub_would_refuse_is_refused_here(hub, made, tmp_path):
    copy = unaudited(made, tmp_path)
    card = copy / "README.md"
    card.write_text(card.read_text().replace("---\n", "---\neval_results: all of them\n", 1))
    with pytest.raises(UsageError, match=r"README\.md has metadata that the Hub does not take"):
        push(copy, "me/smaller", allow_unaudited=True)
    assert hub.seen == []


def unaudited(made, tmp_path):
    copy = shutil.copytree(made, tmp_path / "unaudited")
    (copy / "layerprune" / "audit.json").unlink()
    (copy / "report.html").unlink()
    write_card(copy)
    return copy


def test_a_pull_request_has_no_branch_of_its_own(made):
    with pytest.raises(UsageError, match="a pull request is always made to main"):
        push(made, "me/smaller", create_pr=True, revision="dev")


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


@pytest.mark.parametrize("place", ["/api/repos/create", "/preupload/", "/commit/"])
def test_a_page_in_place_of_an_answer_is_told_of_as_such(hub, made, place):
    hub.faults = [(place, "page")]
    said, waits = refused(made)
    assert "the answer is not the Hub's" in said
    assert "a proxy or a login page may stand in between" in said
    assert waits == []


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
    with pytest.raises(UsageError, match="'a/b/c' is no name of a Hub repo; write owner/name"):
        push(made, "a/b/c", wait=lambda _: None)


def test_a_pull_request_and_a_private_repo(hub, made):
    found, _ = pushed(made, create_pr=True, private=True)
    assert found.url.endswith("/discussions/1")
    assert hub.repos["me/smaller"]["private"]


def test_an_upload_that_fails_inside_the_client_is_told_like_any_other(hub, made, monkeypatch):
    """huggingface_hub raises RuntimeError from whatever goes wrong with an LFS file."""
    import huggingface_hub.lfs

    hub.faults = [("/lfs/", 425)]
    _, waits = pushed(made)
    assert waits == [2.0]
    hub.repos, hub.blobs, hub.faults = {}, {}, [("/lfs/", 403)]
    said, waits = refused(made)
    assert said.startswith("me/smaller: the Hub answered HTTP 403: the token may not write there")
    assert waits == []

    def fail(*args, **kwargs):
        raise ValueError("no such part")

    monkeypatch.setattr(huggingface_hub.lfs, "_upload_single_part", fail)
    said, waits = refused(made)
    assert (said, waits) == ("me/smaller: the Hub's client failed: no such part", [])


@pytest.mark.parametrize("fault", ["cut", 504])
def test_a_pull_request_whose_answer_is_lost_is_not_opened_again(hub, made, fault):
    hub.faults = [("/commit/", fault)]
    said, waits = refused(made, create_pr=True)
    assert "so the pull request may be open: look at the pull requests of me/smaller" in said
    assert waits == []
    assert sum("/commit/" in path for _, path in hub.seen) == 1


def test_a_pull_request_is_asked_for_again_when_it_cannot_have_been_opened(hub, made):
    hub.repos["me/smaller"] = {"files": {"notes.txt": b"mine"}, "private": False}
    hub.faults = [("/api/repos/create", 503), ("/preupload/", "cut"), ("/commit/", 429)]
    found, waits = pushed(made, create_pr=True)
    assert hub.faults == []
    assert len(waits) >= 2
    assert found.url.endswith("/discussions/1")
    assert set(hub.repos["me/smaller"]["files"]) == {*found.files, "notes.txt"}


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
    copy = unaudited(made, tmp_path)
    with pytest.raises(UsageError, match="has not been audited"):
        push(copy, "me/smaller", dry_run=True)
    assert push(copy, "me/smaller", dry_run=True, allow_unaudited=True).url is None
