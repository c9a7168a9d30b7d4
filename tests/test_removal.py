"""Removals: sets of layers, and what they leave."""

import numpy as np
import pytest

from layerprune.errors import UsageError
from layerprune.removal import Removal, parse_drop, parse_layers


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


@pytest.mark.parametrize(
    ("text", "depth", "count"),
    [("6", 30, 6), ("25%", 32, 8), ("25%", 30, 8), ("25 %", 30, 8), ("1%", 30, 1), ("12.5%", 32, 4), (" 3 ", 4, 3)],
)
def test_drop_is_a_count_or_a_share(text, depth, count):
    assert parse_drop(text, depth) == count


@pytest.mark.parametrize(
    "text", ["0", "30", "31", "-2", "100%", "0%", "-5%", "nan%", "inf%", "six", "", "%", "0.25", "6.0"]
)
def test_a_drop_that_makes_no_sense_is_refused_with_what_was_given(text):
    with pytest.raises(UsageError, match="--drop") as raised:
        parse_drop(text, 30)
    assert repr(text) in str(raised.value) or f"--drop {text}" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_protect_counts_from_both_ends():
    assert parse_layers("0,1,-1", 30) == {0, 1, 29}
    assert parse_layers(" 3 , ,4", 30) == {3, 4}
    assert parse_layers("0-3, 7 - 8,-2", 30) == {0, 1, 2, 3, 7, 8, 28}
    assert parse_layers("5-5", 30) == {5}
    assert parse_layers(None, 30) == parse_layers("", 30) == frozenset()


@pytest.mark.parametrize("text", ["30", "-31", "a", "1;2", "0.5", "3-1", "0-30", "-3-5", "-3--1", "1-", "0-2-4"])
def test_protecting_what_is_not_there_is_refused(text):
    with pytest.raises(UsageError, match="--protect"):
        parse_layers(text, 30)
