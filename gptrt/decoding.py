"""The loop: read, run, choose, yield. One for a single prompt and many, with guesses and without.

A `Row` is what was read (`gptrt.reading`); a `Continuation` is what is being written. Prompts are
read one by one, in passes of many ids; after that all rows take their steps together, one id each.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from gptrt.beams import Beam, BeamSearch
from gptrt.config import GenerationConfig
from gptrt.decoder import Logits
from gptrt.reading import Reading, Row, Slab
from gptrt.results import FinishReason
from gptrt.sampler import Sampler
from gptrt.sampling import log_probabilities, most_likely
from gptrt.speculation import Drafter


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
