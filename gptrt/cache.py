"""The KV cache: what a sequence has been read of so far, so that it is never read again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, Self


class Buffers(Protocol):
    """Keys and values of some rows, wherever a decoder keeps them."""

    def rows(self, start: int, stop: int) -> Self:
        """The same memory, of these rows only."""

    def copy_row(self, source: Self, start: int, stop: int) -> None:
        """Take the positions from `start` to `stop` from the first row of `source` into the first
        row."""

    def read(self, length: int) -> bytes:
        """The first row's first `length` positions, in an order that `write` knows."""

    def write(self, data: bytes, length: int) -> None:
        """The opposite of `read`. Raises ValueError if the size is another."""


@dataclass
class Filled:
    """How many positions of one row are filled."""

    length: int = 0


@dataclass(frozen=True)
class KVCache:
    """Rows of `capacity` positions; `filled` says for each how many are.

    `buffers` belong to the decoder that made the cache. Positions from a row's length on are never
    looked at, so going back is setting its length back.
    """

    capacity: int
    buffers: Buffers
    filled: Sequence[Filled]

    @classmethod
    def empty(cls, batch: int, capacity: int, buffers: Buffers) -> KVCache:
        return cls(capacity, buffers, [Filled() for _ in range(batch)])

    @property
    def batch(self) -> int:
        return len(self.filled)

    @property
    def length(self) -> int:
        """Of the longest row."""
        return max([row.length for row in self.filled])

    def go_to(self, length: int) -> None:
        """Have all rows end there."""
        for row in self.filled:
            row.length = length

    def advance(self, new: int) -> None:
        """So many positions more are filled in each row."""
        for row in self.filled:
            row.length += new

    def rows(self, start: int, stop: int) -> KVCache:
        """A cache of these rows only, over the same memory: what is read into one is in both."""
        return KVCache(self.capacity, self.buffers.rows(start, stop), self.filled[start:stop])

    def copy_row(self, source: KVCache, start: int, length: int) -> None:
        """Make the positions from `start` to `length` of the only row those of another cache's
        first row. Raises ValueError where they do not fit."""
        if not start <= length <= min(self.capacity, source.filled[0].length):
            raise ValueError(f"{length} positions do not fit")
        self.buffers.copy_row(source.buffers, start, length)
        self.go_to(length)
