"""A vocabulary matrix that rounds well: the same model with its vocabulary in a basis of its own.

Every value of a block has the step of the largest. The columns of a trained vocabulary matrix are
not alike, and few directions hold much of it, so most values are small beside their step. But an
embedding is read only through what comes next, and what a head reads comes through what was before:
with any invertible K, W x is (W K^-1) (K x). Here K = R C^(1/4), where C is the covariance of the
rows. It takes half of the spread between directions (in logarithms) out of W; all of it would be
too much, as then the K x are spread as widely. R is a random rotation, after which no column stands
out: incoherence, as QuIP (https://arxiv.org/abs/2307.13304) has it.

K is a product of its own in the graph, [n_embd, n_embd]: `project_out` before the head and, where
the head is the embedding too, its transpose `project_in` after that. Beside a vocabulary of many
times the width both are small.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from gptrt.architecture import ModelConfig

PROJECTIONS = {"project_in.weight", "project_out.weight"}

_ROWS = 1 << 13  # computed with at a time
_LEAST_ROWS = 16  # a column: below, the projections are too much beside the vocabulary
_LEAST_SPREAD = 1e-6  # of the largest eigenvalue, so that what W lacks can be turned back too

Weights = tuple[ModelConfig, dict[str, Tensor]]


def worth_projecting(config: ModelConfig) -> bool:
    """Whether the two matrices are little beside the vocabulary."""
    return config.vocab_size >= _LEAST_ROWS * config.n_embd


def project(config: ModelConfig, state: Mapping[str, Tensor]) -> Weights:
    """The same model, to the precision of fp32, with its vocabulary in a basis of its own."""
    head = state["lm_head.weight"]
    there, back = _basis(head)
    new = dict(state) | {
        "lm_head.weight": _times(head, back),
        "project_out.weight": there.float(),
    }
    if config.tied:
        new["wte.weight"] = new["lm_head.weight"]
        new["project_in.weight"] = there.T.float().contiguous()
    return replace(config, projected=True), new


def unproject(config: ModelConfig, state: Mapping[str, Tensor]) -> Weights:
    """The inverse. Where rounding has made the projections differ, the head is what is kept."""
    new = dict(state)
    if not config.projected:
        return config, new
    new["lm_head.weight"] = _times(new["lm_head.weight"], new.pop("project_out.weight").double())
    if config.tied:
        del new["project_in.weight"]
        new["wte.weight"] = new["lm_head.weight"]
    return replace(config, projected=False), new


def _basis(head: Tensor) -> tuple[Tensor, Tensor]:
    """K and its inverse, both [n_embd, n_embd], for a matrix [vocab, n_embd]."""
    gram = sum(part.T @ part for part in _in_double(head))
    spread, directions = torch.linalg.eigh(gram)
    root = spread.clamp(min=float(spread.max()) * _LEAST_SPREAD) ** 0.25
    root = root / root.log().mean().exp()
    turn = _rotation(len(root))
    return turn @ (directions * root) @ directions.T, (directions / root) @ directions.T @ turn.T


def _times(matrix: Tensor, square: Tensor) -> Tensor:
    return torch.cat([(part @ square).float() for part in _in_double(matrix)])


def _in_double(matrix: Tensor) -> Iterator[Tensor]:
    """Rows by rows: whole, a vocabulary matrix would need its memory twice more."""
    return (part.double() for part in torch.split(matrix, _ROWS))


def _rotation(size: int) -> Tensor:
    """A random rotation, the same each time."""
    random = torch.Generator().manual_seed(0)
    noise = torch.randn(size, size, generator=random, dtype=torch.float64)
    rotation: Tensor = torch.linalg.qr(noise).Q
    return rotation
