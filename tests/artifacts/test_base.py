"""Documents: same content, same bytes, same hash; what does not fit is refused in one line; never half a file."""

import hashlib
import json
import os
from typing import ClassVar, Literal

import pytest
from pydantic import ValidationError

import audit_samples as samples
from audit_samples import scores
from layerprune.artifacts import Candidate, Document, EngineReport, Front, HealLog, Outcomes, Plan, Receipt, as_removal
from layerprune.artifacts.base import pretty, write_atomically
from layerprune.errors import DocumentError


def test_a_document_reads_back_as_it_was_written(tmp_path):
    for document in (samples.plan(), scores(), samples.receipt()):
        path = document.save(tmp_path / document.filename)
        assert type(document).load(path) == document


def test_the_same_content_gives_the_same_bytes_and_hash(tmp_path):
    first, second = samples.plan(), samples.plan(versions={"transformers": "5.23.0", "layerprune": "0.1.0"})
    assert first.save(tmp_path / "a").read_bytes() == second.save(tmp_path / "b").read_bytes()
    assert first.sha256() == second.sha256()
    assert first.sha256() != samples.plan(seed=1).sha256()


def test_what_is_hashed_is_json_with_sorted_keys_no_spaces_and_every_field():
    class Small(Document):
        kind: Literal["small"] = "small"
        format: Literal[1] = 1
        text: str = "ü"
        nothing: float | None = None
        headline: ClassVar[str] = "small"

    spelled = '{"format":1,"kind":"small","nothing":null,"text":"ü"}'
    assert Small().canonical_json() == spelled
    assert Small().sha256() == hashlib.sha256(spelled.encode()).hexdigest()


def test_written_json_is_made_for_reading_and_is_json():
    value = {"b": [1, 2, 3], "a": {"deep": [{"x": 1}, {"y": []}]}, "empty": {}, "text": "ü"}
    text = pretty(value)
    assert json.loads(text) == value
    assert '"b": [1, 2, 3]' in text
    assert text.index('"a"') < text.index('"b"')
    assert "ü" in text


def test_a_document_is_frozen_and_takes_no_unknown_key():
    with pytest.raises(ValidationError):
        samples.plan().seed = 3
    with pytest.raises(ValidationError, match="extra"):
        samples.plan(sedd=3)
    with pytest.raises(ValidationError, match="finite"):
        Candidate(removal=(1,), score=float("nan"))


def certificate(removal):
    step = {"right_to_wrong": 0, "wrong_to_right": 1, "p_value": 0.01}
    steps = [step | {"removal": removal, "certified": True}, step | {"removal": [1, 3, 11], "certified": False}]
    return {"limit": 0.02, "confidence": 0.95, "statement": "", "fingerprints": {}, "steps": steps}


def test_a_certificate_of_the_plans_own_removal_stands():
    assert Plan.model_validate(json.loads(samples.plan().model_dump_json()) | {"certificate": certificate([3, 11])})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data.update(kind="scores"), "is a 'scores' document; expected 'plan'"),
        (lambda data: data.update(format=2), "has format 2; this layerprune reads format 1"),
        (lambda data: data.update(seed="many"), "seed: Input should be a valid integer"),
        (lambda data: data["model"].pop("layers"), "model.layers: Field required"),
        (lambda data: data.update(extra=1), "extra: Extra inputs are not permitted"),
        (lambda data: data.update(removal=[1, 4]), "order names [11, 3] and removal [1, 4]"),
        (lambda data: data.update(certificate=certificate([3, 12])), "certificate is of another removal"),
    ],
)
def test_a_faulty_document_is_refused_by_file_and_field(tmp_path, change, message):
    path = samples.plan().save(tmp_path / "plan.json")
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    with pytest.raises(DocumentError) as raised:
        Plan.load(path)
    assert str(raised.value).startswith(str(path))
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "cannot be read: not JSON: Expecting"),
        (b"[]", "holds list where a plan.json object"),
        (b"\xff\xfe", "cannot be read: 'utf-8' codec"),
        (b"[" * 9999, "cannot be read: nested more than 100 levels deep"),
        (b'{"kind": ' + b"9" * 5000 + b"}", "cannot be read: a number of 5000 digits; 100 are read"),
        (b'{"kind": "\\ud800"}', r"cannot be read: half a surrogate pair, '\\ud800'"),
        (b'{"kind": NaN}', "cannot be read: NaN is no JSON number"),
        (b"version https://git-lfs.github.com/spec/v1\n", "cannot be read: a git-lfs pointer in place of the file"),
    ],
)
def test_what_is_no_document_is_refused(tmp_path, content, message):
    path = tmp_path / "plan.json"
    path.write_bytes(content)
    with pytest.raises(DocumentError, match=message):
        Plan.load(path)


