"""How a file is damaged: pure functions of a random source and the intact bytes.

A seed always stands for the same damage, so that what the fuzz found can be looked at again.
"""

from __future__ import annotations

import copy
import json
import sys
from random import Random
from typing import Any


def damaged_bytes(rng: Random, data: bytes) -> bytes:
    """Other bytes than they were: cut off, put in, left out, or bits flipped."""
    at, size = rng.randrange(len(data) + 1), 1 + rng.randrange(64)
    way = rng.randrange(5)
    if way == 0:
        return data[: rng.randrange(len(data))]
    if way == 1:
        return data[:at] + rng.randbytes(size) + data[at:]
    if way == 2:
        at = rng.randrange(len(data))
        return data[:at] + data[at + size :]
    bits = 8 * len(data)
    return flipped(data, rng.sample(range(bits), min(bits, rng.choice((1, 1, 3, 40)))))


def flipped(data: bytes, bits: list[int]) -> bytes:
    """With these bits the other way round, counted from the first of the first byte."""
    result = bytearray(data)
    for bit in bits:
        result[bit // 8] ^= 1 << bit % 8
    return bytes(result)


# Of numbers, names and shapes those that are wrong somewhere. What JSON cannot say, or what Python
# would not write, has a name here that `spelled` replaces.
_RAW = ("@nan", "@infinity", "@digits", "@lists", "@objects", "@open", "@bytes")
_ODD: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 1 << 31, 1 << 63, 10**18, 10**400, 0.5, -0.0, 1e308, -1e308),
    *("", "x", "0", "\0", "\ud800", "\n", "é👍", "a" * 300, "a" * 5000, "../x", "/etc/passwd"),
    *([], {}, [[]], [None], [0], [-1], ["x"], [[0, 1]], {"": {}}, {"x": [1]}, *_RAW),
)


def damaged_json(rng: Random, data: bytes) -> bytes:
    """A few values changed, whatever their place; or the text itself."""
    if rng.random() < 0.2:
        return damaged_bytes(rng, data)
    holder: list[Any] = [json.loads(data)]
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        _change(rng, holder)
    return spelled(rng, holder[0])


def _change(rng: Random, holder: list[Any]) -> None:
    """One value, in place: more often one of the outer ones, of which there are fewer."""
    parent: Any = holder
    key: Any = 0
    deeper = 0.97
    while isinstance(inner := parent[key], dict | list) and inner and rng.random() < deeper:
        parent, deeper = inner, 0.75
        key = rng.choice(list(inner)) if isinstance(inner, dict) else rng.randrange(len(inner))
    way = rng.random()
    if way < 0.5 or parent is holder:
        parent[key] = odd(rng)
    elif way < 0.7:
        parent[key] = near(rng, parent[key])
    elif way < 0.8:
        del parent[key]
    elif isinstance(parent, dict):
        parent[rng.choice(("x", "", "a" * 300, f"{key}2", "\ud800", "..", "\0"))] = parent[key]
    else:
        parent.append(parent[key] if way < 0.9 else odd(rng))


def odd(rng: Random) -> Any:
    """A value of its own: what is put in twice must not hold itself."""
    return copy.deepcopy(rng.choice(_ODD))


def near(rng: Random, value: Any) -> Any:
    """A value of the same type that is not far off."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float) and abs(value) < 1e300:
        return rng.choice((value + 1, value - 1, 2 * value, -value, value / 2, value * 1000))
    if isinstance(value, str) and value:
        at = rng.randrange(len(value))
        return rng.choice((value[:at], value[:at] + "0" + value[at + 1 :], value + value))
    return [value]


def spelled(rng: Random, value: Any) -> bytes:
    """As JSON, with what is none, or too much. Nesting is as deep as it just may be, or is not."""
    deep = sys.getrecursionlimit() - rng.randrange(40)
    meant = {
        "@nan": "NaN",
        "@infinity": "1e999",
        "@digits": "1" * 5000,
        "@lists": "[" * deep + "]" * deep,
        "@objects": '{"x":' * deep + "1" + "}" * deep,
        "@open": "[" * 100_000,
        "@bytes": '"\udcff"',
    }
    text = json.dumps(value)
    for name, spelling in meant.items():
        text = text.replace(f'"{name}"', spelling)
    return text.encode("utf-8", "surrogateescape")
