"""The loop: read, run, choose, yield. One for a single prompt and many, with guesses and without.

A `Row` is what was read; a `Continuation` is what is being written. Prompts are read one by one, in
passes of many ids; after that all rows take their steps together, one id each.

What a pass of many ids computes does not depend on where it begins, and what a step computes does
not depend on the rows beside it, but for the last bits of some blocks on some processors. But the
two differ in the last bit, and quantized products make more of it. So of what was read earlier only
what passes have read stands in for a prompt: then a call gives what it would give alone, whatever
was called before.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from gptrt.beams import Beam, BeamSearch
from gptrt.cache import KVCache
from gptrt.config import GenerationConfig
from gptrt.decoder import Hidden, Ids, Logits
from gptrt.interrupt import Interrupt
from gptrt.results import FinishReason
from gptrt.sampler import Sampler
from gptrt.sampling import log_probabilities, most_likely
from gptrt.speculation import Drafter

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


# --- reading ------------------------------------------------------------------------------------


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
            if row.exact == begin:  # behind what single steps wrote, nothing is exact
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


# --- writing ------------------------------------------------------------------------------------


@dataclass
class Continuation:
    """What a prompt is being continued with: all of it that changes, nothing shared with others.

    `room` bounds the new ids. `deadline` is by `time.monotonic()`.
    """

    prompt: list[int]
    config: GenerationConfig
    sampler: Sampler
    eos_token_ids: Sequence[int]
    room: int
    drafter: Drafter | None = None
    deadline: float | None = None
    ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    ended: float | None = None  # when it got its finish reason, by `time.monotonic()`
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[tuple[tuple[int, float], ...]] = field(default_factory=list)
    reused: int = 0  # ids of the prompt that were not read again
    guessed: int = 0
    accepted: int = 0

    def __post_init__(self) -> None:
        self.text = list(self.prompt)  # and all ids: put together anew, each draft would copy it

    def end(self, reason: FinishReason) -> None:
        self.finish_reason, self.ended = reason, time.monotonic()

    def draft(self) -> list[int]:
        """What may follow, to be read in the same pass; one id less than there is room for."""
        room = self.room - len(self.ids) - 1
        if self.drafter is None or room < 1:
            return []
        return self.drafter.propose(self.text, room)

    def learn(self, guessed: int, accepted: int) -> None:
        """So many ids of a draft of so many came true."""
        self.guessed += guessed
        self.accepted += accepted
        if self.drafter is not None:
            self.drafter.learn(guessed, accepted)

    def take(self, logits: Logits, draft: Sequence[int]) -> Iterator[int]:
        """Choose from logits [1, 1 + len(draft), vocab]: the first id, and one more after each id
        of the draft that came true."""
        for at, guess in enumerate([*draft, None]):
            if not self.choose(logits[:, at]):
                return
            yield self.ids[-1]
            if self.finish_reason is not None or self.ids[-1] != guess:
                return

    def choose(self, logits: Logits) -> bool:
        """Whether an id was chosen from logits [..., vocab], rather than the end."""
        guide = self.sampler.guide
        if guide is not None and guide.finished:  # the constraint allows no text at all
            self.end("stop")
            return False
        token = self.sampler.next(logits)
        if token in self.eos_token_ids:
            self.end("stop")
            return False
        if self.config.logprobs or self.config.top_logprobs:
            self._note(logits.reshape(-1), token)
        self.ids.append(token)
        self.text.append(token)
        if guide is not None and guide.finished:
            self.end("stop")
        elif len(self.ids) == self.room:
            self.end("length")
        elif self.deadline is not None and time.monotonic() >= self.deadline:
            self.end("time")
        return True

    def _note(self, logits: Logits, token: int) -> None:
        count = self.config.top_logprobs
        top: list[int] = most_likely(logits, count).tolist() if count else []
        chosen, *others = log_probabilities(logits, [token, *top]).tolist()
        self.logprobs.append(chosen)
        self.top_logprobs.append(tuple(zip(top, others, strict=True)))


def write(
    reading: Reading, continuations: Sequence[Continuation], slab: Slab
) -> Iterator[tuple[Continuation, int]]:
    """Continue all, as many at a time as the slab has rows. Yields each id with what it belongs
    to."""
    waiting = deque(continuations)
    active: list[Continuation] = []  # in the first rows
    while waiting or active:
        while waiting and len(active) < len(slab.rows):
            one = waiting.popleft()
            logits = _read_prompt(reading, one, slab.rows[len(active)], slab.rows)
            active.append(one)
            if one.choose(logits):
                yield one, one.ids[-1]
            _retire(active, slab.rows)
        if len(active) == 1:
            while active[0].finish_reason is None:
                yield from _step_alone(reading, active[0], slab.rows[0])
        elif any(len(row.ids) == slab.capacity for row in slab.rows[: len(active)]):
            for one, row in zip(active, slab.rows, strict=False):
                yield from _step_alone(reading, one, row)
        elif active:
            yield from _step_together(reading, active, slab)
        _retire(active, slab.rows)


def _read_prompt(reading: Reading, one: Continuation, row: Row, others: Sequence[Row]) -> Logits:
    """Into `row`, or by copying from another one that begins alike."""
    best = max(others, key=lambda other: reading.usable(other, one.prompt))
    common = reading.usable(best, one.prompt)
    if common > reading.usable(row, one.prompt):
        row.become(best, common)
    one.reused = reading.usable(row, one.prompt)
    return reading.read(row, one.prompt)


def _step_alone(
    reading: Reading, one: Continuation, row: Row
) -> Iterator[tuple[Continuation, int]]:
    """A row by itself: its last id, and what may follow it."""
    room = row.cache.capacity - len(row.ids)
    draft = one.draft()[: room - 1] if one.drafter is not None and room else []
    if draft:
        yield from _step_ahead(reading, one, row, draft)
        return
    if one.choose(reading.step(row, one.ids[-1:]) if room else _slide(reading, one, row)):
        yield one, one.ids[-1]


def _step_ahead(
    reading: Reading, one: Continuation, row: Row, draft: list[int]
) -> Iterator[tuple[Continuation, int]]:
    """The last id and a draft of what follows it, of which what does not come true is forgotten."""
    before = len(one.ids)
    logits = reading.step(row, [one.ids[-1], *draft])
    try:
        for token in one.take(logits, draft):
            yield one, token
    finally:  # also where the caller has seen enough
        same = [a == b for a, b in zip(one.ids[before:], draft, strict=False)]
        accepted = same.index(False) if False in same else len(same)
        row.rewind(len(row.ids) - len(draft) + accepted)
        one.learn(len(draft), accepted)


def _slide(reading: Reading, one: Continuation, row: Row) -> Logits:
    """Where the cache is full: from the last half of it, as a call would that began with that."""
    tail = one.text[-(row.cache.capacity // 2) :]
    return Reading(reading.decoder, reading.interrupt).read(row, tail)


def _step_together(
    reading: Reading, active: Sequence[Continuation], slab: Slab
) -> Iterator[tuple[Continuation, int]]:
    last = [[one.ids[-1]] for one in active]
    logits = reading.decoder.run(last, slab.first(len(active)), interrupt=reading.interrupt)
    for row, ids in zip(slab.rows, last, strict=False):
        row.ids += ids
    for number, one in enumerate(active):
        if one.choose(logits[number]):
            yield one, one.ids[-1]


def _retire(active: list[Continuation], rows: Sequence[Row]) -> None:
    """Let go of what has ended; the last row moves into the one that it leaves."""
    for number in reversed(range(len(active))):
        if active[number].finish_reason is None:
            continue
        last = len(active) - 1
        if number != last:
            rows[number].become(rows[last], len(rows[last].ids))
            active[number] = active[last]
        del active[last]


def search(
    reading: Reading, prompt: list[int], beams: BeamSearch, slab: Slab, deadline: float | None
) -> list[Beam]:
    """Run a beam search to its end or its deadline, in a row for each beam."""
    count = beams.config.num_return_sequences
    rows = slab.rows
    first = reading.read(rows[0], prompt)
    for row in rows[1:]:
        row.become(rows[0], len(prompt))
    logits = first.reshape(1, -1).repeat(len(rows), axis=0)
    while parents := beams.advance(logits):
        if deadline is not None and time.monotonic() >= deadline:
            return beams.result(count, "time")
        for number, parent in enumerate(parents):
            if parent != number:
                rows[number].become(rows[parent], len(rows[parent].ids))
        last = [[beam.ids[-1]] for beam in beams.running]
        logits = reading.decoder.run(last, slab.first(len(rows)), interrupt=reading.interrupt)[:, 0]
        for row, ids in zip(rows, last, strict=True):
            row.ids += ids
    return beams.result(count)