def test_a_missing_document_is_refused(tmp_path):
    with pytest.raises(DocumentError, match=r"plan.json does not exist; expected a plan.json"):
        Plan.load(tmp_path / "plan.json")
    with pytest.raises(DocumentError, match="cannot be read"):
        Plan.load(tmp_path)


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "plan.json"
    write_atomically(path, b"old")

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["plan.json"]


def test_a_written_document_has_the_modes_of_an_ordinary_file(tmp_path):
    ordinary = tmp_path / "ordinary"
    ordinary.write_bytes(b"")
    assert write_mode(samples.plan().save(tmp_path / "plan.json")) == write_mode(ordinary)


def write_mode(path):
    return path.stat().st_mode & 0o777


def test_outcomes_know_their_means():
    outcomes = Outcomes(correct="1101", gold_probability=(0.5, 0.5, 1.0, 0.0))
    assert outcomes.accuracy == 0.75
    assert outcomes.mean_gold_probability == 0.5
    assert Outcomes(correct="10").mean_gold_probability is None


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"correct": "170"}, "holds '7'"),
        ({"correct": "10", "gold_probability": (0.5,)}, "gold_probability is of 1 items and correct of 2"),
        ({"correct": "10", "margin": (0.5, 1.0, 2.0)}, "margin is of 3 items"),
    ],
)
def test_outcomes_that_are_not_of_one_list_of_items_are_refused(given, message):
    with pytest.raises(ValidationError, match=message):
        Outcomes(**given)


def test_layers_of_a_document_become_a_removal():
    assert as_removal((5, 2)).layers == (2, 5)
    with pytest.raises(ValidationError, match=r"2\.5 is not a whole layer"):
        Candidate(removal=(1, 2.5), score=0.0)


def test_an_attention_implementation_stands_in_a_document_only_where_one_was_asked_for(tmp_path):
    """A document without keeps the bytes and the hash that it had before there was the option."""
    plain = EngineReport(path="trees", dtype="float32", device="cpu", computed=1, naive=2)
    assert plain.model_dump(mode="json") == {
        "path": "trees", "dtype": "float32", "device": "cpu", "computed": 1, "naive": 2,
    }  # fmt: skip
    told = plain.model_copy(update={"attention": "eager"})
    assert told.model_dump(mode="json") == {**plain.model_dump(mode="json"), "attention": "eager"}
    log = HealLog.model_validate(healed())
    assert "attention" not in log.canonical_json()
    told = log.model_copy(update={"attention": "eager"})
    assert HealLog.load(told.save(tmp_path / "heal.json")).attention == "eager"
    assert told.sha256() != log.sha256()


BAD_NAMES = ("../x", "/etc/passwd", "a/../../x", "a\\b", "C:\\x", "a\0b", "a\nb", "", ".", "a//b", "\ud800")
ENTRY = {"sha256": "0" * 64, "bytes": 1}


def healed():
    """A healing log after another one, as plain data."""
    own = samples.receipt()
    log = {
        "kind": "heal", "format": 1, "base": own.base, "unhealed": own.result, "result": own.result, "changed": [],
        "method": {"name": "a", "spec": "a", "options": {}, "gradients": False, "owner": "test"}, "tokens": 0,
        "plan_sha256": "", "receipt_sha256": "", "files": {}, "seconds": 0, "dtype": "", "device": "", "seed": 0,
        "versions": {},
    }  # fmt: skip
    return HealLog.model_validate({**log, "earlier": log}).model_dump(mode="json")


