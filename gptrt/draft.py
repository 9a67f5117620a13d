"""A smaller model that guesses for a larger one."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from gptrt.interrupt import Interrupt
from gptrt.reading import Reading, Row, Runner
from gptrt.sampler import Sampler
from gptrt.speculation import Pace


class DraftModel:
    """What `decoder` would choose by the same options and the same draws as `sampler`."""

    def __init__(
        self,
        decoder: Runner,
        sampler: Sampler,
        *,
        capacity: int,
        longest: int,
        interrupt: Interrupt | None = None,
    ) -> None:
        self._reading = Reading(decoder, interrupt, exact=False)
        self._row = Row(decoder.new_cache(min(capacity, decoder.context)))
        self._sampler = sampler
        self._pace = Pace(longest)
        self.learn: Callable[[int, int], None] = self._pace.learn

    def propose(self, ids: Sequence[int], room: int) -> list[int]:
        size = min(self._pace.next(), room, self._row.cache.capacity - len(ids))
        if size < 1:
            return []
        logits = self._reading.read(self._row, ids)
        guess = [self._sampler.guess(logits.reshape(-1), [])]
        while len(guess) < size:
            logits = self._reading.step(self._row, guess[-1:])
            guess.append(self._sampler.guess(logits.reshape(-1), guess))
        return guess
