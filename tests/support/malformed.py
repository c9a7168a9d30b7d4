"""Malformed inputs, seeded: values of options, files of every kind that a command reads, changes to good documents."""

from __future__ import annotations

import copy
import json
import os
import random
import socket
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from layerprune.config import MISSING, Config, declared
from layerprune.registry import Registry, declared_options

Key = str | int
MARK = "@@here@@"  # stands in JSON for what no Python value is written as
NESTED = 100_000  # far deeper than a parser's stack
DIGITS = 5_000  # more than Python turns into a whole number

# JSON texts by name, each a value that hardly any field takes.
VALUES = {
    "null": "null",
    "true": "true",
    "zero": "0",
    "minus one": "-1",
    "a half": "0.5",
    "ten to the seven": "10000000",
    "two to the 64": str(2**64),
    "1e400": "1e400",
    "NaN": "NaN",
    "-Infinity": "-Infinity",
    "400 digits": "9" * 400,
    "5,000 digits": "7" * DIGITS,
    "no text": '""',
    "text": '"x"',
    "a number as text": '"1"',
    "a lone surrogate": '"\\ud800"',
    "colour": '"\\u001b[31mred"',
    "two lines": '"one\\ntwo"',
    "a NUL": '"a\\u0000b"',
    "markup": '"</script><b>&<!-- layerprune: end -->\\n---\\n"',
    "a way out": '"../../etc/passwd"',
    "a long text": '"' + "x" * 100_000 + '"',
    "an empty list": "[]",
    "an empty object": "{}",
    "a list of text": '["1"]',
    "a list of lists": "[[0], [1]]",
    "an object of objects": '{"a": {"b": null}}',
    "a nested list": "[" * NESTED + "]" * NESTED,
    "a nested object": '{"a":' * NESTED + "1" + "}" * NESTED,
}

# Whole files by name that are no document of any kind.
FILES = {
    "empty": b"",
    "one space": b" ",
    "a byte order mark": b"\xef\xbb\xbf{}",
    "UTF-16": '{"kind": "plan"}'.encode("utf-16"),
    "Latin-1": '{"kind": "plän"}'.encode("latin-1"),
    "NUL bytes": bytes(4096),
    "random bytes": random.Random(0).randbytes(4096),
    "half an object": b'{"kind": "plan", "form',
    "two objects": b"{} {}",
    "null": b"null",
    "a number": b"12",
    "text": b'"text"',
    "a list": b"[1, 2]",
    "an empty object": b"{}",
    "a nested list": VALUES["a nested list"].encode(),
    "a nested object": VALUES["a nested object"].encode(),
    "5,000 digits": b'{"format": ' + b"7" * DIGITS + b"}",
    "a git-lfs pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 4\n",
    "a web page": b"<!doctype html><html><body>Sign in</body></html>",
    "colour": b"\x1b[31mred\x1b[0m\n\x1b]0;title\x07",
}

# YAML texts by name.
YAML = {
    "an alias bomb": "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n"
    + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 12)),
    "a list in itself": "model: &here [*here]\n",
    "a mapping in itself": "score: &here\n  tasks: *here\n",
    "a merge with itself": "model: &here {<<: *here}\n",
    "a nested flow": "model: " + "[" * 3000 + "]" * 3000 + "\n",
    "a Python object": "model: !!python/object/apply:os.getcwd []\n",
    "an unknown tag": "model: !thing x\n",
    "a day that is none": "model: 2024-99-99\n",
    "an hour that is none": "model: 2024-01-01 99:99:99\n",
    "a binary that is none": "model: !!binary '@'\n",
    "5,000 digits": f"model: {'7' * DIGITS}\n",
    "a sexagesimal": "model: 1:" + ":59" * 4000 + "\n",
    "a tab": "model:\n\t- x\n",
    "two documents": "model: x\n---\nmodel: y\n",
    "a list as key": "? [a, b]\n: 1\n",
    "a mapping as key": "? {a: b}\n: 1\n",
    "a number as key": "1: 2\n",
    "null as key": "~: 2\n",
    "a date as key": "2024-01-01: 2\n",
    "colour as key": '"\\e[31mred": 1\n',
    "two lines as key": '"one\\ntwo": 1\n',
    "a key twice": "model: x\nmodel: y\n",
    "an alias of nothing": "model: *nothing\n",
    "a lone surrogate": 'model: "\\ud800"\n',
    "an unfinished text": 'model: "x\n',
    "a control character": "model: \x07\n",
    "a directive": "%YAML 9.9\n---\nmodel: x\n",
}