def front():
    point = {
        "removal": [1], "plan": "plan-01.json", "plan_sha256": "", "parameters": 1, "bytes": 1, "accuracy": 0,
        "accuracy_difference": 0, "interval": [0, 0], "tasks": {},
    }  # fmt: skip
    plan = samples.plan().model_dump(mode="json")
    return {
        "kind": "front", "format": 1, "bytes": 1, "accuracy": 0, "source": "", "points": [point], "scores_sha256": "",
        **{key: plan[key] for key in ("model", "metric", "search", "limits", "seed", "versions")},
    }  # fmt: skip


NAMED = {  # where documents name files: how to put a name there
    "receipt.files": (Receipt, lambda name: samples.receipt().model_dump(mode="json") | {"files": {name: ENTRY}}),
    "receipt.dropped": (Receipt, lambda name: samples.receipt().model_dump(mode="json") | {"dropped_files": [name]}),
    "heal.files": (HealLog, lambda name: healed() | {"files": {name: ENTRY}}),
    "heal.earlier": (HealLog, lambda name: healed() | {"earlier": healed() | {"files": {name: ENTRY}}}),
    "front.plan": (Front, lambda name: front() | {"points": [front()["points"][0] | {"plan": name}]}),
}


@pytest.mark.parametrize("where", NAMED)
@pytest.mark.parametrize("name", BAD_NAMES, ids=ascii)
def test_every_name_of_a_file_is_one_inside_the_folder(tmp_path, where, name):
    kind, put = NAMED[where]
    kind.parse(put("plan-02.json"), "good")
    (tmp_path / kind.filename).write_text(json.dumps(put(name)))
    with pytest.raises(DocumentError) as error:
        kind.load(tmp_path / kind.filename)
    assert "\n" not in str(error.value)
    str(error.value).encode()


def test_a_front_names_plans_alone():
    """What it names is removed when it is made anew."""
    with pytest.raises(DocumentError, match=r"points\.0\.plan"):
        Front.parse(NAMED["front.plan"][1]("scores.json"), "front.json")


def test_two_names_that_are_one_file_where_case_does_not_count():
    both = samples.receipt().model_dump(mode="json") | {"files": {"LICENSE": ENTRY, "license": ENTRY}}
    with pytest.raises(DocumentError, match="'LICENSE' and 'license', which are one file"):
        Receipt.parse(both, "receipt.json")


def test_a_document_that_could_not_be_read_back_is_not_written(tmp_path, monkeypatch):
    monkeypatch.setattr("layerprune.artifacts.base.MOST_DOCUMENT_BYTES", 500)
    with pytest.raises(DocumentError, match=r"would be .* long, and 500 B are read; use fewer items \(--limit\)"):
        samples.plan().save(tmp_path / "plan.json")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"format": True}, "has format True; this layerprune reads format 1"),
        ({"seed": "0"}, "seed: Input should be a valid integer"),
        ({"seed": True}, "seed: Input should be a valid integer"),
        ({"removal": ["3", "11"]}, r"removal\.0: "),
        ({"requested": 6}, "requested: Input should be a valid string"),
    ],
)
def test_a_value_of_another_type_is_not_taken_for_the_right_one(tmp_path, changes, said):
    data = json.loads(samples.plan().save(tmp_path / "plan.json").read_text())
    (tmp_path / "plan.json").write_text(json.dumps(data | changes))
    with pytest.raises(DocumentError, match=said):
        Plan.load(tmp_path / "plan.json")


@pytest.mark.parametrize("name", ["", "\x1b[31mred", "one\ntwo", "a\0b"])
def test_a_models_name_can_be_printed(tmp_path, name):
    data = json.loads(samples.plan().save(tmp_path / "plan.json").read_text())
    data["model"]["id"] = name
    (tmp_path / "plan.json").write_text(json.dumps(data))
    with pytest.raises(DocumentError, match=r"model\.id: .* is no name: it is empty, or holds what cannot be printed"):
        Plan.load(tmp_path / "plan.json")
