"""Matrices in parts: ranges of rows that are stored each in a format of its own.

A part bears the name of its parameter with its rows behind it as Python writes them, the bounds
that are the matrix's own left out: `wte.weight[:1024]` and `wte.weight[1024:]`. A matrix that is
stored whole keeps its plain name. Parts of one parameter cover it from the first row to the last.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import pairwise

_ROWS = re.compile(r"\[(\d*):(\d*)\]$")


def split(name: str, *bounds: int) -> tuple[str, ...]:
    """The names of the parts between bounds, which ascend and are within the matrix.

    >>> split("wte.weight", 64, 7168)
    ('wte.weight[:64]', 'wte.weight[64:7168]', 'wte.weight[7168:]')
    """
    if not bounds:
        return (name,)
    ends = ["", *map(str, bounds), ""]
    return tuple(f"{name}[{first}:{after}]" for first, after in pairwise(ends))


def parameter_of(name: str) -> str:
    return _ROWS.sub("", name)


def rows_of(name: str) -> slice:
    """Which rows of its parameter a name means.

    >>> rows_of("wte.weight[:1024]")
    slice(None, 1024, None)
    """
    found = _ROWS.search(name)
    first, last = found.groups() if found else ("", "")
    return slice(int(first) if first else None, int(last) if last else None)


def parts_of(parameter: str, names: Iterable[str]) -> list[str]:
    """Those of `names` that are rows of `parameter`, from the top."""
    own = [name for name in names if parameter_of(name) == parameter]
    return sorted(own, key=lambda name: rows_of(name).start or 0)


def shape_of(name: str, whole: tuple[int, int]) -> tuple[int, int]:
    """[rows, columns] of a part of a matrix of that shape."""
    rows = range(*rows_of(name).indices(whole[0]))
    return len(rows), whole[1]
