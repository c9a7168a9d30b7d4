"""The step that heals: what is published, how the documents hang together, what is refused before a byte is written."""

import json
import shutil
import threading

import pytest
import torch
from safetensors.torch import load_file, save_file

import heal_tiny
from cli_tiny import done, refused
from layerprune.artifacts import Audit, HealLog, HeldOut, Receipt
from layerprune.auditor.verification import verify
from layerprune.checkpoint import Checkpoint
from layerprune.errors import CheckpointError, DocumentError, ExportError, ModelError, UsageError
from layerprune.files import locked
from layerprune.healing import HEALERS
from layerprune.healing.healer import heal
from layerprune.registry import Registry

DOWN = "model.layers.0.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("heal")
    heal_tiny.pruned(folder, 2, 4)
    heal_tiny.prose(folder / "prose.txt")
    return folder


@pytest.fixture(autouse=True)
def scaling(monkeypatch):
    monkeypatch.setitem(HEALERS.builtin, "scaling", "heal_tiny:Scaling")


def tensors(folder):
    return {name: value for file in Checkpoint.open(folder).files for name, value in load_file(file).items()}


def test_only_what_was_changed_differs(home, tmp_path):
    source = home / "pruned-2-4"
    log = heal(source, tmp_path / "healed", method="scaling:factor=3")
    old, new = tensors(source), tensors(tmp_path / "healed")
    assert {name: (value.dtype, value.shape) for name, value in old.items()} == {
        name: (value.dtype, value.shape) for name, value in new.items()
    }
    assert [name for name in old if not torch.equal(old[name], new[name])] == [DOWN] == list(log.changed)
    assert torch.equal(new[DOWN], 3 * old[DOWN])
    carried = set(Receipt.load(source / "layerprune" / "receipt.json").files) - {"model.safetensors"}
    assert carried
    for name in carried:
        assert (tmp_path / "healed" / name).read_bytes() == (source / name).read_bytes()


def test_a_window_is_no_longer_than_what_the_model_reads(home, tmp_path):
    """Of a learned table of positions there is no more; the tiny model says 128."""
    text = str(home / "prose.txt")
    log = heal(home / "pruned-2-4", tmp_path / "healed", method="scaling:factor=3", corpus=text)
    assert log.corpus.window == 128
    with pytest.raises(UsageError, match="129 tokens is more than the 128 that the model reads; use --window 128"):
        heal(home / "pruned-2-4", tmp_path / "no", method="scaling:factor=3", corpus=text, window=129)
    assert not (tmp_path / "no").exists()


def test_the_documents_chain_and_verify_passes(home, tmp_path):
    log = heal(home / "pruned-2-4", tmp_path / "healed", method="scaling:factor=3")
    assert HealLog.load(tmp_path / "healed" / "layerprune" / "heal.json") == log
    receipt = Receipt.load(tmp_path / "healed" / "layerprune" / "receipt.json")
    assert (log.receipt_sha256, log.plan_sha256) == (receipt.sha256(), receipt.plan_sha256)
    assert log.unhealed == receipt.result
    assert log.method.spec == "scaling:factor=3.0"
    assert log.method.options == {"factor": 3.0, "parameter": DOWN}
    assert log.found == {"factor": 3.0}
    assert log.result.fingerprint == Checkpoint.open(tmp_path / "healed").fingerprint() != receipt.result.fingerprint
    found = verify(tmp_path / "healed", base=str(home / "base"))
    assert found.problems == ()
    assert set(found.digests) == {"plan", "receipt", "heal"}
    assert not [path for path in tmp_path.iterdir() if path.name != "healed"]  # nothing left of the work


def test_a_healing_goes_on_from_another(home, tmp_path):
    heal(home / "pruned-2-4", tmp_path / "once", method="scaling:factor=2")
    log = heal(tmp_path / "once", tmp_path / "twice", method="scaling:factor=4")
    assert torch.equal(tensors(tmp_path / "twice")[DOWN], 8 * tensors(home / "pruned-2-4")[DOWN])
    assert [step.method.options["factor"] for step in log.steps] == [2.0, 4.0]
    assert log.unhealed == log.earlier.result
    assert verify(tmp_path / "twice").ok


def test_the_card_says_which_healing_its_figures_are_before(home, tmp_path):
    text = str(home / "prose.txt")
    heal(home / "pruned-2-4", tmp_path / "once", method="scaling:factor=2", corpus=text)
    heal(tmp_path / "once", tmp_path / "twice", method="scaling:factor=4", corpus=text)
    assert "nats per token before healing, " in (tmp_path / "once" / "README.md").read_text()
    assert "nats per token before the last healing, " in (tmp_path / "twice" / "README.md").read_text()


