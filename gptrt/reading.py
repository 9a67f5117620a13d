"""What was read into a cache, and how ids are read into it: in passes of many, or step by step.

What a pass of many ids computes does not depend on where it begins, and what a step computes does
not depend on the rows beside it, but for the last bits of some blocks on some processors. But the
two differ in the last bit, and quantized products make more of it. So of what was read earlier only
what passes have read stands in for a prompt: then a call gives what it would give alone, whatever
was called before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from gptrt.cache import KVCache
from gptrt.decoder import Hidden, Ids, Logits
from gptrt.interrupt import Interrupt

LONGEST_PASS = 256  # ids in one run, even: attention over a pass takes memory by its square

Progress = Callable[[int, int], None]  # ids of the prompt that are read, of how many


class Runner(Protocol):
    """What a generator needs of a decoder: the seam at which tests put a fake.

    `fingerprint` is equal only where keys and values mean the same; "" where nobody knows.
    """

    @property
    def context(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def fingerprint(self) -> str: ...
    def new_cache(self, capacity: int, batch: int = 1) -> KVCache: ...
    def cache_bytes(self, capacity: int, batch: int = 1) -> int: ...
    def run(
        self,
        ids: Ids | Sequence[Sequence[int]],
        cache: KVCache,
        *,
        keep: int = 1,
        interrupt: Interrupt | None = None,
    ) -> Logits: ...
    def hidden_states(
        self, ids: Sequence[int], cache: KVCache, *, interrupt: Interrupt | None = None
    ) -> Hidden: ...


@dataclass
class Row:
    """One row of a cache, and the ids that were read into it.

    The first `exact` of them were read in passes as any other call would read them.
    """

    cache: KVCache
    ids: list[int] = field(default_factory=list)
    exact: int = 0

    def common(self, ids: Sequence[int]) -> int:
        """How many ids both begin with."""
        pairs = zip(self.ids, ids, strict=False)
        return next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(self.ids), len(ids)))

    def rewind(self, length: int) -> None:
        """Forget what was read from position `length` on."""
        del self.ids[length:]
        self.cache.go_to(length)
        self.exact = min(self.exact, length)

    def become(self, other: Row, length: int) -> None:
        """Copy what another row has read of its first `length` ids."""
        start = min(self.common(other.ids), self.exact, other.exact, length)
        self.cache.copy_row(other.cache, start, length)
        self.ids = other.ids[:length]
        self.exact = min(other.exact, length)


class Slab:
    """The rows of one cache. They are read into one by one, and step together."""

    def __init__(self, cache: KVCache) -> None:
        self.capacity = cache.capacity
        self._first = {cache.batch: cache}
        alone = (cache.rows(n, n + 1) if cache.batch > 1 else cache for n in range(cache.batch))
        self.rows = [Row(row) for row in alone]

    def first(self, count: int) -> KVCache:
        """The first rows as one cache, always the same: what is bound to it stays bound."""
        if count not in self._first:
            self._first[count] = self._first[len(self.rows)].rows(0, count)
        return self._first[count]


@dataclass(frozen=True)
class Reading:
    """How to read: `exact` takes of what a row holds already only what passes have read."""

    decoder: Runner
    interrupt: Interrupt | None = None
    progress: Progress | None = None
    exact: bool = True

    def read(self, row: Row, ids: Sequence[int]) -> Logits:
        """Have `row` hold `ids`, at least one: the logits after the last, [1, 1, vocab]."""
        *_, (_, logits) = self.over(row, ids, len(ids) - 1)
        return logits

    def over(self, row: Row, ids: Sequence[int], first: int) -> Iterator[tuple[int, Logits]]:
        """The same, giving the logits after every position from `first` on, pass by pass: where
        they begin, and [1, n, vocab]."""
        start = min(self.usable(row, ids), first & ~1 if self.exact else first)
        row.rewind(start)
        for begin, end in passes(start, len(ids)):
            part, kept = list(ids[begin:end]), max(begin, min(first, end - 1))
            logits = self.decoder.run([part], row.cache, keep=end - kept, interrupt=self.interrupt)
            row.ids += part
            # Behind what single steps wrote, nothing is exact; nor is what a pass gives that parts
            # a pair of rows.
            if row.exact == begin and begin % 2 == 0:
                row.exact = end & ~1
            if self.progress is not None:
                self.progress(end, len(ids))
            if end > first:
                yield kept, logits

    def usable(self, row: Row, ids: Sequence[int]) -> int:
        """How many of `ids` need not be read again, because `row` holds them.

        Kernels compute rows of a pass in pairs, so passes begin at even positions, and the last one
        has two ids at least.
        """
        common = row.common(ids)
        if not self.exact:
            return min(common, len(ids) - 1)
        return max(0, min(common, row.exact, len(ids) - 2)) & ~1

    def step(self, row: Row, ids: list[int]) -> Logits:
        """Read some ids after what `row` holds: logits [1, len(ids), vocab]."""
        logits = self.decoder.run([ids], row.cache, keep=len(ids), interrupt=self.interrupt)
        row.ids += ids
        return logits


def passes(start: int, end: int) -> Iterator[tuple[int, int]]:
    """Where to begin and end the passes over positions from `start` to `end`."""
    while end - start > LONGEST_PASS:
        size = LONGEST_PASS if end - start > LONGEST_PASS + 1 else LONGEST_PASS - 2
        yield start, start + size
        start += size
    yield start, end