# Changes to a good JSON document, and to any file.


def spots(data: Any, way: tuple[Key, ...] = ()) -> Iterator[tuple[Key, ...]]:
    """Yield the way to every value of a document, itself left out; of a long list the first and the last entry."""
    keys: list[Key] = list(data) if isinstance(data, dict) else []
    if isinstance(data, list) and data:
        keys = sorted({0, len(data) - 1})
    for key in keys:
        yield (*way, key)
        yield from spots(data[key], (*way, key))


def _inside(data: Any, way: tuple[Key, ...]) -> tuple[Any, Any, Key]:
    """Return a copy of a document, the container in it that ``way`` ends in, and the key there."""
    whole = copy.deepcopy(data)
    place = whole
    for key in way[:-1]:
        place = place[key]
    return whole, place, way[-1]


def with_value(data: Any, way: tuple[Key, ...], text: str) -> str:
    """Return the JSON of a document whose value at ``way`` is written as ``text``."""
    whole, place, key = _inside(data, way)
    place[key] = MARK
    return json.dumps(whole).replace(f'"{MARK}"', text)


def without(data: Any, way: tuple[Key, ...]) -> str:
    whole, place, key = _inside(data, way)
    del place[key]
    return json.dumps(whole)


def twice(data: Any, way: tuple[Key, ...]) -> str:
    """Return the JSON of a document that says what is at ``way`` twice, first something else where it is a key."""
    whole, place, key = _inside(data, way)
    if isinstance(place, list):
        place.insert(int(key), copy.deepcopy(place[int(key)]))
        return json.dumps(whole)
    place[MARK] = place.pop(key)
    place[key] = MARK * 2
    first = f"{json.dumps(key)}: null"
    body = json.dumps(whole)
    return body.replace(f'"{MARK}": ', f"{first}, {json.dumps(key)}: ").replace(
        f', {json.dumps(key)}: "{MARK * 2}"', ""
    )


def renamed(data: Any, way: tuple[Key, ...], name: str) -> str:
    whole, place, key = _inside(data, way)
    if isinstance(place, dict):
        place[name] = place.pop(key)
    else:
        place[int(key)] = {name: place[int(key)]}
    return json.dumps(whole)


def another_number(data: Any, way: tuple[Key, ...], rng: random.Random) -> str | None:
    """Return the JSON of a document with another number at ``way``; None where there is no number."""
    whole, place, key = _inside(data, way)
    value = place[key]
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    place[key] = rng.choice([value + 1, -value - 1, value * 2 + 1, value + 0.5, 10**9, 1e-300, 1e300])
    return json.dumps(whole)


NAMES = ("x", "", "\ud800", "\x1b[31mred", "one\ntwo", "../x", "a\0b", "__class__", "x" * 5000)


def changed(content: bytes, rng: random.Random) -> tuple[str, bytes]:
    """Return one change to a JSON document, and what it is called; to its bytes where it is not JSON."""
    try:
        data = json.loads(content)
        ways = list(spots(data))
    except ValueError:
        ways = []
    if not ways or rng.random() < 0.2:
        return damaged(content, rng)
    way = rng.choice(ways)
    place = ".".join(map(str, way))
    match rng.choice(["value"] * 6 + ["drop", "twice", "rename", "number", "number", "add"]):
        case "value":
            name = rng.choice(list(VALUES))
            return f"{place} is {name}", with_value(data, way, VALUES[name]).encode()
        case "drop":
            return f"{place} is gone", without(data, way).encode()
        case "twice":
            return f"{place} is there twice", twice(data, way).encode()
        case "rename":
            name = rng.choice(NAMES)
            return f"{place} is called {name[:20]!r}", renamed(data, way, name).encode()
        case "number":
            if (text := another_number(data, way, rng)) is not None:
                return f"{place} is another number", text.encode()
            name = rng.choice(list(VALUES))
            return f"{place} is {name}", with_value(data, way, VALUES[name]).encode()
    name = rng.choice(NAMES)
    whole, inner, _ = _inside(data, way)
    if isinstance(inner, dict):
        inner[name] = rng.choice([1, "x", None, []])
    else:
        inner.append(name)
    return f"beside {place} stands {name[:20]!r}", json.dumps(whole).encode()


