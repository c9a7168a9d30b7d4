"""``--attn-implementation``: what transformers is asked for, what a figure then depends on, and names that it knows."""

from __future__ import annotations

import pytest
from transformers import AutoModelForCausalLM

from audit_tiny import base_model
from layerprune.errors import ModelError, UsageError
from layerprune.models.model import LoadedModel


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(base_model(tmp_path_factory.mktemp("tiny") / "base"))


def load(folder, **options):
    return LoadedModel.load(folder, reads_text=False, **options)


def test_transformers_chooses_unless_it_is_told(folder):
    assert load(folder).model.config._attn_implementation == "sdpa"
    assert load(folder).attention is None
    for name in ("eager", "sdpa"):
        loaded = load(folder, attn_implementation=name)
        assert loaded.attention == loaded.model.config._attn_implementation == name


def test_a_figure_depends_on_it(folder):
    """Journals' keys are made from the marks: what was measured with one is not taken for what another gives."""
    chosen, same, other = (load(folder, attn_implementation=name).marks for name in ("auto", "sdpa", "eager"))
    assert chosen == same
    assert {name for name in chosen if chosen[name] != other[name]} == {"config"}


@pytest.mark.parametrize("name", ["flash", "SDPA", "kernels-community/flash-attn2", "paged|eager", ""])
def test_a_name_that_transformers_does_not_know_is_refused_before_anything_is_read(name):
    with pytest.raises(UsageError, match=r"unknown attn_implementation '.*'; use auto, eager, .*, sdpa$"):
        load("nowhere", attn_implementation=name)


def test_what_transformers_says_of_one_that_is_not_for_this_model_is_one_line(folder, monkeypatch):
    def refused(folder, **options):
        raise ImportError(f"{options['attn_implementation']}: the package\nis not installed")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", refused)
    with pytest.raises(ModelError, match=r"cannot be loaded: flash_attention_2: the package") as error:
        load(folder, attn_implementation="flash_attention_2")
    assert "\n" not in str(error.value)
