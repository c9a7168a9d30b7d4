"""Text from elsewhere in a line for people: no control characters, no tokens, no endless lines."""

import pytest

from layerprune.formatting import LONGEST_LINE, printable, short


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain, ünïcödé and \N{GRINNING FACE}\ttab", None),
        ("\x1b[31mred\x1b[0m", r"\x1b[31mred\x1b[0m"),
        ("a\0b\x07\x7f\x9b", r"a\x00b\x07\x7f\x9b"),
        ("one\ntwo\r\n", r"one\ntwo\r\n"),
        ("abc\u202edcba", r"abc\u202edcba"),
        ("half \ud800", r"half \ud800"),
        ("https://me:hf_secret@host/x", "https://***@host/x"),
        ("token hf_abcdefghijkl.", "token hf_***."),
        ("https://host/x?a=1&access_token=abc&b=2", "https://host/x?a=1&access_token=***&b=2"),
        ("https://host/x?X-Amz-Signature=abc", "https://host/x?X-Amz-Signature=***"),
        ("me@host, hf_short, key=value", None),
    ],
)
def test_what_is_printed_is_what_was_said_but_for_what_harms(text, shown):
    assert printable(text) == (text if shown is None else shown)
    printable(text).encode()


def test_lines_are_kept_where_there_may_be_several_and_each_is_cut():
    long = "x" * 5000
    assert printable("a\nb", lines=True) == "a\nb"
    for line in printable(f"{long}\n{long}", lines=True).split("\n"):
        assert len(line) < LONGEST_LINE
        assert line.startswith("xxx")
        assert line.endswith("xxx")
        assert "... (4,400 more characters) ..." in line


def test_a_value_is_shown_in_sixty_characters():
    assert short([1, 2]) == "[1, 2]"
    assert len(short("x" * 10**6)) == 60
    assert short(10**400) == "a number of 1329 bits"
