"""Exporting a plan from the Hub, against a stand-in on loopback: only the needed files are fetched, all are checked."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import hub_standin
from families import make_plan, save_tiny, tiny_model
from layerprune import api
from layerprune.artifacts import Plan
from layerprune.checkpoint import Checkpoint, locate
from layerprune.errors import CheckpointError, DocumentError, ModelError, RefusedError
from layerprune.exporter import export
from layerprune.inspection import inspect_model
from layerprune.removal import Removal

REPO = "me/base"
SHARDS = [f"model-{number:05d}-of-00004.safetensors" for number in range(1, 5)]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[hub_standin.Hub]:
    """The stand-in, huggingface_hub told to use it, and an empty cache."""
    from huggingface_hub import constants

    server = hub_standin.Hub()
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_TOKEN", hub_standin.TOKEN)
    yield server
    server.shutdown()
    server.server_close()


def shard(folder: Path) -> Path:
    """Cut a tiny six-layer model into four files: what is outside the stack, and two layers each."""
    tensors = load_file(folder / "model.safetensors")
    listed = {}
    for name in tensors:
        number = int(name.split(".")[2]) // 2 + 1 if ".layers." in name else 0
        listed[name] = SHARDS[number]
    for file in SHARDS:
        part = {name: value for name, value in tensors.items() if listed[name] == file}
        save_file(part, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": listed}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return shard(save_tiny("llama", tmp_path / "base", hidden_size=64, intermediate_size=512))


def planned(base: Path, *units: int) -> Plan:
    """Return a plan as it is made from the Hub model, on a machine that has all of it."""
    plan = make_plan(base, Removal.of(*units))
    return plan.model_copy(update={"model": plan.model.model_copy(update={"id": REPO, "revision": hub_standin.COMMIT})})


@pytest.mark.parametrize("units", [(2, 3), (2, 3, 4), (1, 2, 3, 5)])
def test_only_what_is_needed_is_fetched(
    hub: hub_standin.Hub, base: Path, tmp_path: Path, units: tuple[int, ...]
) -> None:
    hub.publish(REPO, base)
    receipt = export(planned(base, *units), tmp_path / "out")
    whole = export(make_plan(base, Removal.of(*units)), tmp_path / "whole")
    assert receipt.result.fingerprint == whole.result.fingerprint
    assert receipt.proof == whole.proof
    assert receipt.proof is not None
    assert receipt.proof.method == "whole models"
    for file in SHARDS:
        size = (base / file).stat().st_size
        if file == SHARDS[2]:  # layers 2 and 3: the header, and at most 64 KiB of each tensor
            assert hub.sent[file] < 0.8 * size
        else:
            assert hub.sent[file] == size + header(base / file)
    assert receipt.notes[-1].startswith("1 of the base's 4 weight files hold only what is removed")
    assert whole.notes == ()


def header(file: Path) -> int:
    """Return the bytes that are read of a file before it is known to be needed."""
    return 8 + int.from_bytes(file.read_bytes()[:8], "little")


def test_what_is_left_is_fetched_when_it_is_asked_for(hub: hub_standin.Hub, base: Path, tmp_path: Path) -> None:
    hub.publish(REPO, base)
    export(planned(base, 2, 3), tmp_path / "out")
    folder = locate(REPO, hub_standin.COMMIT)
    assert Checkpoint.open(folder.path).fingerprint() == make_plan(base, Removal.of()).model.fingerprint
    before = dict(hub.sent)
    export(planned(base, 2, 3), tmp_path / "again")
    assert dict(hub.sent) == before, "what is in the cache is not asked for again"


def test_a_file_that_is_not_fetched_is_checked_all_the_same(hub: hub_standin.Hub, base: Path, tmp_path: Path) -> None:
    plan = planned(base, 2, 3)
    other = load_file(base / SHARDS[2])
    other["model.layers.2.mlp.up_proj.weight"][-1, -1] += 1
    save_file(other, base / SHARDS[2], metadata={"format": "pt"})
    hub.publish(REPO, base)
    with pytest.raises(DocumentError, match="make a plan for this model"):
        export(plan, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_another_model_is_noticed_before_its_weights_are_fetched(
    hub: hub_standin.Hub, base: Path, tmp_path: Path
) -> None:
    hub.publish(REPO, base)
    plan = planned(base, 2, 3)
    deeper = plan.model.model_copy(update={"parameters": plan.model.parameters + 1})
    with pytest.raises(DocumentError, match=r"for me/base with \d+ parameters, but .* holds \d+ parameters"):
        export(plan.model_copy(update={"model": deeper}), tmp_path / "out")
    assert all(hub.sent[file] == header(base / file) for file in SHARDS)


def test_a_hub_that_knows_no_ranges(hub: hub_standin.Hub, base: Path, tmp_path: Path) -> None:
    hub.publish(REPO, base)
    hub.ranges = False
    with pytest.raises(CheckpointError, match="sends whole files where a range is asked for; fetch the model first"):
        export(planned(base, 2, 3), tmp_path / "out")
    locate(REPO, hub_standin.COMMIT)
    export(planned(base, 2, 3), tmp_path / "out")


def test_a_shard_that_is_gone(hub: hub_standin.Hub, base: Path, tmp_path: Path) -> None:
    hub.publish(REPO, base)
    del hub.repos[REPO]["files"][SHARDS[2]]
    with pytest.raises(ModelError, match=rf"me/base@ccccccc/{SHARDS[2]}") as error:
        export(planned(base, 2, 3), tmp_path / "out")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_an_index_that_leads_out_of_the_repo(hub: hub_standin.Hub, base: Path, tmp_path: Path) -> None:
    plan = planned(base, 2, 3)
    index = base / "model.safetensors.index.json"
    index.write_text(index.read_text().replace(SHARDS[2], "../" + SHARDS[2]))
    hub.publish(REPO, base)
    with pytest.raises(CheckpointError, match="which is not a path inside the folder; refused"):
        export(plan, tmp_path / "out")


def test_a_model_in_one_file_is_fetched_whole(hub: hub_standin.Hub, tmp_path: Path) -> None:
    base = save_tiny("llama", tmp_path / "base")
    hub.publish(REPO, base)
    receipt = export(planned(base, 2, 3), tmp_path / "out")
    assert hub.sent["model.safetensors"] == (base / "model.safetensors").stat().st_size
    assert receipt.notes == ()


def test_passing_faults_are_tried_again(hub: hub_standin.Hub, base: Path, tmp_path: Path) -> None:
    hub.publish(REPO, base)
    hub.faults = [(rf"/cdn/.*{SHARDS[2]}", 503), (rf"/cdn/.*{SHARDS[2]}", "cut")]
    export(planned(base, 2, 3), tmp_path / "out")
    assert hub.faults == []


def test_weights_that_are_needed_and_missing_do_not_pass(base: Path, tmp_path: Path) -> None:
    """The proof forgives a base that lacks removed layers, and no other."""
    from layerprune.architecture import load_config, read_architecture
    from layerprune.exporter.proof import prove_whole

    whole = save_tiny("llama", tmp_path / "whole", num_hidden_layers=11)
    removal, out, architecture = Removal.of(1, 3), tmp_path / "out", read_architecture(load_config(str(whole)))
    export(make_plan(whole, removal), out)
    weights = load_file(whole / "model.safetensors")

    def proven(*lacking: str) -> float:
        kept = {name: value for name, value in weights.items() if not name.startswith(lacking)}
        save_file(kept, whole / "model.safetensors", metadata={"format": "pt"})
        return prove_whole(whole, out, architecture, removal)[0].max_difference

    assert proven("model.layers.1.", "model.layers.3.") == 0
    for needed in ("model.layers.10.mlp.up_proj.weight", "model.norm.weight"):
        with pytest.raises(ModelError, match=f"is itself incomplete: transformers does not find {needed}"):
            proven("model.layers.1.", needed)


@pytest.mark.parametrize("sharded", [True, False])
def test_inspect_reads_the_headers_of_a_hub_models_weights_and_nothing_more(
    hub: hub_standin.Hub, base: Path, tmp_path: Path, sharded: bool
) -> None:
    folder = base if sharded else save_tiny("llama", tmp_path / "single")
    hub.publish(REPO, folder)
    found = inspect_model(REPO)
    assert found.nbytes == Checkpoint.open(folder).nbytes
    for file in folder.glob("*.safetensors"):
        assert hub.sent[file.name] == header(file)


def test_a_removal_is_printed_for_other_tools_without_fetching_weights(
    hub: hub_standin.Hub, base: Path, tmp_path: Path
) -> None:
    hub.publish(REPO, base)
    (tmp_path / "it.yaml").write_text(api.export(planned(base, 2, 3), form="mergekit"))
    assert f"model: {REPO}@{hub_standin.COMMIT}" in (tmp_path / "it.yaml").read_text()
    assert api.export(REPO, remove=tmp_path / "it.yaml", form="llama-quantize") == "--prune-layers 2,3"
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


def test_inspect_says_of_a_hub_model_what_it_says_of_a_folder(hub: hub_standin.Hub, tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path / "base")
    kept = {name: value for name, value in load_file(folder / "model.safetensors").items() if ".layers.5." not in name}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    hub.publish(REPO, folder)
    with pytest.raises(RefusedError, match=r"me/base: config.json says num_hidden_layers is 6, and the weights hold 5"):
        inspect_model(REPO)


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "model-q4.gguf", "pytorch_model.bin"])
def test_a_hub_repo_of_another_kind_says_what_it_is(hub: hub_standin.Hub, tmp_path: Path, file: str) -> None:
    folder = tmp_path / "other"
    tiny_model("llama").config.save_pretrained(folder)  # type: ignore[union-attr, operator]
    (folder / file).write_bytes(b"")
    hub.publish(REPO, folder)
    said = "holds an adapter" if file.startswith("adapter") else f"has no safetensors weights, only {file}"
    with pytest.raises(CheckpointError, match=f"me/base {said}"):
        inspect_model(REPO)
    with pytest.raises(CheckpointError, match=f"me/base {said}"):
        locate(REPO)


def test_a_base_on_the_hub_that_was_pruned_before_brings_its_documents(hub: hub_standin.Hub, tmp_path: Path) -> None:
    first = save_tiny("llama", tmp_path / "first")
    export(make_plan(first, Removal.of(1)), tmp_path / "once")
    hub.publish(REPO, tmp_path / "once")
    receipt = export(planned(tmp_path / "once", 2), tmp_path / "twice")
    assert [one.receipt.removal for one in receipt.rounds] == [(1,)]
    assert receipt.first_base.id == "first"
