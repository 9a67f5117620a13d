"""Choosing the next id: small pure functions over logits, float32 [vocab], and their chain.

What they compute and in which order is that of the logits processors in transformers
(https://github.com/huggingface/transformers/blob/main/src/transformers/generation/logits_process.py).
A removed id has the logit -inf.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from gptrt.config import GenerationConfig
from gptrt.errors import FidelityError, OptionError

Logits = NDArray[np.float32]
Ids = NDArray[np.int64]


class Guide(Protocol):
    """What a constraint lets follow."""

    def filter(self, logits: Logits, room: int) -> Logits:
        """Remove what may not be the next of at most `room` ids."""

    def advance(self, token: int) -> None:
        """One of the others was chosen."""

    def forced(self) -> list[int]:
        """The ids that can only be next."""

    @property
    def finished(self) -> bool:
        """Whether nothing may follow."""


# --- processors: what was read and written so far decides --------------------------------------


def repetition_penalty(logits: Logits, history: Ids, penalty: float) -> Logits:
    """Make the ids of `history` less likely: CTRL, https://arxiv.org/abs/1909.05858."""
    result, seen = logits.copy(), logits[history]
    result[history] = np.where(seen < 0, seen * np.float32(penalty), seen / np.float32(penalty))
    return result


def no_repeat_ngram(logits: Logits, history: Ids, size: int) -> Logits:
    """Remove every id that would complete a sequence of `size` ids that is in `history` already."""
    starts = len(history) - size + 1
    if starts <= 0:
        return logits
    prefix = history[len(history) - size + 1 :]
    same = np.ones(starts, bool)
    for offset, token in enumerate(prefix):
        same &= history[offset : offset + starts] == token
    return ban(logits, history[size - 1 :][same])


def bad_words(logits: Logits, history: Ids, words: Sequence[Sequence[int]]) -> Logits:
    """Remove every id that would complete one of `words`, each a sequence of ids."""
    tail = history[-max(map(len, words)) :].tolist()
    return ban(logits, [w[-1] for w in words if len(w) == 1 or tail[1 - len(w) :] == [*w[:-1]]])


def add_bias(logits: Logits, ids: Ids, values: Logits) -> Logits:
    """Add to the logits of `ids`."""
    result = logits.copy()
    np.add.at(result, ids, values)
    return result


def ban(logits: Logits, ids: Sequence[int] | Ids) -> Logits:
    """Remove `ids`."""
    if not len(ids):
        return logits
    result = logits.copy()
    result[np.asarray(ids)] = -np.inf  # a tuple would be taken for axes
    return result


# --- warpers: the shape of the distribution decides --------------------------------------------


def apply_temperature(logits: Logits, temperature: float) -> Logits:
    """Below 1 the likely become likelier, above 1 less so."""
    return logits / np.float32(temperature)


def top_k(logits: Logits, k: int) -> Logits:
    """Keep the `k` most likely, and what ties with the last of them."""
    if k >= len(logits):
        return logits
    return _keep(logits, logits >= np.partition(logits, -k)[-k])


def top_p(logits: Logits, p: float) -> Logits:
    """Keep the fewest likely ids that together reach `p`: https://arxiv.org/abs/1904.09751."""
    probabilities = _softmax(logits)
    # Ids this rare cannot reach 1 - p even together: only the others need sorting.
    likely = np.flatnonzero(probabilities >= (1 - p) / len(logits))
    order = likely[np.argsort(probabilities[likely], kind="stable")]
    rare = 1.0 - probabilities[order].sum()
    kept = order[rare + np.cumsum(probabilities[order]) > 1 - p]
    return _keep(logits, kept if len(kept) else order[-1:])


def min_p(logits: Logits, p: float) -> Logits:
    """Keep what is at least `p` times as likely as the most likely."""
    return _keep(logits, logits >= logits.max() + np.float32(math.log(p))) if p > 0 else logits


def typical_p(logits: Logits, p: float) -> Logits:
    """Keep ids whose surprise is nearest the entropy, up to mass `p`: arXiv 2202.00666."""
    alive = np.flatnonzero(logits != -np.inf)  # a NaN is none of those that were removed
    if not len(alive):
        return logits
    probabilities = _softmax(logits[alive])
    surprise = -np.log(np.maximum(probabilities, np.finfo(np.float64).tiny))
    distance = np.abs(surprise - (probabilities * surprise).sum())
    order = np.argsort(distance, kind="stable")
    last = int(np.searchsorted(np.cumsum(probabilities[order]), p))  # the first to reach p
    bound = distance[order[min(last, len(order) - 1)]]
    return _keep(logits, alive[~(distance > bound)])


def _keep(logits: Logits, kept: NDArray[np.bool_] | NDArray[np.int64]) -> Logits:
    result = np.full_like(logits, -np.inf)
    result[kept] = logits[kept]
    return result