def tamper(path, change):
    data = json.loads(path.read_text())
    change(data)
    HealLog.parse(data, "a test").save(path)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda data: data.update(receipt_sha256="0" * 64), "heal.receipt_sha256 is not the receipt's"),
        (lambda data: data.update(plan_sha256="0" * 64), "heal.plan_sha256 is not the plan's"),
        (lambda data: data["unhealed"].update(fingerprint="x"), "heal.unhealed is not the result of the step before"),
        (lambda data: data["result"].update(fingerprint="x"), "the weights' fingerprint is not the healing log's"),
        (lambda data: data["base"].update(fingerprint="x"), "heal.base is not the receipt's"),
        (lambda data: data["files"].pop("config.json"), "config.json: not a file that export, heal or audit wrote"),
    ],
)
def test_verify_finds_a_forged_log(home, tmp_path, change, problem):
    heal(home / "pruned-2-4", tmp_path / "healed", method="scaling")
    tamper(tmp_path / "healed" / "layerprune" / "heal.json", change)
    assert problem in verify(tmp_path / "healed").problems


def test_verify_finds_changed_weights(home, tmp_path):
    heal(home / "pruned-2-4", tmp_path / "healed", method="scaling")
    file = tmp_path / "healed" / "model.safetensors"
    weights = load_file(file)
    save_file({**weights, DOWN: weights[DOWN] + 1}, file, metadata={"format": "pt"})
    assert "model.safetensors: its sha256 is not the healing log's" in verify(tmp_path / "healed").problems


def test_held_out_loss_is_that_of_the_written_checkpoint(home, tmp_path):
    from transformers import AutoModelForCausalLM

    text = str(home / "prose.txt")
    log = heal(home / "pruned-2-4", tmp_path / "h", method="scaling:factor=0.5", corpus=text, window=32)
    from layerprune.data.corpus import build_corpus
    from layerprune.models.model import LoadedModel

    windows = build_corpus(text, LoadedModel.load(str(home / "base")).tokenizer, window=32).heldout
    for folder, said in ((home / "base", "base"), (home / "pruned-2-4", "before"), (tmp_path / "h", "after")):
        model = AutoModelForCausalLM.from_pretrained(folder)
        ids = torch.from_numpy(windows.ids)
        with torch.no_grad():
            own = [float(model(row[None], labels=torch.from_numpy(labels)[None]).loss) * int(mask[1:].sum())
                   for row, labels, mask in zip(ids, windows.labels, windows.counted, strict=True)]  # fmt: skip
        assert getattr(log.heldout, said) == pytest.approx(sum(own) / int(windows.counted[:, 1:].sum()), rel=1e-5)


def test_the_share_won_back_is_of_what_was_lost():
    assert HeldOut(before=4.0, after=3.75, base=3.0).recovered == 0.25
    assert HeldOut(before=4.0, after=4.5, base=3.0).recovered == -0.5
    assert HeldOut(before=4.0, after=3.5).recovered is None
    assert HeldOut(before=3.0, after=2.0, base=3.0).recovered is None  # nothing was lost


def test_shards_keep_their_names_and_tensors(home, tmp_path):
    import families
    from layerprune.exporter import export
    from layerprune.removal import Removal

    export(families.make_plan(home / "base", Removal.of(1)), tmp_path / "sharded", max_shard_size=20_000)
    heal(tmp_path / "sharded", tmp_path / "healed", method="scaling")
    old, new = Checkpoint.open(tmp_path / "sharded"), Checkpoint.open(tmp_path / "healed")
    assert len(old.files) > 2
    assert {name: tensor.file.name for name, tensor in old.tensors.items()} == {
        name: tensor.file.name for name, tensor in new.tensors.items()
    }
    assert verify(tmp_path / "healed").ok


