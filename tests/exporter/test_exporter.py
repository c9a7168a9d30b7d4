"""Export's promises: what is carried along, what is refused, and that a failure leaves nothing behind."""

from __future__ import annotations

import errno
import io
import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from families import make_plan, save_tiny
from layerprune.architecture import config_fields
from layerprune.artifacts import Plan, Receipt
from layerprune.auditor.verification import verify
from layerprune.checkpoint import Checkpoint, writer
from layerprune.errors import CheckpointError, DocumentError, ExportError, LayerpruneError, RefusedError, UsageError
from layerprune.exporter import contents, dry_run, export, exporter, proof, removal_plan
from layerprune.removal import Removal
from layerprune.util import Silent

DROP = Removal.of(1, 4)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_tiny("llama", tmp_path / "base")


def fails(plan: Plan, out: Path, kind: type[LayerpruneError]) -> str:
    """Export, expect one line of error of this kind and nothing left beside what was there."""
    before = sorted(out.parent.iterdir())
    with pytest.raises(kind) as error:
        export(plan, out)
    assert sorted(out.parent.iterdir()) == before
    assert "\n" not in str(error.value)
    return str(error.value)


def test_folder_is_complete(base: Path, tmp_path: Path) -> None:
    carried = {
        "tokenizer_config.json": "{}", "chat_template.jinja": "{{ messages }}", "LICENSE": "Apache",
        "merges.txt": "a b", "special_tokens_map.json": "{}", "additional_chat_templates/tools.jinja": "{{ tools }}",
    }  # fmt: skip
    left = {
        "pytorch_model.bin": "pickle", "training_args.bin": "pickle", "optimizer.pt": "pickle", "model.gguf": "x",
        "onnx/model.onnx": "x", "trainer_state.json": "{}", "consolidated.safetensors": "x", ".gitattributes": "x",
        "layerprune/plan.json": "{}",
    }  # fmt: skip
    for name, text in {**carried, **left}.items():
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_text(text)
    plan = make_plan(base, DROP)
    receipt = export(plan, tmp_path / "out")
    out = tmp_path / "out"
    for name, text in carried.items():
        assert (out / name).read_text() == text
    assert (out / "generation_config.json").read_bytes() == (base / "generation_config.json").read_bytes()
    assert receipt.dropped_files == tuple(sorted(left))
    assert Plan.load(out / "layerprune" / "plan.json") == plan
    assert Receipt.load(out / "layerprune" / "receipt.json") == receipt
    assert "not audited" in (out / "README.md").read_text().lower()
    written = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert written == {
        *carried, "config.json", "generation_config.json", "model.safetensors", "README.md", "layerprune/plan.json",
        "layerprune/receipt.json", "layerprune/locator.json",
    }  # fmt: skip
    ours = {"README.md", "layerprune/plan.json", "layerprune/receipt.json", "layerprune/locator.json"}
    assert receipt.files.keys() == written - ours


def test_receipt_tells_what_happened(base: Path, tmp_path: Path) -> None:
    plan = make_plan(base, DROP)
    receipt = export(plan, tmp_path / "out")
    before, after = Checkpoint.open(base), Checkpoint.open(tmp_path / "out")
    assert receipt.plan_sha256 == plan.sha256()
    assert receipt.base == plan.model
    assert (receipt.bytes_before, receipt.bytes_after) == (before.nbytes, after.nbytes)
    assert receipt.result.fingerprint == after.fingerprint()
    assert receipt.result.parameters == after.parameters
    assert receipt.result.layers == 4
    assert receipt.dropped_tensors == len(before.tensors) - len(after.tensors) == 18
    changes = {key: (change.before, change.after) for key, change in receipt.config_changes.items()}
    assert changes == {"num_hidden_layers": (6, 4), "rope_theta": (None, 10000.0)}
    assert receipt.proof is not None
    assert receipt.proof.max_difference == 0
    assert receipt.proof.scale > 0.1
    assert receipt.proof.method == "whole models"


def test_bytes_are_the_base_s(base: Path, tmp_path: Path) -> None:
    export(make_plan(base, DROP), tmp_path / "out", max_shard_size=20_000)
    old = load_file(base / "model.safetensors")
    new = {}
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(shards) > 3
    for file in shards:
        new.update(load_file(file))
    for layer, source in enumerate((0, 2, 3, 5)):
        for name in [name for name in old if name.startswith(f"model.layers.{source}.")]:
            assert new[name.replace(f".{source}.", f".{layer}.", 1)].equal(old[name])
    assert {name for name in new if ".layers." not in name} == {name for name in old if ".layers." not in name}