def _softmax(logits: Logits) -> NDArray[np.float64]:
    # exp in float32 is ten times as fast, and its error is below that of the logits themselves.
    exponentials: NDArray[np.float64] = np.exp(logits - logits.max()).astype(np.float64)
    exponentials /= exponentials.sum()
    return exponentials


# --- the choice --------------------------------------------------------------------------------


def greedy(logits: Logits) -> int:
    """The most likely id, of equals the lowest. Raises FidelityError if there is none."""
    best = int(logits.argmax())  # a NaN, if there is one: argmax takes it for the largest
    if not math.isfinite(logits.item(best)):
        raise FidelityError(
            "logits of which the largest is a finite number",
            found=str(logits.item(best)),
            do="check the bundle with `gptrt verify`, and that the options do not ban every id",
        )
    return best


def sample(logits: Logits, key: int) -> int:
    """An id by its probability: the largest logit with Gumbel noise, which `key` and the id alone
    decide (https://arxiv.org/abs/1611.01144, formula 1).

    So where logits differ in their last bits, or a filter keeps an id more or less, the choice is
    the same unless two ids are nearly even; a walk along the cumulative distribution would move all
    borders at once.
    """
    top = logits[greedy(logits)]  # refuses what has no distribution
    near = np.flatnonzero(logits > top - _NEAR)
    values = logits[near] + _gumbel(bits(key, near))
    winner = int(values.argmax())
    # Of the many others few have the noise to make up for being far behind.
    far = np.flatnonzero((logits <= top - _NEAR) & (logits > top - _REACH))
    bar = math.exp(-math.exp(float(top - _NEAR) - values[winner]))
    drawn = bits(key, far)
    enough = drawn >= np.uint64(bar * 2.0**64 - 2.0**12)
    if enough.any():
        far = far[enough]
        others = logits[far] + _gumbel(drawn[enough])
        if others.max() > values[winner]:
            return int(far[others.argmax()])
    return int(near[winner])


_NEAR = np.float32(5)
_REACH = np.float32(42)  # the noise lies between -3.7 and 37.4: what is further behind cannot win


def _gumbel(bits: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Numbers from the standard Gumbel distribution, rising with those that are given."""
    noise: NDArray[np.float64] = -np.log(-np.log(((bits >> np.uint64(12)) + 0.5) * 2.0**-52))
    return noise


def bits(key: int, ids: Ids) -> NDArray[np.uint64]:
    """64 for each id: number `id` of the SplitMix64 that begins at `key`."""
    numbers = ids.astype(np.uint64)
    numbers *= _GOLDEN  # modulo 2**64
    numbers += np.uint64(key)
    return _mix(numbers)


def draw_key(seed: int, sequence: int, step: int) -> int:
    """Of a draw, and of nothing else: not of batching, order, or streaming.

    Chained SplitMix64 (Steele, Lea, Flood, https://doi.org/10.1145/2714064.2660195): a generator
    of numpy's costs ten times as much to set up as this costs in all.
    """
    key = 0
    for part in (seed, sequence, step):
        key = ((key ^ part) + int(_GOLDEN)) & _ALL
        key = ((key ^ (key >> 30)) * int(_FIRST)) & _ALL  # as `_mix`, without an array's ceremony
        key = ((key ^ (key >> 27)) * int(_SECOND)) & _ALL
        key ^= key >> 31
    return key


_ALL = (1 << 64) - 1
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_FIRST, _SECOND = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The bits of x, which is overwritten, spread over all 64."""
    x ^= x >> np.uint64(30)
    x *= _FIRST
    x ^= x >> np.uint64(27)
    x *= _SECOND
    x ^= x >> np.uint64(31)
    return x


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

    `room` bounds how many. `sequence` numbers what runs side by side with the same seed; `seed` is
    of a call that has chosen one for all of its sequences.
    """

    def __init__(
        self,
        config: GenerationConfig,
        prompt: Sequence[int],
        eos_token_ids: Sequence[int] = (),
        *,
        room: int,
        seed: int | None = None,
        sequence: int = 0,
        guide: Guide | None = None,
    ) -> None:
        self.guide = guide
        given = config.seed if seed is None else seed
        self._seed = fresh_seed() if given is None else given
        self._sequence = sequence
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


def log_probabilities(logits: Logits, ids: Sequence[int] | Ids) -> NDArray[np.float64]:
    """Of `ids` [n] under logits [vocab], in nats."""
    shifted = logits - logits.max()
    chosen: NDArray[np.float64] = shifted[ids].astype(np.float64)
    return chosen - math.log(np.exp(shifted).sum(dtype=np.float64))


def most_likely(logits: Logits, count: int) -> Ids:
    """The `count` ids of the largest logits [vocab], the largest first, of equals the lowest."""
    order = np.argsort(-logits, kind="stable") if count >= len(logits) else None
    if order is None:
        bound = np.partition(logits, -count)[-count]
        candidates = np.flatnonzero(logits >= bound)
        order = candidates[np.argsort(-logits[candidates], kind="stable")]
    return order[:count]


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
