"""What an error costs where it arises: Fisher matrices of what the parts of a model give.

An error e in what a product gives at a place of a text diverges the predictions by

    1/2 e^T G e    nats, on the mean and to second order, with G = E[g g^T],

g the gradient there of the log-likelihood of tokens that the model itself draws
(https://arxiv.org/abs/1412.1193). So a product may be wrong in directions that nothing after it
reads, and an error in one of its outputs may be made good in another.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from gptrt.errors import FidelityError

from .model import GPT
from .progress import Progress, silent

_TOKENS = 1 << 15
_LENGTH = 256  # of a text in one piece: what is kept for the way back grows with it
_AT_A_TIME = 1 << 10  # tokens, of a small model
_KEPT = 1 << 28  # values for the way back, of a large one
_MOST_VALUES = 1 << 29  # of all matrices of products: 2 GB
_LOGITS = 1 << 24


@dataclass(frozen=True)
class OutputCosts:
    """The mean Fisher matrices: `embedded` [n_embd, n_embd] of what the first block reads, None
    where no head is made of the embedding too, and `products` [out, out] of what each matrix
    between it and the head gives, by its name. A model for which these would be too large a part of
    the memory, from some 300 million parameters, has none."""

    embedded: Tensor | None
    products: dict[str, Tensor]

    @classmethod
    @torch.no_grad()
    def measure(
        cls, model: GPT, windows: NDArray[np.int64], progress: Progress = silent
    ) -> OutputCosts:
        """Of a model that reads `windows` of text [count, length]."""
        products = _products(model)
        if not products and not model.config.tied:
            return cls(None, {})
        random = torch.Generator().manual_seed(0)
        head, sums, tokens = model.lm_head.weight.detach(), dict[str, Tensor](), 0
        with _watching_gradients(products, sums):
            for ids in _pieces(model, windows):
                progress(0.0, f"measuring what errors cost: {tokens:,} tokens")
                with torch.enable_grad():
                    x = model.embed(ids).detach().requires_grad_()
                    hidden = model.to_head(model.states(x))
                drawn = _gradient_of_draws(hidden.detach().flatten(0, 1), head, random)
                (gradient,) = torch.autograd.grad(hidden, x, drawn.view_as(hidden))
                if model.config.tied:
                    add_products(sums, _EMBEDDED, gradient)
                tokens += ids.numel()
        means = {name: total / tokens for name, total in sums.items()}
        return cls(means.pop(_EMBEDDED, None), means)


_EMBEDDED = ""  # among the sums: no parameter has this name


def _pieces(model: GPT, windows: NDArray[np.int64]) -> Iterator[Tensor]:
    """Ids [count, length] from all over the text, as many at a time as there is memory for the way
    back."""
    config = model.config
    length = min(_LENGTH, windows.shape[1])
    pieces = torch.from_numpy(windows[:, : windows.shape[1] // length * length]).reshape(-1, length)
    values = config.n_layer * (8 * config.n_embd + 4 * config.n_inner)  # a token, about
    count = min(_AT_A_TIME, _KEPT // values) // length
    wanted = min(len(pieces), -(-_TOKENS // length))
    spread = torch.arange(wanted) * len(pieces) // wanted
    yield from torch.split(pieces[spread], max(1, count))


def _products(model: GPT) -> dict[str, nn.Linear]:
    """The products of the blocks, by the names of their matrices; none where that is too much."""
    found = {
        f"{name}.weight": module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.startswith("h.")
    }
    values = sum(module.out_features**2 for module in found.values())
    return found if values <= _MOST_VALUES else {}


@contextmanager
def _watching_gradients(products: dict[str, nn.Linear], sums: dict[str, Tensor]) -> Iterator[None]:
    """On the way back, g g^T of what each product gives is added to `sums`."""
    handles = [
        module.register_full_backward_hook(partial(_add_gradient, sums, name))
        for name, module in products.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _add_gradient(
    sums: dict[str, Tensor], name: str, _module: nn.Module, _reads: Any, gives: tuple[Tensor, ...]
) -> None:
    add_products(sums, name, gives[0])


def add_products(sums: dict[str, Tensor], name: str, vectors: Tensor) -> None:
    """To what is summed under a name, x xᵀ for each of the vectors x [..., width]."""
    flat = vectors.flatten(0, -2)
    part = flat.T @ flat
    sums[name] = sums[name] + part if name in sums else part


def _gradient_of_draws(x: Tensor, head: Tensor, random: torch.Generator) -> Tensor:
    """d log p(token) / d x [tokens, n_embd], of a token drawn from softmax(x @ head.T) a place."""
    found = []
    for part in torch.split(x, max(1, _LOGITS // len(head))):
        probs = torch.softmax(part @ head.T, -1)
        if not torch.isfinite(probs).all():
            raise FidelityError(
                "a model that computes numbers", found="none", do="restore the checkpoint"
            )
        drawn = torch.multinomial(probs, 1, generator=random).squeeze(1)
        found.append(head[drawn] - probs @ head)
    return torch.cat(found)
