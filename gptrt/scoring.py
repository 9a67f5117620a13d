"""How well a model predicts a text."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gptrt.errors import OptionError, PromptError
from gptrt.generator import Runs
from gptrt.session import Logits


@dataclass(frozen=True)
class Perplexity:
    """`nll` is the mean negative log-likelihood in nats a token, `perplexity` its exponential."""

    perplexity: float
    nll: float
    tokens: int


def perplexity(session: Runs, ids: Sequence[int], *, stride: int | None = None) -> Perplexity:
    """Perplexity of a text over windows of the whole context, all tokens but the first predicted.

    Each window predicts its last `stride` tokens; what stands before them is context. Without
    `stride` windows do not overlap. Raises PromptError for less than two ids.
    """
    if len(ids) < 2:
        raise PromptError(
            "a text of 2 tokens or more", found=f"{len(ids)}", do="give a longer text"
        )
    context = min(session.manifest.cache.max_length, len(ids) - 1)
    if stride is None:
        stride = context
    if not 1 <= stride <= session.manifest.cache.max_length:
        raise OptionError(
            f"a stride of 1 to {session.manifest.cache.max_length}",
            found=str(stride),
            do="correct it",
        )
    array = np.asarray(ids, np.int64)
    total = 0.0
    for start, scored, end in _windows(len(ids) - 1, context, min(stride, context)):
        inputs, targets = array[None, start:end], array[scored + 1 : end + 1]
        logits = session.run(inputs, session.new_cache(context), keep=len(targets))
        total += _nll(logits[0], targets)
    nll = total / (len(ids) - 1)
    return Perplexity(math.exp(min(nll, 700.0)), nll, len(ids) - 1)


def _windows(count: int, context: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """(start, first scored, end): every one of `count` inputs is scored exactly once."""
    scored = 0
    while scored < count:
        end = min(count, scored + (stride if scored else context))
        yield max(0, end - context), scored, end
        scored = end


def _nll(logits: Logits, targets: NDArray[np.int64]) -> float:
    """Sum over rows of -log softmax(logits [rows, vocab])[target], in float64."""
    peak = logits.max(axis=-1, keepdims=True)
    log_sum = np.log(np.exp(logits - peak).sum(axis=-1, dtype=np.float64)) + peak[:, 0]
    return float((log_sum - logits[np.arange(len(targets)), targets]).sum())
