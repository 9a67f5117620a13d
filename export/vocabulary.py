"""What an error in each row of a vocabulary matrix costs.

A row is read as the head wherever its token is likely, and where it is the embedding too, wherever
its token occurs. To second order, an error d of the row of a token v diverges the predictions over
a text by

    1/2 d (sum_t p_tv (1 - p_tv) x_t x_t^T + n_v S) d    nats,

x_t what the head reads at place t, p_tv the probability of v there, n_v how often v is to be
expected, and S what an error of an embedding costs there on the mean (`fisher`). So a rare word is
rounded for the few contexts in which it could come, not for those that are common.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from gptrt.architecture import ModelConfig

_OWN_CONTEXTS = 512  # of a row, those where its token is likeliest; the others are as all are
_ANYWHERE = 0.1  # more, of any context: what is unlikely here may be likely in another text
_LEAST = 1e-6  # of a context: what is likely nowhere is rounded too
_VALUES = 1 << 25  # of a row's contexts, computed with at a time
_LOGITS = 1 << 24
_QUICK = 1 << 32  # rows times the square of their width: eight times what takes half a minute


def quick_by_row(config: ModelConfig) -> bool:
    """Whether rounding every row for itself is a matter of a few minutes at most."""
    return config.vocab_size * config.n_embd**2 <= _QUICK


@dataclass(frozen=True)
class RowCosts:
    """`contexts` [tokens, n_embd] is what the head [vocab, n_embd] reads, `log_totals` [tokens] the
    logarithms of the sums of its exponentials, and `unsure` [tokens] the sums of p (1 - p) over all
    tokens; `embedding_cost` [n_embd, n_embd] the S above, None of a matrix that is no embedding."""

    head: Tensor
    contexts: Tensor
    log_totals: Tensor
    unsure: Tensor
    embedding_cost: Tensor | None = None

    @classmethod
    def measure(
        cls, head: Tensor, contexts: Tensor, embedding_cost: Tensor | None = None
    ) -> RowCosts:
        totals, unsure = [], []
        for x in torch.split(contexts, max(1, _LOGITS // len(head))):
            logits = x @ head.T
            total = torch.logsumexp(logits, -1)
            totals.append(total)
            same_twice = torch.exp(torch.logsumexp(2.0 * logits, -1) - 2.0 * total)
            unsure.append((1.0 - same_twice).clamp(min=0.0))
        return cls(head, contexts, torch.cat(totals), torch.cat(unsure), embedding_cost)

    def mean(self) -> Tensor:
        """The cost matrix [n_embd, n_embd] of all rows alike, times their number."""
        cost = (self.contexts * self.unsure.unsqueeze(1)).T @ self.contexts
        if self.embedding_cost is not None:
            cost += len(self.contexts) * self.embedding_cost
        return cost

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
