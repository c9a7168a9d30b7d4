"""Removals: sets of layers, and what they leave."""

import numpy as np
import pytest

from layerprune.errors import UsageError
from layerprune.removal import Removal


def test_layers_are_sorted_and_plain_numbers():
    removal = Removal.of(5, np.int64(2), 1)
    assert removal.layers == (1, 2, 5)
    assert [type(layer) for layer in removal.layers] == [int, int, int]
    assert str(removal) == "{1, 2, 5}"


def test_a_layer_that_is_named_twice_is_refused():
    with pytest.raises(UsageError, match=r"layer 3 is named twice in \[1, 3, 3\]"):
        Removal.of(3, 1, 3)


@pytest.mark.parametrize("layer", [-1, 2.5, 3.0, "3", None, float("nan")])
def test_what_is_not_a_layer_is_refused(layer):
    with pytest.raises(UsageError, match="is not a layer; layers are whole numbers, the first is 0"):
        Removal.of(1, layer)


def test_kept_layers_are_the_others():
    assert Removal.of(1, 3).kept(5) == (0, 2, 4)
    assert Removal(()).kept(2) == (0, 1)
    with pytest.raises(UsageError, match="layer 5 does not exist: the model has layers 0 to 4"):
        Removal.of(5).kept(5)


def test_a_removal_is_a_set_that_can_grow():
    removal = Removal.of(1)
    assert removal.add(0, 4) == Removal.of(4, 1, 0)
    assert 1 in removal
    assert 2 not in removal
    assert len(removal.add(2)) == 2
    assert list(removal) == [1]
    assert hash(Removal.of(2, 1)) == hash(Removal.of(1, 2))
    with pytest.raises(UsageError, match="named twice"):
        removal.add(1)
