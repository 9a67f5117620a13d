"""Where caches come from: lent to calls, and kept for the next that begins alike."""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

from gptrt.errors import MemoryLimitError
from gptrt.reading import Reading, Runner, Slab

_KEPT = 2  # rows: two conversations in turn read nothing twice
_GRAIN = 64  # positions: a call that is a little longer finds room in what is kept


class Shelf:
    """The caches of one decoder. Threads may share it.

    A call may end wherever Python collects a stream that somebody left: also within one of these
    methods, in the thread that is in it. So what comes back waits for nobody: it lies ready until
    whoever has the lock puts it away.

    `limit` bounds the bytes of all that is lent and kept together; what is kept makes room first.
    Without `keep` nothing is kept.
    """

    def __init__(self, decoder: Runner, *, limit: int | None = None, keep: bool = True) -> None:
        self._decoder, self._limit, self._keep = decoder, limit, keep
        self._kept: list[Slab] = []  # of one row each, the longest unused first
        self._lent: weakref.WeakSet[Slab] = weakref.WeakSet()  # also what was never given back
        self._back: deque[tuple[Slab, bool]] = deque()  # and whether it may be kept
        self._lock = threading.Lock()

    @property
    def lent(self) -> int:
        """The bytes of calls and sessions under way."""
        return sum(map(self._bytes, self._lent))

    def lend(self, capacity: int, batch: int = 1) -> Slab:
        """An empty slab, for so many positions or a little more. Raises MemoryLimitError."""
        capacity = min(-(-capacity // _GRAIN) * _GRAIN, self._decoder.context)
        with self._alone():
            self._make_room(capacity, batch)
            slab = Slab(self._decoder.new_cache(capacity, batch))
            self._lent.add(slab)
            return slab

    def lend_for(self, ids: Sequence[int], capacity: int, reading: Reading) -> Slab:
        """A slab of one row, with what some earlier call has read of `ids` already."""
        capacity = min(capacity, self._decoder.context)
        with self._alone():
            best = max(self._kept, key=lambda kept: reading.usable(kept.rows[0], ids), default=None)
            common = reading.usable(best.rows[0], ids) if best else 0
            if best is not None and common:
                self._kept.remove(best)
                self._lent.add(best)
        if best is None or not common:
            return self.lend(capacity)
        return best if best.capacity >= capacity else self.moved(best, common, capacity)

    def moved(self, slab: Slab, length: int, *capacities: int) -> Slab:
        """A slab of one row with what another has read of its first `length` ids, in the first of
        these capacities that there is room for; the other is let go of. An empty one, of the last
        capacity, where there is no room for both. Raises MemoryLimitError."""
        try:
            for capacity in capacities:
                with suppress(MemoryLimitError):
                    larger = self.lend(capacity)
                    larger.rows[0].become(slab.rows[0], length)
                    return larger
        finally:
            self.drop(slab)
        return self.lend(capacities[-1])

    def take_back(self, slab: Slab) -> None:
        """The call is over. One row is kept for the next call, a batch is not."""
        self._back.append((slab, self._keep and len(slab.rows) == 1))
        self._put_away()

    def forget(self) -> None:
        """Keep nothing: the next call begins as the first one did."""
        with self._alone():
            self._kept.clear()

    def drop(self, slab: Slab) -> None:
        """It is not needed any more, nor is what it holds."""
        self._back.append((slab, False))
        self._put_away()

    @contextmanager
    def _alone(self) -> Iterator[None]:
        try:
            with self._lock:
                self._take_in()
                yield
        finally:
            self._put_away()

    def _put_away(self) -> None:
        """What came back, unless somebody has the lock, who will do so."""
        while self._back and self._lock.acquire(blocking=False):
            try:
                self._take_in()
            finally:
                self._lock.release()

    def _take_in(self) -> None:
        while self._back:
            slab, keep = self._back.popleft()
            self._lent.discard(slab)
            if keep:
                self._kept.append(slab)
                del self._kept[:-_KEPT]

    def _make_room(self, capacity: int, batch: int) -> None:
        if self._limit is None:
            return
        size, free = self._decoder.cache_bytes(capacity, batch), self._limit - self.lent
        while self._kept and sum(map(self._bytes, self._kept)) + size > free:
            self._kept.pop(0)
        if size > free:
            raise MemoryLimitError(
                f"a cache of at most {free:,} bytes",
                found=f"{size:,} for {batch} x {capacity} positions",
                do="ask for fewer new tokens or prompts, or raise memory_limit",
            )

    def _bytes(self, slab: Slab) -> int:
        return self._decoder.cache_bytes(slab.capacity, len(slab.rows))
