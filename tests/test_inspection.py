"""What ``inspect`` says of models whose layers differ, go together, or cannot go at all."""

import pytest

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
