"""Where caches come from: lent to calls, and kept for the next that begins alike."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from gptrt.decoding import Reading, Runner, Slab
from gptrt.errors import MemoryLimitError

_KEPT = 2  # rows: two conversations in turn read nothing twice
_GRAIN = 64  # positions: a call that is a little longer finds room in what is kept


class Shelf:
    """The caches of one decoder. Threads may share it.

    `limit` bounds the bytes of all that is lent and kept together; what is kept makes room first.
    `lent` are those of calls and sessions under way.
    """

    def __init__(self, decoder: Runner, *, limit: int | None = None) -> None:
        self._decoder, self._limit = decoder, limit
        self._kept: list[Slab] = []  # of one row each, the longest unused first
        self.lent = 0  # bytes
        self._lock = threading.Lock()

    def lend(self, capacity: int, batch: int = 1) -> Slab:
        """An empty slab, for so many positions or a little more. Raises MemoryLimitError."""
        capacity = min(-(-capacity // _GRAIN) * _GRAIN, self._decoder.context)
        size = self._decoder.cache_bytes(capacity, batch)
        with self._lock:
            while self._limit is not None and self._kept and self._taken() + size > self._limit:
                self._kept.pop(0)
            if self._limit is not None and self._taken() + size > self._limit:
                raise MemoryLimitError(
                    f"a cache of at most {self._limit - self._taken():,} bytes",
                    found=f"{size:,} for {batch} x {capacity} positions",
                    do="ask for fewer new tokens or prompts, or raise memory_limit",
                )
            self.lent += size
        try:
            return Slab(self._decoder.new_cache(capacity, batch))
        except BaseException:
            with self._lock:
                self.lent -= size
            raise

    def lend_for(self, ids: Sequence[int], capacity: int, reading: Reading) -> Slab:
        """A slab of one row, with what some earlier call has read of `ids` already."""
        with self._lock:
            best = max(self._kept, key=lambda kept: reading.usable(kept.rows[0], ids), default=None)
            common = reading.usable(best.rows[0], ids) if best else 0
            if best is not None and common:
                self._kept.remove(best)
                self.lent += self._bytes(best)
        if best is None or not common:
            return self.lend(capacity)
        if best.capacity >= min(capacity, self._decoder.context):
            return best
        try:
            larger = self.lend(capacity)
            if self._decoder.copies:
                larger.rows[0].become(best.rows[0], common)
            return larger
        finally:
            self.drop(best)

    def take_back(self, slab: Slab) -> None:
        """The call is over. One row is kept for the next call, a batch is not."""
        self.drop(slab)
        if len(slab.rows) == 1:
            with self._lock:
                self._kept.append(slab)
                del self._kept[:-_KEPT]

    def clear(self) -> None:
        """Keep nothing."""
        with self._lock:
            self._kept.clear()

    def drop(self, slab: Slab) -> None:
        """It is not needed any more, nor is what it holds."""
        with self._lock:
            self.lent -= self._bytes(slab)

    def _bytes(self, slab: Slab) -> int:
        return self._decoder.cache_bytes(slab.capacity, len(slab.rows))

    def _taken(self) -> int:
        return self.lent + sum(map(self._bytes, self._kept))