def test_bfloat16_stays_bfloat16(home, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import families
    from layerprune.exporter import export
    from layerprune.removal import Removal

    base = tmp_path / "half"
    AutoModelForCausalLM.from_pretrained(home / "base", dtype=torch.bfloat16).save_pretrained(base)
    AutoTokenizer.from_pretrained(home / "base").save_pretrained(base)
    export(families.make_plan(base, Removal.of(3)), tmp_path / "pruned")
    heal(tmp_path / "pruned", tmp_path / "healed", method="scaling", dtype="float32")
    new, old = tensors(tmp_path / "healed")[DOWN], tensors(tmp_path / "pruned")[DOWN]
    assert new.dtype == torch.bfloat16
    assert torch.equal(new, 2 * old)


class Bad:
    """Methods that break the contract, by name."""

    def __init__(self, pairs, attach=None):
        self.pairs, self.attach = pairs, attach

    def heal(self, case):
        if self.attach:
            case.attachments.mkdir(parents=True)
            (case.attachments / self.attach).write_text("{}")
        yield from self.pairs


@pytest.mark.parametrize(
    ("pairs", "error", "message"),
    [
        ([("model.nowhere", torch.ones(2))], ModelError, "changed 'model.nowhere', which the checkpoint does not hold"),
        ([(DOWN, torch.ones(2))], ModelError, "the shape|as \\(2,\\); it is F32 \\(32, 64\\) on disk"),
        ([(DOWN, torch.ones(32, 64)), (DOWN, torch.ones(32, 64))], ModelError, "twice"),
        ([(DOWN, torch.full((32, 64), 1e60, dtype=torch.float64))], ModelError, "infinite or not a number in F32"),
    ],
)
def test_a_method_that_breaks_the_contract_leaves_nothing(home, tmp_path, monkeypatch, pairs, error, message):
    monkeypatch.setattr(heal_tiny.Scaling, "heal", Bad(pairs).heal)
    with pytest.raises(error, match=message):
        heal(home / "pruned-2-4", tmp_path / "healed", method="scaling")
    assert not list(tmp_path.iterdir())


def test_attachments_are_published_and_verified(home, tmp_path, monkeypatch):
    new = tensors(home / "pruned-2-4")[DOWN] + 1
    monkeypatch.setattr(heal_tiny.Scaling, "heal", Bad([(DOWN, new)], "adapter.json").heal)
    log = heal(home / "pruned-2-4", tmp_path / "healed", method="scaling")
    assert "adapter.json" in log.files
    assert verify(tmp_path / "healed").ok
    monkeypatch.setattr(heal_tiny.Scaling, "heal", Bad([(DOWN, new)], "config.json").heal)
    with pytest.raises(ExportError, match=r"'config\.json', a name that the checkpoint uses itself"):
        heal(home / "pruned-2-4", tmp_path / "other", method="scaling")


def test_what_another_method_left_is_not_published(home, tmp_path, monkeypatch):
    """A healing that was cut off after it had attached something, then another one into the same folder."""
    with monkeypatch.context() as patch:
        patch.setattr(heal_tiny.Scaling, "heal", Bad([("model.nowhere", torch.ones(2))], "adapter.json").heal)
        with pytest.raises(ModelError):
            heal(home / "pruned-2-4", tmp_path / "healed", method="scaling")
    assert list(tmp_path.glob(".healed.healing/attachments/adapter.json"))
    log = heal(home / "pruned-2-4", tmp_path / "healed", method="scaling:factor=3")
    assert "adapter.json" not in log.files
    assert not (tmp_path / "healed" / "adapter.json").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["healed"]


def test_two_healings_into_one_folder_do_not_share_its_work(home, tmp_path):
    """The other one is a thread here; blocks of one thread nest."""
    work, held, done_with = tmp_path / ".healed.healing", threading.Event(), threading.Event()

    def other():
        with locked(work):
            held.set()
            done_with.wait()

    thread = threading.Thread(target=other)
    thread.start()
    assert held.wait(60)
    try:
        said = refused("heal", home / "pruned-2-4", "-o", tmp_path / "healed", "--method", "scaling")
    finally:
        done_with.set()
        thread.join()
    assert said.startswith(f"another layerprune is at work in {work}; wait until it is done")
    assert not list(tmp_path.iterdir())
    heal(home / "pruned-2-4", tmp_path / "healed", method="scaling")
    assert [path.name for path in tmp_path.iterdir()] == ["healed"]


@pytest.mark.parametrize("name", [".healed.healing", ".healed.healing/changed.bin"])
def test_what_healing_keeps_beside_its_folder_is_behind_no_link(home, tmp_path, name):
    other = tmp_path / "other"
    if name.endswith(".bin"):
        (tmp_path / name).parent.mkdir()
        other.write_text("mine")
        mine = other
    else:
        mine = other / "attachments" / "letter.txt"
        mine.parent.mkdir(parents=True)
        mine.write_text("mine")
    (tmp_path / name).symlink_to(other)
    with pytest.raises((UsageError, CheckpointError), match="a symbolic link"):
        heal(home / "pruned-2-4", tmp_path / "healed", method="scaling")
    assert mine.read_text() == "mine"
    assert not (tmp_path / "healed").exists()


def test_tied_weights_that_are_stored_twice_are_healed_twice(tmp_path):
    """With one of the two healed, transformers would find them different, and tie them no more."""
    from transformers import AutoModelForCausalLM

    import audit_tiny
    import families
    from layerprune.exporter import export
    from layerprune.removal import Removal

    base, embedding = audit_tiny.base_model(tmp_path / "base"), "model.embed_tokens.weight"
    weights = load_file(base / "model.safetensors")
    weights["lm_head.weight"] = weights[embedding].clone()
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    export(families.make_plan(base, Removal.of(2)), tmp_path / "pruned")
    log = heal(tmp_path / "pruned", tmp_path / "healed", method=f"scaling:parameter={embedding}")
    assert log.changed == ("lm_head.weight", embedding)
    old, new = tensors(tmp_path / "pruned"), tensors(tmp_path / "healed")
    assert torch.equal(new["lm_head.weight"], 2 * old[embedding])
    assert torch.equal(new[embedding], 2 * old[embedding])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "healed")
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_faults_are_one_line_and_leave_nothing(home, tmp_path):
    pruned, out = home / "pruned-2-4", tmp_path / "healed"
    assert refused("heal", pruned, "-o", out, "--method", "scalign") == (
        "unknown healing method 'scalign'. Did you mean 'scaling'? Known: " + ", ".join(HEALERS.entries())
    )
    assert "is not an exported checkpoint" in refused("heal", home / "base", "-o", out, "--method", "scaling")
    missing = refused("heal", pruned, "-o", out, "--method", "scaling", "--corpus", home / "none.txt")
    assert missing.endswith("none.txt does not exist; give a file, a folder, a Hub dataset or builtin")
    stolen = shutil.copytree(home / "base", tmp_path / "other")
    weights = load_file(stolen / "model.safetensors")
    save_file({**weights, DOWN: weights[DOWN] + 1}, stolen / "model.safetensors", metadata={"format": "pt"})
    wrong = refused("heal", pruned, "-o", out, "--method", "scaling", "--base", stolen)
    assert "is not the model this checkpoint was made from" in wrong
    out.mkdir()
    assert "exists already" in refused("heal", pruned, "-o", out, "--method", "scaling")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["healed", "other"]


