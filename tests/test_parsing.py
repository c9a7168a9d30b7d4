"""JSON, YAML and text that others wrote: what is read as it is, and the one line that each fault gets."""

import os

import pytest
import yaml

from layerprune.parsing import MOST_BYTES, MOST_DEPTH, MOST_NODES, parse_json, parse_yaml, read_json, read_text


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ('{"a": [1, -2.5e3, "x", null, true]}', {"a": [1, -2500.0, "x", None, True]}),
        ('"\\ud83d\\ude00"', "\N{GRINNING FACE}"),  # a whole pair
        ("[" * MOST_DEPTH + "]" * MOST_DEPTH, None),
        (str(2**64), 2**64),
        ('{"a": 1, "a": 2}', {"a": 2}),
    ],
)
def test_what_is_json_is_read_as_python_reads_it(text, value):
    found = parse_json(text)
    assert value is None or (found == value and type(found) is type(value))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", r"not JSON: Expecting property name .*line 1 column 2"),
        ("[" * (MOST_DEPTH + 1) + "]" * (MOST_DEPTH + 1), "nested more than 100 levels deep"),
        ('{"a":' * 10**5 + "1" + "}" * 10**5, "nested more than 100 levels deep"),
        ("[" + "7" * 5000 + "]", "a number of 5000 digits; 100 are read"),
        ("[" + "[]," * 10**7 + "[]]", "more than 10,000,000 lists and objects"),
        ("1e400", "the number 1e400 is beyond what is read"),
        ("[NaN]", "NaN is no JSON number"),
        ("-Infinity", "-Infinity is no JSON number"),
        ('{"\\ud800": 1}', r"half a surrogate pair, '\\ud800', which is no character"),
        ('["\\udc00\\ud800"]', r"half a surrogate pair, '\\udc00'"),
    ],
)
def test_what_no_reader_behind_could_take_is_refused(text, said):
    with pytest.raises(ValueError, match=f"^{said}") as raised:
        parse_json(text)
    assert "\n" not in str(raised.value)


def test_a_config_may_hold_infinity_and_a_header_no_key_twice():
    assert parse_json("[Infinity]", finite=False) == [float("inf")]
    with pytest.raises(ValueError, match="the key 'a' occurs twice"):
        parse_json('{"a": 1, "a": 2}', repeats=False)


def test_only_a_regular_file_of_a_sensible_size_is_read(tmp_path):
    huge = tmp_path / "huge.json"
    with huge.open("wb") as file:
        file.truncate(MOST_BYTES + 1)  # sparse
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "pointer.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4\n")
    for name, said in {
        "huge.json": "more than 134 MB long",
        "pipe.json": "no regular file",
        "pointer.json": "a git-lfs pointer in place of the file; fetch it with `git lfs pull`",
    }.items():
        with pytest.raises(ValueError, match=said):
            read_json(tmp_path / name)
    with pytest.raises(ValueError, match="no regular file"):
        read_text("/dev/zero")
    with pytest.raises(IsADirectoryError):
        read_text(tmp_path)


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path):
    (tmp_path / "card.md").write_bytes(b"\xef\xbb\xbf---\n")
    assert read_text(tmp_path / "card.md") == "---\n"


def test_yaml_is_read_with_its_nodes_and_aliases():
    node, value = parse_yaml("base: &b {x: 1}\nother: *b\nmerged: {<<: *b, y: 2}\n")
    assert value == {"base": {"x": 1}, "other": {"x": 1}, "merged": {"x": 1, "y": 2}}
    assert node.value[1][0].start_mark.line == 1
    assert parse_yaml("") == (None, None)
    assert parse_yaml("no: no", yaml.BaseLoader)[1] == {"no": "no"}


BOMB = "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 30))
MERGES = "a0: &a0 {x: 1}\n" + "".join(f"a{n}: &a{n} {{<<: [*a{n - 1}, *a{n - 1}]}}\n" for n in range(1, 40))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (BOMB, f"more than {MOST_NODES:,} values once its aliases are written out"),
        (MERGES, f"more than {MOST_NODES:,} values"),
        ("a: &here [*here]", "an alias stands for what contains it"),
        ("a: &here {b: {c: *here}}", "an alias stands for what contains it"),
        ("a: " + "[" * 5000 + "]" * 5000, "nested more than 100 levels deep"),
        ("a: " + "[" * 150 + "]" * 150, "nested more than 100 levels deep"),
        ("a: 2024-99-99", "month must be in 1..12"),
        ("a: " + "7" * 5000, "4300 digits"),
        ('a: "\\ud800"', "half a surrogate pair"),
        ("x" * (2**20 + 1), "1,048,577 characters of YAML; 1,048,576 are read"),
    ],
    ids=lambda value: value[:30],
)
def test_yaml_that_would_not_end_or_is_none_is_refused(text, said):
    with pytest.raises((ValueError, yaml.YAMLError), match=said):
        parse_yaml(text)
