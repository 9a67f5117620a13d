"""What is done to logits before an id is chosen, and the choice: small pure functions over logits,
float32 [vocab].

What they compute and in which order is that of the logits processors in transformers
(https://github.com/huggingface/transformers/blob/main/src/transformers/generation/logits_process.py).
A removed id has the logit -inf.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from gptrt.errors import FidelityError

Logits = NDArray[np.float32]
Ids = NDArray[np.int64]


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
