"""From logits to a token id: small pure functions over one row of logits, float32 [vocab].

Each filter returns a new array in which what it rules out is -inf. Order and meaning are those of
the logits processors of transformers; ties go to the lowest id, everywhere.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from gptrt.config import GenerationConfig

Logits = NDArray[np.float32]

_NEVER = np.float32(-np.inf)


def greedy(logits: Logits) -> int:
    """The most likely id."""
    return int(logits.argmax())


def draw(logits: Logits, uniform: float) -> int:
    """The id at which the cumulative distribution passes `uniform`, in [0, 1)."""
    cumulative = np.cumsum(softmax(logits))
    return int(min(cumulative.searchsorted(uniform * cumulative[-1], "right"), len(logits) - 1))


def softmax(logits: Logits) -> NDArray[np.float64]:
    weights = np.exp(logits - logits.max(), dtype=np.float64)
    return weights / weights.sum()


def uniform(seed: int, sequence: int, step: int) -> float:
    """A number in [0, 1) that depends on its arguments alone.

    A counter in place of a state: batching, streaming or resuming cannot change what a seed gives.
    The mixing is that of SplitMix64 (https://doi.org/10.1145/2714064.2660195).
    """
    x = seed & _MASK
    for word in (sequence, step):
        x = _mix(x + (word + 1) * 0x9E3779B97F4A7C15)
    return (x >> 11) * 2.0**-53


_MASK = (1 << 64) - 1


def _mix(x: int) -> int:
    x &= _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


# --- what must not come ----------------------------------------------------------------------------


def penalize_repetition(logits: Logits, seen: Sequence[int], penalty: float) -> Logits:
    """Ids seen before are made less likely (https://arxiv.org/abs/1909.05858, section 4.1)."""
    out = logits.copy()
    ids = np.unique(np.asarray(seen, np.int64))
    scores = out[ids]
    out[ids] = np.where(scores < 0, scores * np.float32(penalty), scores / np.float32(penalty))
    return out


def ban(logits: Logits, ids: Sequence[int]) -> Logits:
    """These ids cannot come."""
    out = logits.copy()
    out[np.asarray(ids, np.int64)] = _NEVER
    return out


def repeating_ids(seen: Sequence[int], size: int) -> list[int]:
    """Ids that would complete an n-gram of `size` that stands in `seen` already.

    >>> repeating_ids([1, 2, 3, 1, 2], 3)
    [3]
    """
    prefix = tuple(seen[len(seen) - size + 1 :])
    starts = range(len(seen) - size + 1)
    return [seen[i + size - 1] for i in starts if tuple(seen[i : i + size - 1]) == prefix]


def bad_word_ids(seen: Sequence[int], words: Sequence[Sequence[int]]) -> list[int]:
    """The last ids of those words whose other ids stand at the end of `seen`."""
    tail = tuple(seen)
    return [w[-1] for w in words if len(w) == 1 or tail[1 - len(w) :] == tuple(w[:-1])]


# --- what is too unlikely ----------------------------------------------------------------------------


def keep_top_k(logits: Logits, k: int) -> Logits:
    """The k most likely, and whatever ties with the last of them."""
    if k >= len(logits):
        return logits
    least = np.partition(logits, -k)[-k]
    return np.where(logits < least, _NEVER, logits)


def keep_top_p(logits: Logits, p: float) -> Logits:
    """The fewest most likely ids with probability `p` together (https://arxiv.org/abs/1904.09751)."""
    order = np.argsort(logits, kind="stable")  # ascending
    below = np.cumsum(softmax(logits)[order])
    out = logits.copy()
    out[order[:-1][below[:-1] <= 1.0 - p]] = _NEVER  # the most likely one always stays
    return out


def keep_min_p(logits: Logits, p: float) -> Logits:
    """Those at least `p` times as likely as the most likely (https://arxiv.org/abs/2407.01082)."""
    probabilities = softmax(logits)
    return np.where(probabilities < p * probabilities.max(), _NEVER, logits).astype(np.float32)


def keep_typical(logits: Logits, p: float) -> Logits:
    """Those whose surprise is nearest to the entropy, with probability `p` together
    (https://arxiv.org/abs/2202.00666)."""
    probabilities = softmax(logits)
    with np.errstate(divide="ignore"):
        surprise = -np.log(probabilities)
    entropy = np.sum(probabilities * surprise, where=probabilities > 0)
    order = np.argsort(np.abs(surprise - entropy), kind="stable")
    last = int((np.cumsum(probabilities[order]) < p).sum())
    return ban(logits, order[last + 1 :])


class Sampler:
    """The choice of each next id under one GenerationConfig, for one sequence.

    `seen` (prompt and new ids) is only looked at by the options that need it.
    """

    def __init__(self, config: GenerationConfig, end: int | None, sequence: int = 0) -> None:
        self._config, self._end, self._sequence = config, end, sequence
        seed = config.seed
        self._seed = int.from_bytes(os.urandom(8), "little") if seed is None else seed
        self._sampling = config.sampling
        self._plain = not (
            config.repetition_penalty != 1.0
            or config.no_repeat_ngram_size
            or config.bad_words_ids
            or config.min_new_tokens
        )

    def __call__(self, logits: Logits, seen: Sequence[int], step: int) -> int:
        """The id of new token number `step`, counted from 0."""
        if not self._plain:
            logits = self._constrain(logits, seen, step)
        if not self._sampling:
            return greedy(logits)
        return draw(self.warp(logits), uniform(self._seed, self._sequence, step))

    def warp(self, logits: Logits) -> Logits:
        """Temperature, then the filters."""
        config = self._config
        if config.temperature is not None and config.temperature != 1.0:
            logits = logits / np.float32(config.temperature)
        for keep, value in (
            (keep_top_k, config.top_k),
            (keep_top_p, config.top_p),
            (keep_min_p, config.min_p),
            (keep_typical, config.typical_p),
        ):
            if value is not None:
                logits = keep(logits, value)  # type: ignore[operator]
        return logits

    def _constrain(self, logits: Logits, seen: Sequence[int], step: int) -> Logits:
        config = self._config
        if config.repetition_penalty != 1.0:
            logits = penalize_repetition(logits, seen, config.repetition_penalty)
        banned: list[int] = []
        if config.no_repeat_ngram_size:
            banned += repeating_ids(seen, config.no_repeat_ngram_size)
        banned += bad_word_ids(seen, config.bad_words_ids)
        if step < config.min_new_tokens and self._end is not None:
            banned.append(self._end)
        return ban(logits, banned) if banned else logits
