"""``--device auto``: one card where one holds the model, as many as do where none does."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from families import tiny_model
from layerprune.errors import ModelError
from layerprune.models.model import LoadedModel


@pytest.mark.parametrize(
    ("free", "place"),
    [([3, 4], "cuda:1"), ([4, 3], "cuda:0"), ([0.9, 0.9], "auto")],  # times the model's weights
)
def test_a_model_that_one_card_holds_goes_to_the_roomiest(tmp_path, monkeypatch, free, place):
    model = tiny_model("llama")
    model.save_pretrained(tmp_path)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    free = [int(share * weights) for share in free]
    asked = []

    def refused(folder, **options):
        asked.append(options["device_map"])
        raise RuntimeError("no card is here")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(free))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda card: (free[torch.device(card).index], 0))
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", refused)
    with pytest.raises(ModelError, match="no card is here"):
        LoadedModel.load(str(tmp_path), reads_text=False)
    assert asked == [place]
