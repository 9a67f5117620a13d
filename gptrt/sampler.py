"""The chain of one sequence: what its options do to logits, in order, and the draw of every id."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from gptrt.config import GenerationConfig
from gptrt.errors import OptionError
from gptrt.guide import Guide
from gptrt.sampling import (
    Ids,
    Logits,
    add_bias,
    apply_temperature,
    bad_words,
    ban,
    draw_key,
    greedy,
    min_p,
    no_repeat_ngram,
    repetition_penalty,
    sample,
    top_k,
    top_p,
    typical_p,
)


class Filters:
    """What `config` takes away from or adds to logits because of what was written before, in the
    order of transformers; the constraint comes last."""

    def __init__(
        self,
        config: GenerationConfig,
        eos_token_ids: Sequence[int] = (),
        guide: Guide | None = None,
    ) -> None:
        self._processors = _processors(config)
        self._min_new_tokens, self._eos = config.min_new_tokens, eos_token_ids
        self._own, self._guide = config.logits_processor, guide
        self.idle = not (self._processors or self._min_new_tokens or self._own or guide)

    def __call__(self, logits: Logits, history: Ids, new: int, room: int) -> Logits:
        """The logits [vocab] of the id after `history`, of which the last `new` are not of the
        prompt, and after which `room` ids may follow."""
        for process in self._processors:
            logits = process(logits, history)
        if new < self._min_new_tokens:
            logits = ban(logits, self._eos)
        for process in self._own:
            logits = _checked(process(history, logits.copy()), logits)  # its own to change
        return logits if self._guide is None else self._guide.filter(logits, room)


class Sampler:
    """Chooses the ids of one sequence, one after the other, as `config` says.

    `room` bounds how many. `seed` decides the draws, the same for all sequences of a call, which
    `sequence` numbers.
    """

    def __init__(
        self,
        config: GenerationConfig,
        prompt: Sequence[int],
        eos_token_ids: Sequence[int] = (),
        *,
        room: int,
        seed: int,
        sequence: int = 0,
        guide: Guide | None = None,
    ) -> None:
        self.guide = guide
        self._seed, self._sequence = seed, sequence
        self._draws = config.samples
        self._filters = Filters(config, eos_token_ids, guide)
        self._warpers = _warpers(config) if config.samples else []
        self._plain = self._filters.idle and not self._draws
        self._ids = np.array(prompt, np.int64)  # grows by doubling: few calls use all their room
        self._prompt_length, self._step, self._room = len(prompt), 0, room

    def next(self, logits: Logits) -> int:
        """The next id after all that were chosen, from its logits [1, 1, vocab] or [vocab]."""
        if self._plain:
            return greedy(logits)
        token = self._choose(logits.reshape(-1), self._step)
        self._put([token])
        self._step += 1
        if self.guide is not None:
            self.guide.advance(token)
        return token

    def guess(self, logits: Logits, ahead: Sequence[int]) -> int:
        """What another model's logits would make of the id after `ahead`, which follows what was
        chosen; nothing is decided by it. By the same draw: models that agree guess the same."""
        if self._plain:
            return greedy(logits)
        self._put(ahead)
        return self._choose(logits.reshape(-1), self._step + len(ahead))

    def _put(self, ids: Sequence[int]) -> None:
        """After what was chosen."""
        at = self._prompt_length + self._step
        end = at + len(ids)
        if end > len(self._ids):
            more = max(end - len(self._ids), len(self._ids))
            self._ids = np.concatenate((self._ids, np.zeros(more, np.int64)))
        self._ids[at:end] = ids

    def _choose(self, logits: Logits, step: int) -> int:
        history = self._ids[: self._prompt_length + step]
        logits = self._filters(logits, history, step, self._room - step)
        for warp in self._warpers:
            logits = warp(logits)
        if self._draws:
            return sample(logits, draw_key(self._seed, self._sequence, step))
        return greedy(logits)


def fresh_seed() -> int:
    """For a call that was not given one."""
    return int.from_bytes(os.urandom(8))


def _checked(found: Any, given: Logits) -> Logits:
    """What a processor of the application's gave. Raises OptionError if it is something else."""
    if not isinstance(found, np.ndarray) or found.shape != given.shape:
        raise OptionError(
            f"logits {list(given.shape)} from a logits_processor",
            found=repr(getattr(found, "shape", found)),
            do="return the array that it was given, or one like it",
        )
    return found.astype(np.float32, copy=False)


def _processors(config: GenerationConfig) -> list[Callable[[Logits, Ids], Logits]]:
    chain: list[Callable[[Logits, Ids], Logits]] = []
    if config.logit_bias:
        ids, values = (np.array(part) for part in zip(*config.logit_bias, strict=True))
        chain.append(lambda x, _: add_bias(x, ids, values.astype(np.float32)))
    if config.repetition_penalty != 1:
        chain.append(lambda x, ids: repetition_penalty(x, ids, config.repetition_penalty))
    if config.no_repeat_ngram_size:
        chain.append(lambda x, ids: no_repeat_ngram(x, ids, config.no_repeat_ngram_size))
    if config.bad_words_ids:
        chain.append(lambda x, ids: bad_words(x, ids, config.bad_words_ids))
    return chain


def _warpers(config: GenerationConfig) -> list[Callable[[Logits], Logits]]:
    """In the order of transformers; what would change nothing is left out."""
    chain: list[tuple[Callable[[Logits, Any], Logits], float | None, float]] = [
        (apply_temperature, config.temperature, 1),
        (top_k, config.top_k, 0),
        (top_p, config.top_p, 1),
        (min_p, config.min_p, 0),
        (typical_p, config.typical_p, 1),
    ]
    return [
        partial(_swapped, warp, value)
        for warp, value, neutral in chain
        if value is not None and value != neutral
    ]


def _swapped(warp: Callable[[Logits, Any], Logits], value: float, logits: Logits) -> Logits:
    return warp(logits, value)