def damaged(content: bytes, rng: random.Random) -> tuple[str, bytes]:
    """Return a file's bytes cut, changed or added to, and what was done."""
    at = rng.randrange(len(content) + 1)
    match rng.choice(["cut", "flip", "insert", "double", "swap", "whole"]):
        case "cut":
            return f"cut at byte {at}", content[:at]
        case "flip" if at < len(content):
            return f"byte {at} flipped", content[:at] + bytes([content[at] ^ (1 << rng.randrange(8))]) + content[
                at + 1 :
            ]
        case "insert":
            what = rng.choice(
                [b"\0", b"\xff", b"\xed\xa0\x80", b"{", b"]", b"\n", b"\r", b"\x1b[31m", b"7" * DIGITS, b"[" * NESTED]
            )
            return f"{what[:6]!r} inserted at byte {at}", content[:at] + what + content[at:]
        case "double":
            return "written twice", content * 2
        case "swap":
            return f"turned round at byte {at}", content[at:] + content[:at]
    name = rng.choice(list(FILES))
    return f"all of it is {name}", FILES[name]


def changed_line(content: bytes, rng: random.Random) -> tuple[str, bytes]:
    """Return one change to a line of a journal or a corpus in JSON lines."""
    lines = content.splitlines(keepends=True)
    number = rng.randrange(len(lines))
    name, text = changed(lines[number], rng)
    lines[number] = text.rstrip(b"\n") + b"\n"
    return f"line {number + 1}: {name}", b"".join(lines)


# What may lie where a file or a folder is expected.


def _fifo(path: Path) -> None:
    os.mkfifo(path)


def _socket(path: Path) -> None:
    here = Path.cwd()
    os.chdir(path.parent)  # a socket's whole path has to be short
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.chdir(here)


def _unreadable(path: Path) -> None:
    path.write_bytes(b"{}")
    path.chmod(0)


NODES: Mapping[str, Callable[[Path], None]] = {
    "a named pipe": _fifo,
    "a socket": _socket,
    "a folder": lambda path: path.mkdir(),
    "a link to nothing": lambda path: path.symlink_to("nothing"),
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a link to a device": lambda path: path.symlink_to("/dev/zero"),
    "a link out of the folder": lambda path: path.symlink_to("/etc/hostname"),
}