@pytest.mark.parametrize("card", [b"---\nlicense: mit\n---\nGr\xf6\xdfe", b"---\nlicense: [\n---\n"])
def test_a_base_whose_card_cannot_be_read(base: Path, tmp_path: Path, card: bytes) -> None:
    """The weights are written all the same, and it is said what the new card lacks."""
    (base / "README.md").write_bytes(card)
    said: list[str] = []
    progress = Silent()
    progress.note = said.append  # type: ignore[method-assign]
    export(make_plan(base, Removal.of(2)), tmp_path / "out", progress=progress)
    assert "license:" not in (tmp_path / "out" / "README.md").read_text()
    (note,) = [line for line in said if "README.md" in line]
    assert note.endswith("the new card says nothing of the base's licence and language, add them by hand")


def test_an_empty_removal_is_a_copy(base: Path, tmp_path: Path) -> None:
    receipt = export(make_plan(base, Removal.of()), tmp_path / "out")
    assert receipt.result.fingerprint == receipt.base.fingerprint
    assert receipt.config_changes == {}


def test_plan_for_another_model(base: Path, tmp_path: Path) -> None:
    other = save_tiny("llama", tmp_path / "other", seed=1)
    plan = make_plan(base, DROP)
    shutil.rmtree(base)
    other.rename(base)
    assert "make a plan for this model or name its base" in fails(plan, tmp_path / "out", DocumentError)


def test_base_can_be_named(base: Path, tmp_path: Path) -> None:
    plan = make_plan(base, DROP)
    base.rename(tmp_path / "moved")
    fails(plan, tmp_path / "out", LayerpruneError)
    export(plan, tmp_path / "out", base=str(tmp_path / "moved"))


def test_truncated_weights(base: Path, tmp_path: Path) -> None:
    plan = make_plan(base, DROP)
    os.truncate(base / "model.safetensors", (base / "model.safetensors").stat().st_size - 5)
    assert "model.safetensors is truncated: tensor" in fails(plan, tmp_path / "out", CheckpointError)


