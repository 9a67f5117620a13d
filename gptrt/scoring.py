"""How well a model predicts a text, and what it makes of it: perplexity, the probability of a
continuation, logits, embeddings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from gptrt.cache import KVCache
from gptrt.decoder import Hidden, Ids, Logits
from gptrt.errors import DataError, FidelityError, OptionError
from gptrt.interrupt import Interrupt
from gptrt.reading import Reading, Row, Runner, passes
from gptrt.sampling import log_probabilities

_LOGITS_BYTES = 64 << 20  # of one run


@dataclass(frozen=True)
class Perplexity:
    """`nll` is the mean negative log-likelihood in nats of `tokens` predicted ids, `perplexity` its
    exponential: https://huggingface.co/docs/transformers/perplexity."""

    perplexity: float
    nll: float
    tokens: int


def perplexity(
    decoder: Runner,
    ids: Sequence[int] | NDArray[np.integer[Any]],
    *,
    window: int | None = None,
    stride: int | None = None,
    cache: KVCache | None = None,
    interrupt: Interrupt | None = None,
) -> Perplexity:
    """Predict every id but the first, each exactly once.

    A window of `window` ids (default: the context) moves by `stride` (default: `window`) and scores
    the `stride` ids after those that are scored already; the rest of it is only read. So without a
    stride only the last window overlaps, reaching back to be full; a smaller stride gives each id
    more context and takes as many times longer. `cache` has room for a window, in one row.

    Raises OptionError, DataError for a text of less than two ids, FidelityError for logits that
    are no numbers.
    """
    context = decoder.context
    window = context if window is None else window
    stride = window if stride is None else stride
    whole = all(isinstance(value, int | np.integer) for value in (stride, window))
    if not whole or not 1 <= stride <= window <= context:
        raise OptionError(
            f"1 <= stride <= window <= {context}",
            found=f"stride {stride}, window {window}",
            do="correct them or leave them out",
        )
    text = _checked(ids, decoder.vocab_size)
    cache = decoder.new_cache(min(window, len(text) - 1)) if cache is None else cache
    total = 0.0
    for first in range(1, len(text), stride):  # the first id that this window predicts
        end = min(first + stride, len(text))
        cache.go_to(0)
        ids_of_window = text[max(0, end - 1 - window) : end]
        total += _window_nll(decoder, cache, ids_of_window, end - first, interrupt)
    return _perplexity(total, len(text) - 1)


def _checked(ids: Sequence[int] | NDArray[np.integer[Any]], vocab_size: int) -> Ids:
    try:
        text = np.asarray(ids, np.int64)
    except OverflowError:  # of an id that no model has
        text = np.full(len(ids), -1)
    if len(text) < 2 or not 0 <= text.min() <= text.max() < vocab_size:
        raise DataError(
            f"text of two tokens or more, ids from 0 to {vocab_size - 1}",
            found=f"{len(text)} tokens",
            do="give a longer text, encoded with the tokenizer of this bundle",
        )
    return text


def _window_nll(
    decoder: Runner, cache: KVCache, window: Ids, scored: int, interrupt: Interrupt | None
) -> float:
    """The nll, summed, of the last `scored` ids of a window, each from all before it."""
    inputs, targets = window[:-1], window[1:]
    size = max(1, _LOGITS_BYTES // (4 * decoder.vocab_size))
    total, unscored = 0.0, len(inputs) - scored
    for start in range(0, len(inputs), size):
        end = min(start + size, len(inputs))
        keep = end - max(start, unscored)
        part = inputs[None, start:end]
        logits = decoder.run(part, cache, keep=max(1, keep), interrupt=interrupt)[0]
        if keep > 0:
            total += _nll(logits, targets[end - keep : end])
    return total


def _nll(logits: Logits, targets: Ids) -> float:
    """Summed nll of targets [n] under logits [n, vocab], which are overwritten."""
    logits -= logits.max(axis=-1, keepdims=True)
    chosen = logits[np.arange(len(targets)), targets].astype(np.float64)
    np.exp(logits, out=logits)
    return float((np.log(logits.sum(axis=-1, dtype=np.float64)) - chosen).sum())


def _perplexity(nll: float, tokens: int) -> Perplexity:
    mean = nll / tokens
    if not mean < math.log(np.finfo(np.float64).max):  # so that NaN is refused as well
        raise FidelityError(
            "a finite perplexity",
            found=f"{mean} nats a token",
            do="check the bundle with `gptrt verify`",
        )
    return Perplexity(math.exp(mean), mean, tokens)


# --- continuations, logits, embeddings ----------------------------------------------------------


@dataclass(frozen=True)
class Score:
    """A continuation's ids and the log probability of each, in nats."""

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]

    @property
    def total(self) -> float:
        return math.fsum(self.logprobs)

    @property
    def mean(self) -> float:
        """An id's; for continuations of different lengths."""
        return self.total / len(self.logprobs)


