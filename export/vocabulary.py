"""What an error in each row of a vocabulary matrix costs.

A row is read as the head wherever its token is likely, and where it is the embedding too, wherever
its token occurs. To second order, an error d of the row of a token v diverges the predictions over
a text by

    1/2 d (sum_t p_tv (1 - p_tv) x_t x_t^T + n_v S) d    nats,

x_t what the head reads at place t, p_tv the probability of v there, n_v how often v is to be
expected, and S what an error of an embedding costs there on the mean: the Fisher matrix of the
predictions, block by block (https://arxiv.org/abs/1412.1193). So a rare word is rounded for the few
contexts in which it could come, not for those that are common.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from gptrt.architecture import ModelConfig

from .model import GPT

_OWN_CONTEXTS = 512  # of a row, those where its token is likeliest; the others are as all are
_ANYWHERE = 0.1  # more, of any context: what is unlikely here may be likely in another text
_LEAST = 1e-6  # of a context: what is likely nowhere is rounded too
_VALUES = 1 << 25  # of a row's contexts, computed with at a time
_LOGITS = 1 << 24
_TOKENS, _AT_A_TIME = 1 << 15, 1 << 10  # for S, which is one for all rows
_QUICK = 1 << 32  # rows times the square of their width: eight times what takes half a minute


def quick_by_row(config: ModelConfig) -> bool:
    """Whether rounding every row for itself is a matter of a few minutes at most."""
    return config.vocab_size * config.n_embd**2 <= _QUICK


@dataclass(frozen=True)
class RowCosts:
    """`contexts` [tokens, n_embd] is what the head [vocab, n_embd] reads, `log_totals` [tokens] the
    logarithms of the sums of its exponentials; `embedding_cost` [n_embd, n_embd] the S above, None
    of a matrix that is no embedding."""

    head: Tensor
    contexts: Tensor
    log_totals: Tensor
    embedding_cost: Tensor | None = None

    @classmethod
    def measure(
        cls, head: Tensor, contexts: Tensor, embedding_cost: Tensor | None = None
    ) -> RowCosts:
        rows = max(1, _LOGITS // len(head))
        totals = [torch.logsumexp(x @ head.T, -1) for x in torch.split(contexts, rows)]
        return cls(head, contexts, torch.cat(totals), embedding_cost)

    def of(self, first: int, last: int) -> Iterator[tuple[slice, Tensor]]:
        """The cost matrices [rows, n_embd, n_embd] of rows first to last, some rows at a time."""
        tokens, width = self.contexts.shape
        own = min(_OWN_CONTEXTS, tokens)
        step = max(1, _VALUES // max(tokens, own * width, width * width))
        common = self.contexts.T @ self.contexts / tokens
        for start in range(first, last, step):
            rows = slice(start, min(start + step, last))
            logits = self.head[rows] @ self.contexts.T  # [rows, tokens]
            likely = logits.sub_(self.log_totals).exp_()
            occurrences = likely.sum(-1)
            likely.mul_(1.0 - likely)
            weights, places = likely.topk(own)
            x = self.contexts[places]  # [rows, own, n_embd]
            costs = (x * weights.unsqueeze(-1)).transpose(1, 2) @ x
            others = (likely.sum(-1) - weights.sum(-1)).clamp(min=0.0)
            others += _ANYWHERE * (weights.sum(-1) + others) + _LEAST
            costs += others[:, None, None] * common
            if self.embedding_cost is not None:
                costs += occurrences[:, None, None] * self.embedding_cost
            yield rows, costs


def embedding_cost(model: GPT, windows: Tensor) -> Tensor:
    """The mean Fisher matrix [n_embd, n_embd] of a row of the embedding where its token occurs: of
    the gradients of the log-likelihood of tokens that the model itself draws, reading `windows` of
    text [count, length]."""
    random = torch.Generator().manual_seed(0)
    head, total, tokens = model.lm_head.weight.detach(), torch.zeros(()), 0
    length = windows.shape[1]
    for ids in torch.split(windows[: -(-_TOKENS // length)], max(1, _AT_A_TIME // length)):
        with torch.enable_grad():
            x = model.embed(ids).detach().requires_grad_()
            hidden = model.to_head(model.states(x))
        drawn = _gradient_of_draws(hidden.detach().flatten(0, 1), head, random)
        (gradient,) = torch.autograd.grad(hidden, x, drawn.view_as(hidden))
        flat = gradient.flatten(0, 1)
        total, tokens = total + flat.T @ flat, tokens + len(flat)
    cost = total / tokens
    if model.config.projected:
        into_stream = model.project_in.weight.detach()
        cost = into_stream.T @ cost @ into_stream
    return cost


def _gradient_of_draws(x: Tensor, head: Tensor, random: torch.Generator) -> Tensor:
    """d log p(token) / d x [tokens, n_embd], of a token drawn from softmax(x @ head.T) a place."""
    found = []
    for part in torch.split(x, max(1, _LOGITS // len(head))):
        probs = torch.softmax(part @ head.T, -1)
        drawn = torch.multinomial(probs, 1, generator=random).squeeze(1)
        found.append(head[drawn] - probs @ head)
    return torch.cat(found)