def test_link_out_of_the_folder(base: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    plan = make_plan(base, DROP)
    (base / "tokenizer.json").symlink_to(tmp_path / "secret")
    assert "a symbolic link out of the folder" in fails(plan, tmp_path / "out", CheckpointError)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_what_is_read_is_no_link_out_of_the_folder(base: Path, tmp_path: Path, name: str) -> None:
    plan = make_plan(base, DROP)
    (base / name).rename(tmp_path / "elsewhere")
    (base / name).symlink_to(tmp_path / "elsewhere")
    assert f"{name}, a symbolic link out of the folder" in fails(plan, tmp_path / "out", CheckpointError)


def test_existing_folder_is_not_touched(base: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    assert "exists already" in fails(make_plan(base, DROP), tmp_path / "out", ExportError)
    assert (tmp_path / "out" / "mine").read_text() == "mine"


def test_too_little_space_is_seen_before_writing(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type(shutil.disk_usage(tmp_path))(total=10**9, used=10**9, free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr(writer, "write_shards", lambda *args: pytest.fail("nothing must be written"))
    assert "GB free, and the pruned model takes" in fails(make_plan(base, DROP), tmp_path / "out", ExportError)


@pytest.mark.parametrize("call", ["copy_file_range", "fsync"])
def test_disk_that_fills_up(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    plan = make_plan(base, DROP)

    def full(*args: object, **kwargs: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(writer, "SMALL_RANGE_BYTES", 0)  # tiny models go through the kernel too
    monkeypatch.setattr(os, call, full)
    said = fails(plan, tmp_path / "out", ExportError)
    assert "nothing was left behind: [Errno 28] No space left on device" in said


def test_all_is_on_the_disk_before_the_folder_has_its_name(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced, before = set[int](), set[int]()
    fsync, rename = os.fsync, Path.rename

    def noted(handle: int) -> None:
        synced.add(os.fstat(handle).st_ino)
        fsync(handle)

    def named(path: Path, target: Path) -> Path:
        before.update(synced if target == tmp_path / "out" else ())
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", noted)
    monkeypatch.setattr(Path, "rename", named)
    export(make_plan(base, DROP), tmp_path / "out", max_shard_size=50_000)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    assert {path.stat().st_ino for path in (tmp_path / "out").rglob("*")} <= before


def test_read_error(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = make_plan(base, DROP)

    def broken(*args: object, **kwargs: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(writer, "SMALL_RANGE_BYTES", 0)
    monkeypatch.setattr(os, "copy_file_range", broken)
    assert "Input/output error" in fails(plan, tmp_path / "out", ExportError)


def test_read_error_while_the_weights_are_sampled(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = make_plan(base, DROP)

    class Broken(io.FileIO):
        def read(self, size: int = -1) -> bytes:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    plain = Path.open

    def opened(path: Path, mode: str = "r", buffering: int = -1, **options: object) -> object:
        return Broken(path) if buffering == 0 else plain(path, mode, buffering, **options)  # type: ignore[call-overload]

    monkeypatch.setattr(Path, "open", opened)
    said = fails(plan, tmp_path / "out", CheckpointError)
    assert said.startswith("cannot read tensor 'lm_head.weight' of ")
    assert said.endswith("model.safetensors: Input/output error")


def test_disk_that_really_ends(base: Path, tmp_path: Path) -> None:
    """The kernel's own error in the middle of a file, not a stand-in's: a limit on the size of files."""
    resource = pytest.importorskip("resource", reason="POSIX")
    plan = make_plan(base, DROP)
    size = (base / "model.safetensors").stat().st_size
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size // 3, before[1]))
    try:
        said = fails(plan, tmp_path / "out", ExportError)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "nothing was left behind: [Errno 27] File too large" in said
    export(plan, tmp_path / "out")


class Bomb:
    """What must never be unpickled: it leaves a mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.mark,)


def test_no_pickle_is_read(base: Path, tmp_path: Path) -> None:
    mark = tmp_path / "unpickled"
    names = ("pytorch_model.bin", "tokenizer.pkl", "training_args.bin", "model.pt", "optimizer.pt", "vocab.pickle")
    for name in names:
        (base / name).write_bytes(pickle.dumps(Bomb(mark)))
    receipt = export(make_plan(base, DROP), tmp_path / "out")
    assert receipt.dropped_files == tuple(sorted(names))
    (base / "model.safetensors").unlink()
    fails(Plan.load(tmp_path / "out" / "layerprune" / "plan.json"), tmp_path / "none", CheckpointError)
    assert not mark.exists()
    pickle.loads((base / "model.pt").read_bytes())
    assert mark.exists(), "the bomb is none, so this shows nothing"


def test_shard_that_disappears(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = make_plan(base, DROP)
    usage = shutil.disk_usage

    def unlinked(place: Path) -> object:  # the last that is looked at before the copy begins
        (base / "model.safetensors").unlink()
        return usage(place)

    monkeypatch.setattr(shutil, "disk_usage", unlinked)
    assert "No such file or directory" in fails(plan, tmp_path / "out", ExportError)


def test_interrupt(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: object, **kwargs: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(exporter, "prove", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export(make_plan(base, DROP), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_wrong_weights_do_not_pass_the_proof(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two kept layers swapped on the way: loads without a complaint, and is another model."""
    write = contents.plan_weights

    def swapped(*args: object, **kwargs: object) -> object:
        plan = write(*args, **kwargs)  # type: ignore[arg-type]
        names = {part.name: part for part in plan.parts}
        first, second = "model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"
        exchange = {first: second, second: first}
        parts = tuple(
            type(part)(exchange.get(part.name, part.name), part.dtype, part.shape, part.ranges, part.nbytes)
            for part in names.values()
        )
        return type(plan)(parts, plan.names)

    monkeypatch.setattr(contents, "plan_weights", swapped)
    said = fails(make_plan(base, DROP), tmp_path / "out", ExportError)
    assert "is not the base without those layers: a logit differs by" in said


def test_missing_tensor_does_not_pass(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers fills a missing tensor at random and says nothing; layerprune does not."""
    write = contents.plan_weights

    def without_one(*args: object, **kwargs: object) -> object:
        plan = write(*args, **kwargs)  # type: ignore[arg-type]
        return type(plan)(plan.parts[:-1], plan.names)

    monkeypatch.setattr(contents, "plan_weights", without_one)
    assert "1 missing keys" in fails(make_plan(base, DROP), tmp_path / "out", ExportError)


def test_unknown_per_layer_list(base: Path, tmp_path: Path) -> None:
    content = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**content, "layer_moods": ["calm"] * 6}))
    said = fails(make_plan(base, DROP), tmp_path / "out", RefusedError)
    assert "'layer_moods' has 6 entries, one per layer" in said


def test_config_that_does_not_parse(base: Path, tmp_path: Path) -> None:
    plan = make_plan(base, DROP)
    (base / "config.json").write_text("{")
    fails(plan, tmp_path / "out", LayerpruneError)


def test_rehearsal_refuses_what_export_would(base: Path) -> None:
    dry_run(base, DROP)
    with pytest.raises(RefusedError, match="leaves no model"):
        dry_run(base, Removal.from_layers(range(6)))


def test_signature_sees_constants_that_follow_the_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A type that nobody has listed as bound to its place is caught before writing all the same."""
    base = save_tiny("diffllama", tmp_path / "base")
    monkeypatch.setattr(config_fields, "TAIL_ONLY", {})
    dry_run(base, Removal.of(5))
    with pytest.raises(RefusedError, match="lambda_init of self_attn is"):
        dry_run(base, Removal.of(2))


MARKED = "import pathlib; (pathlib.Path({mark!r})).touch()\n"
REMOTE = {
    "configuration_toy.py": (
        "from transformers import LlamaConfig\nclass ToyConfig(LlamaConfig):\n    model_type = 'toy'\n"
    ),
    "modeling_toy.py": (
        "from transformers import LlamaForCausalLM\nfrom .configuration_toy import ToyConfig\n"
        "class ToyForCausalLM(LlamaForCausalLM):\n    config_class = ToyConfig\n"
    ),
}


def test_custom_code_only_by_explicit_flag(base: Path, tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    for name, text in REMOTE.items():
        (base / name).write_text(MARKED.format(mark=str(mark)) + text)
    content = json.loads((base / "config.json").read_text())
    names = {"AutoConfig": "configuration_toy.ToyConfig", "AutoModelForCausalLM": "modeling_toy.ToyForCausalLM"}
    plan = make_plan(base, DROP)
    (base / "config.json").write_text(json.dumps({**content, "model_type": "toy", "auto_map": names}))
    assert "runs only with --trust-remote-code" in fails(plan, tmp_path / "out", LayerpruneError)
    assert not mark.exists()
    receipt = export(plan, tmp_path / "out", trust_remote_code=True)
    assert receipt.proof is not None
    assert receipt.proof.max_difference == 0
    assert receipt.result.model_type == "toy"
    assert {*REMOTE} < receipt.files.keys()
    assert mark.exists()
    card = (tmp_path / "out/README.md").read_text()
    assert "no custom code" not in card
    assert "(`configuration_toy.ToyConfig`, `modeling_toy.ToyForCausalLM`)" in card
    assert card.count('("path/or/repo/of/this/model", trust_remote_code=True)') == 2


def test_proof_refuses_nonsense() -> None:
    import torch

    logits = torch.ones(1, 2, 3)
    tokens = torch.zeros(1, 2, dtype=torch.long)
    assert proof.compare_logits(logits, logits.clone(), "whole models", tokens).max_difference == 0
    with pytest.raises(ExportError, match=r"a logit differs by 0\.5"):
        proof.compare_logits(logits, logits + 0.5, "whole models", tokens)
    with pytest.raises(ExportError, match="differs by nan"):
        proof.compare_logits(logits, logits * float("nan"), "whole models", tokens)
    with pytest.raises(ExportError, match="not finite"):
        proof.compare_logits(logits * float("inf"), logits, "whole models", tokens)


def test_layers_named_by_hand(base: Path, tmp_path: Path) -> None:
    plan = removal_plan(str(base), "1,4")
    export(plan, tmp_path / "named")
    export(make_plan(base, DROP), tmp_path / "planned")
    named, planned = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("named", "planned"))
    assert named == planned
    assert plan.model == make_plan(base, DROP).model
    assert "named by hand" in (tmp_path / "named" / "README.md").read_text()
    assert not verify(tmp_path / "named", base=str(base)).problems


@pytest.mark.parametrize(
    ("layers", "said"),
    [
        ("", "names no layer"),
        ("0--1", "is not a layer number or a range"),
        ("2-1", "a range goes up"),
        ("6", "layer 6 does not exist; the model has layers 0 to 5"),
        ("0-5", "all 6 layers would go"),
    ],
)
def test_layers_that_cannot_be_named(base: Path, layers: str, said: str) -> None:
    with pytest.raises(UsageError, match="--remove '" + layers) as error:
        removal_plan(str(base), layers)
    assert said in str(error.value)


def test_plan_has_scores_or_none(base: Path) -> None:
    plan = removal_plan(str(base), "1,4")
    with pytest.raises(DocumentError, match="scores_sha256 is not"):
        Plan.parse(plan.model_dump(mode="json") | {"scores_sha256": "0" * 64}, "plan.json")