def test_a_method_that_reads_text_is_not_begun_without(home, tmp_path, monkeypatch):
    monkeypatch.setattr(heal_tiny.Scaling, "needs", "text")
    with pytest.raises(UsageError, match="scaling reads text: give a corpus, such as --corpus FILE"):
        heal(home / "pruned-2-4", tmp_path / "healed", method="scaling")


def test_a_log_of_another_checkpoint_is_refused(home, tmp_path):
    heal(home / "pruned-2-4", tmp_path / "healed", method="scaling")
    shutil.copy(heal_tiny.pruned(home, 3) / "layerprune" / "receipt.json", tmp_path / "healed" / "layerprune")
    shutil.copy(heal_tiny.pruned(home, 3) / "layerprune" / "plan.json", tmp_path / "healed" / "layerprune")
    with pytest.raises(DocumentError, match="is not of this checkpoint"):
        heal(tmp_path / "healed", tmp_path / "again", method="scaling")


def test_healers_are_listed_with_their_options():
    assert "scaling" in done("healers").stdout
    assert "what the weights are multiplied by" in done("healers", "scaling").stdout
    assert isinstance(HEALERS, Registry)
    assert HEALERS.group == "layerprune.healers"


def test_the_audit_shows_base_pruned_and_healed(home, tmp_path):
    import audit_tiny

    audit_tiny.eval_set(home / "base", tmp_path / "tasks", "toy", test=20)
    done("heal", home / "pruned-2-4", "-o", tmp_path / "healed", "--method", "scaling:factor=0")
    words = ["--tasks", "toy", "--include-path", tmp_path / "tasks", "--no-generation"]
    said = done("audit", tmp_path / "healed", *words).stdout
    audit = Audit.load(tmp_path / "healed" / "layerprune" / "audit.json")
    log = HealLog.load(tmp_path / "healed" / "layerprune" / "heal.json")
    assert audit.heal_sha256 == log.sha256()
    assert audit.pruned == log.result
    assert set(audit.tasks[0].models) == {"pruned", "unhealed"}
    done("audit", home / "pruned-2-4", *words)
    alone = Audit.load(home / "pruned-2-4" / "layerprune" / "audit.json")
    assert alone.heal_sha256 is None
    assert audit.tasks[0].models["unhealed"].outcomes.correct == alone.tasks[0].models["pruned"].outcomes.correct
    assert "healed" in said
    assert "unhealed" in said
    assert verify(tmp_path / "healed").ok
    card = (tmp_path / "healed" / "README.md").read_text()
    assert "healed by `scaling:factor=0.0` (no training)" in card
    assert "before healing" in card
    assert "before healing" in (tmp_path / "healed" / "report.html").read_text()
    assert log.result.fingerprint in card
