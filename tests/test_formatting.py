"""Sizes as people write and read them."""

import pytest

from layerprune.errors import UsageError
from layerprune.formatting import in_words, parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [("5GB", 5 * 10**9), ("500 MB", 5 * 10**8), ("1.5kb", 1500), ("2GiB", 2**31), ("17", 17), (" 3 B ", 3)],
)
def test_sizes_are_decimal_unless_they_say_otherwise(text, size):
    assert parse_size(text, "--size") == size


@pytest.mark.parametrize("text", ["", "GB", "5 apples", "-1GB", "1e9", "0", "0.1B"])
def test_what_is_no_size_is_refused_with_the_option_it_was_given_to(text):
    with pytest.raises(UsageError, match="--size"):
        parse_size(text, "--size")


def test_sizes_in_words():
    sizes = {0: "0 B", 999: "999 B", 1000: "1 kB", 269_030_016: "269 MB", 5.2e9: "5.2 GB", 1.6e12: "1.6 TB"}
    assert {size: in_words(size) for size in sizes} == sizes
