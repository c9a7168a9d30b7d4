"""Units and removals: whole layers, half-layer runs, and what they leave."""

import pytest

from layerprune.errors import UsageError
from layerprune.removal import Removal, first_sublayer


def test_units_are_sorted_and_whole_numbers_stay_whole():
    removal = Removal.of(5, 2.5, 1.0)
    assert removal.units == (1, 2.5, 5)
    assert [type(unit) for unit in removal.units] == [int, float, int]
    assert str(removal) == "{1, 2.5, 5}"


def test_sublayers_are_numbered_attention_then_mlp():
    assert Removal.of(3).sublayers == {6, 7}  # A3 M3
    assert Removal.of(3.5).sublayers == {7, 8}  # M3 A4
    assert first_sublayer(0) == 0


@pytest.mark.parametrize("units", [(3, 3), (3, 3.5), (3.5, 4), (2.5, 2.5)])
def test_units_that_share_a_sublayer_are_refused(units):
    with pytest.raises(UsageError, match="named twice or overlaps"):
        Removal.of(*units)


@pytest.mark.parametrize("units", [(3, 4), (2.5, 3.5), (3, 4.5), (2.5, 4)])
def test_neighbours_that_share_nothing_are_accepted(units):
    assert Removal.of(*units).units == units


@pytest.mark.parametrize("unit", [-1, 0.25, -0.5])
def test_what_is_not_a_unit_is_refused(unit):
    with pytest.raises(UsageError, match="is not a unit"):
        Removal.of(unit)


def test_kept_layers_are_the_others():
    assert Removal.of(1, 3).kept(5) == (0, 2, 4)
    assert Removal(()).kept(2) == (0, 1)
    with pytest.raises(UsageError, match="layer 5 does not exist: the model has layers 0 to 4"):
        Removal.of(5).kept(5)


def test_half_layers_have_no_list_of_layers():
    with pytest.raises(UsageError, match="half-layer units"):
        Removal.of(0.5).kept(4)


def test_a_removal_is_a_set_that_can_grow():
    removal = Removal.of(1)
    assert removal.add(0, 4) == Removal.of(4, 1, 0)
    assert 1 in removal
    assert 2 not in removal
    assert len(removal.add(2)) == 2
    assert list(removal) == [1]
    assert hash(Removal.of(2, 1)) == hash(Removal.of(1, 2))
    with pytest.raises(UsageError, match="overlaps"):
        removal.add(0.5)