def score(reading: Reading, row: Row, prompt: Sequence[int], continuation: Sequence[int]) -> Score:
    """How likely `continuation` is after `prompt`, both at least one id, read into `row`."""
    ids, found = [*prompt, *continuation], list[float]()
    for begin, logits in reading.over(row, ids[:-1], len(prompt) - 1):
        targets = ids[begin + 1 : begin + 1 + logits.shape[1]]
        found += (
            float(log_probabilities(position, [token])[0])
            for position, token in zip(logits[0], targets, strict=True)
        )
    return Score(tuple(continuation), tuple(found))


def score_choices(
    reading: Reading, row: Row, prompt: Sequence[int], choices: Sequence[Sequence[int]]
) -> list[float]:
    """How likely each of `choices`, one id or more, is after `prompt`: the sum of log probabilities
    of its ids, in nats. What several begin with is read once; choices of one id cost no pass but
    the prompt's."""
    following: dict[tuple[int, ...], set[int]] = {}
    for choice in choices:
        for n, token in enumerate(choice):
            following.setdefault(tuple(choice[:n]), set()).add(token)
    known: dict[tuple[int, ...], float] = {(): 0.0}
    for choice in sorted(map(tuple, choices)):
        unknown = [n for n in range(len(choice)) if choice[: n + 1] not in known]
        if not unknown:
            continue
        first = len(prompt) - 1 + unknown[0]
        for begin, logits in reading.over(row, [*prompt, *choice[:-1]], first):
            for n, position in enumerate(logits[0], begin - len(prompt) + 1):
                before = choice[:n]
                tokens = sorted(following[before])
                values = log_probabilities(position, tokens).tolist()
                for token, value in zip(tokens, values, strict=True):
                    known[*before, token] = known[before] + value
    return [known[tuple(choice)] for choice in choices]


def logits_at(reading: Reading, row: Row, ids: Sequence[int], positions: Sequence[int]) -> Logits:
    """The logits after each of `positions` of a text, float32 [len(positions), vocab]."""
    result = np.empty((len(positions), reading.decoder.vocab_size), np.float32)
    for begin, logits in reading.over(row, ids[: max(positions) + 1], min(positions)):
        for number, position in enumerate(positions):
            if begin <= position < begin + logits.shape[1]:
                result[number] = logits[0, position - begin]
    return result


Pooling = Literal["mean", "last"]


def embed(reading: Reading, row: Row, ids: Sequence[int], pooling: Pooling) -> Hidden:
    """The last hidden states, of all ids in the mean or of the last one, float32 [n_embd]. Raises
    BundleError for a decoder that does not give it."""
    row.rewind(0)
    total = np.zeros(0, np.float64)
    for begin, end in passes(0, len(ids)):
        part = list(ids[begin:end])
        hidden = reading.decoder.hidden_states(part, row.cache, interrupt=reading.interrupt)
        row.ids += part
        total = hidden.sum(0, np.float64) + (total if begin else 0.0)
    row.exact = len(ids) & ~1
    pooled = total / len(ids) if pooling == "mean" else hidden[-1]
    return pooled.astype(np.float32)
