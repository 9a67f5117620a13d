"""How many bits each row of a vocabulary matrix has.

Vocabularies are in the order of frequency, as `tokenization` makes them, or nearly so, as merges
are learnt: the first tokens are most of any text, and the last ones hardly occur. A row errs as
often as its token is read or foretold, so the first rows have 8 bits; and where a budget is to be
kept, it can pay for more of them by giving 2 to the last.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .parts import rows_of, split

Counts = NDArray[np.int64]

FREQUENT_BITS, RARE_BITS = 8, 2
# Rows at 8 bits undo two thirds of what a head of 4 bits costs, for an eighth of what a head of 8
# bits would.
_FREQUENT_SHARE = 8
_LEAST_TO_SPLIT = 1024  # rows: below, all are as good as frequent, whatever their order
_ROWS_TOGETHER = 32  # of a part that is as large as a budget allows: kernels take them in groups
_MOST_RARE = 0.5  # of all rows


@dataclass(frozen=True)
class RowBits:
    """The first `frequent` rows have 8 bits, the last `rare` ones 2, and those between them as many
    as the head has."""

    frequent: int
    rare: int = 0

    def parts(self, name: str, rows: int, bits: int) -> dict[str, int]:
        """The bits of the parts of a matrix of so many rows, whose head has `bits`.

        >>> RowBits(64, 1024).parts("wte.weight", 8192, 4)
        {'wte.weight[:64]': 8, 'wte.weight[64:7168]': 4, 'wte.weight[7168:]': 2}
        """
        found = {}
        for part in self.names(name, rows):
            first = rows_of(part).start or 0
            others = bits if first < rows - self.rare else RARE_BITS
            found[part] = FREQUENT_BITS if first < self.frequent else others
        return found

    def names(self, name: str, rows: int) -> tuple[str, ...]:
        """Of those parts."""
        bounds = (self.frequent, rows - self.rare)
        return split(name, *(bound for bound in bounds if 0 < bound < rows))


def usual_rows(rows: int) -> RowBits:
    """An eighth of a vocabulary at 8 bits."""
    return RowBits(rows // _FREQUENT_SHARE if rows >= _LEAST_TO_SPLIT else rows)


def rows_within(
    rows: int, spare: float, cost: float, gain: float, bits: int, counts: Counts | None = None
) -> RowBits:
    """What a budget allows that has `spare` to spend beside a vocabulary of `bits` throughout; all
    rows at 8 bits would cost `cost`, all at 2 give back `gain`.

    `counts` [rows] says how often each token is to be expected. Of all ways to spend no more it is
    the one of least noise, in which each row counts as often as its token, and each bit less makes
    the square of an error four times as large. Without it no row has 2 bits.
    """
    if spare >= cost:
        return RowBits(rows)
    if rows < _LEAST_TO_SPLIT:
        return RowBits(0)
    rare = np.arange(0, 1 if counts is None else int(_MOST_RARE * rows), _ROWS_TOGETHER)
    frequent = ((spare * rows + gain * rare) / cost).astype(np.int64)
    frequent = np.minimum(frequent, rows - rare) // _ROWS_TOGETHER * _ROWS_TOGETHER
    known = np.zeros(rows) if counts is None else counts
    before = np.concatenate([[0.0], np.cumsum(known, dtype=np.float64)])  # each row and those above
    of_frequent, of_others = before[frequent], before[rows - rare]
    noise = of_frequent / 4**FREQUENT_BITS
    noise += (of_others - of_frequent) / 4**bits + (before[-1] - of_others) / 4**RARE_BITS
    best = noise.argmin()
    return RowBits(int(frequent[best]), int(rare[best]))