def lay(path: Path, name: str) -> None:
    """Put ``NODES[name]`` in the place of a file or folder."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.is_dir():
        path.rename(path.with_name(f"{path.name}.before"))
    NODES[name](path)


# Values of options.

WORDS = (
    "",
    " ",
    ",",
    "=",
    "\x1b[31mred",
    "one\ntwo",
    "a\0b",
    "\udcff",
    "x" * 5000,
    "../..",
    "/dev/null",
    "nan",
    "-inf",
    "-1",
    "1.5",
    "1e400",
    "9" * 400,
    "9" * DIGITS,
    "²",
    "٣",
    str(2**64),
    "https://user:hf_secret@example.invalid/x",
)
# what no value of these types reads as; a type is told by how help writes it
BAD: Mapping[str, tuple[str, ...]] = {
    "N": ("", "x", "-1", "1.5", "nan", "1e3", "9" * 400, "9" * DIGITS, "²", "\x1b[31m1", "1\n2", "1,2", "true"),
    "N|auto": ("", "x", "0", "-1", "1.5", "inf", "9" * DIGITS, "automatic"),
    "N,N": ("", ",", "x", "1,x", "0", "1,-2", "1.5", "9" * DIGITS),
    "N%": ("", "x", "%", "nan%", "inf%", "-1%", "1e400%", "200%", "9" * DIGITS + "%"),
    "N|N%": ("", "x", "%", "nan%", "inf", "-1", "0", "0%", "100%", "1e400%", "9" * DIGITS, "1\x1b[31m", "²"),
    "Nx": ("", "x", "nanx", "0x", "-1x", "infx", "1e400x", "9" * DIGITS + "x"),
    "SIZE": ("", "x", "0", "-5GB", "nanGB", "5QB", "1e9GB", "9" * 400 + "GB", "9" * DIGITS, "5 G\x1b[31mB"),
    "TIME": ("", "x", "0", "-5m", "nan", "5y", "1h-3m", "9" * 400 + "s", "9" * DIGITS),
    "LAYERS": ("x", "3-", "5-3", "-1-3", "99", "9" * DIGITS, "1.5", "0-\x1b[31m1", "²"),
    "NAME,NAME": ("", ",", " , "),
    "TASK=NUMBER,...": ("", "x", "=", "toy=", "=1", "toy=nan", "toy=inf", "toy=1,toy=2", "toy=" + "9" * 400),
    "LABEL=PLAN": ("", "x", "=", "x=", "=x"),
    "DIR": ("/dev/null", "a\0b", "x" * 5000),
    "FILE": ("/", "a\0b", "x" * 5000, "/dev/zero"),
    "[BOOL]": ("", "maybe", "2", "nan"),
}  # fmt: skip


def flag_of(name: str, one: Any) -> str:
    return one.flag or f"--{name.replace('_', '-')}"


def bad_values(config: type[Config]) -> Iterator[tuple[str, str]]:
    """Yield (flag, value) for every value that an option of ``config`` must refuse whatever else is given."""
    for name, one in declared(config).items():
        for value in BAD.get(one.type.metavar or "", ()):
            yield flag_of(name, one), value


def odd_values(config: type[Config]) -> Iterator[tuple[str, str]]:
    """Yield (flag, value) for odd values of every option that takes one; some types take some of them."""
    for name, one in declared(config).items():
        if not one.type.is_flag:
            for value in WORDS:
                yield flag_of(name, one), value


def needed(config: type[Config]) -> dict[str, Any]:
    """Return the options of ``config`` that have to be given."""
    return {flag_of(name, one): one for name, one in declared(config).items() if one.value is MISSING}


# Headers of safetensors files.


def with_header(content: bytes, change: Callable[[dict[str, Any]], Any]) -> bytes:
    """Return a safetensors file whose header ``change`` has changed in place, or returned as another text."""
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    other = change(header)
    text = (other if isinstance(other, str) else json.dumps(header)).encode()
    return len(text).to_bytes(8, "little") + text + content[8 + length :]


def headers(name: str) -> Iterator[tuple[str, Callable[[dict[str, Any]], Any]]]:
    """Yield changes to a header, by what they are called; ``name`` is that of a tensor, of 2048 elements in float32."""
    fields = {
        "dtype": {"a list": '["F32"]', "an object": "{}", "null": "null", "unknown": '"F33"', "colour": '"\\u001b[1m"'},
        "shape": {
            "two numbers of 4,000 digits": f"[{'9' * 4000}, {'9' * 4000}]", "300,000 sides": f"[{'2, ' * 300_000}2]",
            "300,000 ones": f"[{'1, ' * 300_000}2048]", "no side and a huge one": f"[0, {'9' * 4000}]",
            "fractions": "[32.0, 64]", "text": '"x"', "true": "[true, 2048]", "below zero": "[-32, -64]",
        },
        "data_offsets": {
            "a number of 4,000 digits": f"[0, {'9' * 4000}]", "below zero": "[-1, 4]", "null": "null",
            "100,000 numbers": f"[{'1, ' * 100_000}1]", "the wrong way round": "[8192, 0]",
        },
    }  # fmt: skip
    for key, values in fields.items():
        for called, text in values.items():
            yield f"{key}: {called}", lambda header, key=key, text=text: with_value(header, (name, key), text)
    layer, rest = "model.layers", name.rpartition("layers.0")[2]
    for other in (f"{layer}.²{rest}", f"{layer}.٣{rest}", f"{layer}.99{rest}", f"{layer}.{'9' * 5000}{rest}", *NAMES):
        yield f"a tensor called {other[:30]!r}", lambda header, other=other: renamed(header, (name,), other)
    yield "a nested list", lambda header: "[" * NESTED
    yield "a nested object", lambda header: '{"a":' * NESTED
    yield "5,000 digits", lambda header: f'{{"a": {"7" * DIGITS}}}'
    yield "metadata that is no text", lambda header: header.update(__metadata__={"format": 1})
    yield "a key twice", lambda header: twice(header, (name,))


# Specs of plug-ins, ``cosine:tokens=last``: odd values of every option of everything that is registered.

NUMBERS = (
    "",
    "nan",
    "inf",
    "-inf",
    "1e400",
    "9" * 400,
    "9" * DIGITS,
    str(2**64),
    "-1",
    "²",
    "x",
    "1\n2",
    "\x1b[31mred",
)


def odd_specs(registry: Registry) -> Iterator[str]:
    """Yield specs that name what is registered, each with one odd value of one of its options."""
    for name, entry in registry.entries().items():
        for one in declared_options(entry):
            for value in NUMBERS:
                yield f"{name}:{one.name}={value}"
