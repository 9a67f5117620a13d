"""How much data: what published laws say about parameters and tokens. Standard library only.

They were fitted on models of tens of millions of parameters and more, trained on text of the web.
Where a model is smaller, or its text of another kind, they give a direction, not a forecast.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

FITTED_FROM = 70_000_000  # parameters, https://arxiv.org/abs/2203.15556
RULE_OF_THUMB = 20  # tokens a parameter, of the same
GOOD_EPOCHS = 4  # up to which repeated text is nearly as good as new, arxiv.org/abs/2305.16264
_REPEATS = (
    15.387756  # R*_D, appendix A of the same: repeats of so many epochs lose 1/e of their worth
)
_TRAIN_FLOPS, _SERVE_FLOPS = 6, 2  # of a parameter and token


@dataclass(frozen=True)
class Law:
    """The loss of N parameters trained on D tokens, in nats a token: E + A/N^alpha + B/D^beta
    (https://arxiv.org/abs/2203.15556, approach 3). N counts embeddings."""

    e: float
    a: float
    b: float
    alpha: float
    beta: float

    def loss(self, parameters: float, tokens: float) -> float:
        return float(self.e + self.a * parameters**-self.alpha + self.b * tokens**-self.beta)

    def optimal_tokens(self, parameters: float) -> float:
        """The D with which N parameters are the best use of the compute 6ND: there a little more
        of either lowers the loss alike, alpha A N^-alpha = beta B D^-beta."""
        ratio = self.beta * self.b / (self.alpha * self.a)
        return float((ratio * parameters**self.alpha) ** (1 / self.beta))

    def tokens_for(self, loss: float, parameters: float) -> float:
        """The D with which N parameters reach a loss; infinite where they never do."""
        left = loss - self.e - self.a * parameters**-self.alpha
        return float((self.b / left) ** (1 / self.beta)) if left > 0 else math.inf


# The same data fitted again: https://arxiv.org/abs/2404.10102
LAW = Law(e=1.8172, a=482.01, b=2085.43, alpha=0.3478, beta=0.3658)


@dataclass(frozen=True)
class Serving:
    """The cheapest way to a loss where `tokens` are read or written in all of a model's life:
    `parameters` trained on `training_tokens`, which saves the share `saved` of all operations."""

    tokens: float
    parameters: float
    training_tokens: float
    saved: float


def cheapest_to_serve(parameters: float, tokens: float, law: Law = LAW) -> Serving:
    """The (N, D) with the loss that `parameters` reach at their compute-optimum and the least
    6ND + 2N * `tokens` (https://arxiv.org/abs/2401.00448): smaller, and trained for longer."""
    target = law.loss(parameters, law.optimal_tokens(parameters))

    def cost(log_n: float) -> float:
        n = math.exp(log_n)
        return n * (_TRAIN_FLOPS * law.tokens_for(target, n) + _SERVE_FLOPS * tokens)

    # Below the first of these the loss is out of reach; serving never makes a larger model better.
    smallest = (law.a / (target - law.e)) ** (1 / law.alpha)
    best = _lowest(cost, math.log(smallest), math.log(parameters))
    n = math.exp(best)
    saved = 1 - cost(best) / cost(math.log(parameters))
    return Serving(tokens, n, law.tokens_for(target, n), max(0.0, saved))


def _lowest(function: Callable[[float], float], low: float, high: float) -> float:
    """Where a function that falls and then rises is lowest, by golden section."""
    golden = (math.sqrt(5) - 1) / 2
    while high - low > 1e-9:
        left, right = high - golden * (high - low), low + golden * (high - low)
        if function(left) < function(right):
            high = right
        else:
            low = left
    return (low + high) / 2


def effective_tokens(unique: float, read: float) -> float:
    """How many new tokens would be as good as `read` ones of which only `unique` are different
    (https://arxiv.org/abs/2305.16264, equation 5)."""
    if read <= unique:
        return read
    repeats = read / unique - 1
    return unique * (1 + _REPEATS * (1 - math.exp(-repeats / _REPEATS)))
