"""What ``inspect`` says of models whose layers differ, go together, or cannot go at all."""

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

import layerprune as lp
from cli_tiny import done, refused
from layerprune.architecture.tiny import tiny_config, tiny_model
from layerprune.inspection import inspect_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a function that saves a tiny random model of a type."""
    home = tmp_path_factory.mktemp("types")

    def save(model_type, **changes):
        path = home / model_type
        if not path.exists():
            tiny_model(model_type, **changes).save_pretrained(path)
        return path

    return save


def test_kinds_of_layers_and_the_fields_that_change(folder):
    found = inspect_model(str(folder("gemma3_text")))
    config = tiny_config("gemma3_text")
    assert [layer.kind for layer in found.layers] == config.layer_types
    assert {"num_hidden_layers", "layer_types"} <= set(found.changes)
    assert found.removable == config.num_hidden_layers
    assert found.nbytes == 4 * found.parameters  # float32, the tied head stored once


def test_parameters_are_those_of_the_model(folder):
    found = inspect_model(str(folder("llama")))
    model = tiny_model("llama")
    assert found.parameters == sum(weight.numel() for weight in model.parameters())
    per_layer = [sum(weight.numel() for weight in layer.parameters()) for layer in model.model.layers]
    assert [layer.parameters for layer in found.layers] == per_layer


def test_layers_that_go_together_say_with_which(folder):
    found = inspect_model(str(folder("jamba")))
    groups = found.architecture.together
    assert groups
    for group in groups:
        for layer in group:
            assert set(found.layers[layer].goes_with) == group - {layer}
    assert "go together" in done("inspect", folder("jamba")).stdout


def test_layers_that_cannot_go_first_say_why(folder):
    found = inspect_model(str(folder("diffllama")))
    assert found.layers[5].refusal == ""
    assert "lambda_init" in found.layers[0].refusal
    assert "0, 1, 2, 3, 4" in done("inspect", folder("diffllama")).stdout


def test_a_folder_without_a_config_is_refused(tmp_path):
    assert str(tmp_path) in refused("inspect", tmp_path)


# Compared with a base; what can be said of weights: tests/lineage.


def test_a_base_is_compared_on_the_command_line_and_in_python(folder, tmp_path):
    base, copy = folder("llama"), tmp_path / "copy"
    shutil.copytree(base, copy)
    weights = load_file(base / "model.safetensors")
    swap = {"1": "4", "4": "1"}
    parts = {name: name.split(".") for name in weights}
    moved = {
        ".".join([*part[:2], swap.get(part[2], part[2]), *part[3:]]) if part[1] == "layers" else name: weights[name]
        for name, part in parts.items()
    }
    save_file(moved, copy / "model.safetensors", metadata={"format": "pt"})
    said = done("inspect", copy, "--base", base).stdout
    assert "compared with the base: layers 1 and 4 have changed places\n" in said
    assert "layers beside llama" in said
    assert [line.split()[:2] for line in said.splitlines() if line.strip().startswith(("1 ", "4 "))] == [
        ["1", "4"], ["4", "1"],
    ]  # fmt: skip
    found = lp.inspect(copy, base=str(base))
    assert {match.layer: match.base for match in found.lineage.layers} == {0: 0, 1: 4, 2: 2, 3: 3, 4: 1, 5: 5}
    assert found.lineage.sentences[0] == "layers 1 and 4 have changed places"
    assert lp.inspect(copy).lineage is None


def test_weights_that_lack_a_layer_are_compared_all_the_same(folder, tmp_path):
    base, copy = folder("llama"), tmp_path / "copy"
    shutil.copytree(base, copy)
    weights = load_file(base / "model.safetensors")
    kept = {name: weight for name, weight in weights.items() if not name.startswith("model.layers.3.")}
    save_file(kept, copy / "model.safetensors", metadata={"format": "pt"})
    assert "the weights hold nothing of layers 3" in refused("inspect", copy)
    said = done("inspect", copy, "--base", base).stdout
    assert "compared with the base: layer 3 of the base is gone\n" in said
    assert "remark: it cannot be pruned as it is: " in said
    assert "the weights hold nothing of layers 3" in said


def test_a_base_that_cannot_be_read_is_refused_in_one_line(folder, tmp_path):
    model, broken = folder("llama"), tmp_path / "broken"
    assert "no-such" in refused("inspect", model, "--base", tmp_path / "no-such")
    shutil.copytree(model, broken)
    data = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(data[:-100])
    assert "is truncated" in refused("inspect", model, "--base", broken)
    (broken / "config.json").write_text("[]")
    (broken / "model.safetensors").write_bytes(data)
    assert "is a list, not an object" in refused("inspect", model, "--base", broken)
    (broken / "config.json").write_text(json.dumps({"model_type": ["llama"]}))
    done("inspect", model, "--base", broken)


def test_a_base_of_another_kind_is_an_answer(folder):
    assert "nothing can be compared with gpt2" in done("inspect", folder("llama"), "--base", folder("gpt2")).stdout
