"""Fidelity: what a bundle computes, through the runtime that users get, against PyTorch in fp32."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from gptrt.errors import DataError
from gptrt.format import Fidelity, Golden
from gptrt.reading import Runner

from .data import Batch, StoredIds, in_order
from .examples import Examples
from .loss import IGNORED

Reference = Callable[[Tensor], Tensor]  # ids [batch, length] -> logits [batch, length, vocab]

_LOGITS_BYTES = 64 << 20  # of one batch of windows
_WINDOW_BYTES = 256 << 20  # of one window, if not told: five times as much is in use at once
_READ_FOR_ANSWERS = 4  # tokens read for each that is to be judged: answers are short
_GREEDY_PROMPTS, _GREEDY_PROMPT, _GREEDY_LENGTH = 16, 32, 32
_GOLDEN_PROMPT, _GOLDEN_LENGTH, _GOLDEN_COUNT = 16, 32, 3
# Kernels of two processors differ in the last bits; a lead below this could turn there.
_CLEAR_LEAD = 0.05


def measure(
    decoder: Runner,
    model: Reference,
    ids: StoredIds,
    *,
    text: str,
    tokens: int,
    window: int | None = None,
    examples: Examples | None = None,
) -> Fidelity:
    """Perplexities, mean KL divergence and top-1 agreement over `tokens` from all over `ids`.

    Windows of `window` ids, none overlapping, or of the whole context where logits of that many
    fit in memory; every position of a window predicts the next id. Where `ids` are `examples` of a
    task, each is read alone and its answer is what counts. Raises DataError if there are less than
    two ids.
    """
    if len(ids) < 2:
        raise DataError("text of two tokens or more", found=f"{len(ids)}", do="give a longer text")
    if window is None:
        window = min(decoder.context, _WINDOW_BYTES // (4 * decoder.vocab_size))
    length = min(window, tokens, len(ids) - 1)
    row = length if examples is None else max(examples.lengths)
    size = max(1, _LOGITS_BYTES // (4 * row * decoder.vocab_size))
    batches: Iterator[Batch] = (
        map(Batch.whole, in_order(ids, length, size, tokens // length))
        if examples is None
        else examples.one_by_one(_READ_FOR_ANSWERS * tokens, size)
    )
    sums, predicted = np.zeros(5), 0
    for batch in batches:
        sums += _compare(decoder, model, batch)
        predicted += int((batch.targets != IGNORED).sum())
    nll, nll_reference, kl, agree, squares = sums / predicted
    ratio = _exp(nll - nll_reference)
    variance = max(0.0, squares - (nll - nll_reference) ** 2)
    return Fidelity(
        text=text,
        tokens=predicted,
        perplexity=_exp(nll),
        perplexity_reference=_exp(nll_reference),
        perplexity_ratio=ratio,
        kl=float(kl),
        top1=float(agree),
        greedy=greedy_agreement(decoder, model, ids),
        ratio_error=ratio * math.sqrt(variance / max(1, predicted - 1)),
        window=length if examples is None else None,
    )


def _exp(nats: float) -> float:
    return math.exp(min(nats, 60.0))  # of a model that is broken the exact figure is no matter


@torch.no_grad()
def _compare(decoder: Runner, model: Reference, batch: Batch) -> NDArray[np.float64]:
    """Sums over the targets of a batch that count: nll, reference nll, KL, agreements, squares of
    the differences of both nll."""
    inputs, targets = batch.inputs, torch.from_numpy(batch.targets)
    cache = decoder.new_cache(inputs.shape[1], batch=len(inputs))
    counted = targets != IGNORED
    found = _log_probs(torch.from_numpy(decoder.run(np.ascontiguousarray(inputs), cache, keep=0)))
    wanted = _log_probs(model(torch.from_numpy(inputs)))
    found, wanted, targets = (rows[counted] for rows in (found, wanted, targets))
    nll, nll_reference = (_nll(log_probs, targets) for log_probs in (found, wanted))
    squares = (nll - nll_reference).square().sum()
    kl = (wanted.exp() * (wanted - found)).sum().item()
    agree = (found.argmax(-1) == wanted.argmax(-1)).sum().item()
    return np.array([nll.sum(), nll_reference.sum(), kl, agree, squares])


def _log_probs(logits: Tensor) -> Tensor:
    return F.log_softmax(logits.float(), dim=-1)  # [..., vocab]


def _nll(log_probs: Tensor, targets: Tensor) -> Tensor:
    return -log_probs.gather(-1, targets[..., None]).double()


@torch.no_grad()
def greedy_agreement(decoder: Runner, model: Reference, ids: StoredIds) -> float:
    """How much of a greedy continuation both share before they differ: the mean share over prompts
    from all over the text.

    Until they differ both have read the same, so one pass of the model over what the bundle wrote
    says where that is.
    """
    context = decoder.context
    length = min(_GREEDY_PROMPT, context // 2, len(ids))
    new = min(_GREEDY_LENGTH, context - length)
    starts = np.linspace(0, len(ids) - length, _GREEDY_PROMPTS).astype(int)
    prompts = np.stack([ids[start : start + length] for start in starts]).astype(np.int64)
    cache = decoder.new_cache(length + new, batch=len(prompts))
    step, text = prompts, [prompts]
    for _ in range(new):
        step = decoder.run(step, cache)[:, -1].argmax(-1)[:, None]
        text.append(step)
    found = np.concatenate(text, axis=1)  # [prompts, length + new]
    logits = model(torch.from_numpy(found[:, :-1]))[:, length - 1 :]
    best = logits.argmax(-1).numpy()  # [prompts, new]
    return float(np.cumprod(best == found[:, length:], axis=1).mean())


def golden_prompts(decoder: Runner, ids: StoredIds) -> tuple[Golden, ...]:
    """Greedy continuations of a few places of the text, each cut where the lead gets thin."""
    length = min(_GOLDEN_PROMPT, decoder.context // 2, len(ids))
    starts = [i * (len(ids) - length) // _GOLDEN_COUNT for i in range(_GOLDEN_COUNT)]
    prompts = {tuple(int(i) for i in ids[start : start + length]) for start in starts}
    return tuple(Golden(p, _clear_greedy(decoder, p)) for p in sorted(prompts))


def _clear_greedy(decoder: Runner, prompt: tuple[int, ...]) -> tuple[int, ...]:
    cache = decoder.new_cache(min(decoder.context, len(prompt) + _GOLDEN_LENGTH))
    step, ids = np.array([prompt], np.int64), []
    while cache.length + step.shape[1] <= cache.capacity:
        logits = decoder.run(step, cache)[0, -1]
        best = int(logits.argmax())
        lead = logits[best] - np.delete(logits, best).max(initial=-np.inf)
        if lead < _CLEAR_LEAD:
            break
        ids.append(best)
        step = np.array([[best]], np.int64)
    return tuple(ids)
