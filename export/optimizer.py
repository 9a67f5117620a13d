"""The optimizers: Muon for the matrices of the blocks, AdamW for everything else.

Muon (https://kellerjordan.github.io/posts/muon/) takes steps whose singular values are all one;
on matrices it needs about half the steps of AdamW. Embeddings, head, norms and biases are not
maps between residual streams, so they stay with AdamW.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from .precision import product_dtype
from .settings import OptimizerConfig
from .trained_rounding import POSITION_PREFIX, SCALE_PREFIX

_EPSILON = 1e-8  # AdamW's


@dataclass(frozen=True)
class _Group:
    """Parameters by name that learn alike, at the peak rate `lr`; `decay` of themselves shrinks at
    every step of that rate."""

    named: dict[str, nn.Parameter]
    lr: float
    decay: float


class Optimizer:
    """Both as one, their moments kept by the names of parameters.

    AdamW's steps are PyTorch's, but none of its optimizer objects: to make one imports its
    compiler, which takes as long as all the rest of PyTorch.
    """

    def __init__(self, named: dict[str, nn.Parameter], config: OptimizerConfig) -> None:
        """For parameters by name, a tied one once."""
        by_muon = config.kind == "muon"
        matrices = {n: p for n, p in named.items() if by_muon and n[:2] == "h." and p.ndim == 2}
        rest = {n: p for n, p in named.items() if n not in matrices}
        self._config, self._named = config, named
        self._muon = _Group(matrices, config.matrix_lr, config.weight_decay)
        self._adamw = _adamw_groups(rest, config)
        self._moments: dict[str, dict[str, Tensor]] = {}

    @torch.no_grad()
    def step(self, scale: float) -> None:
        """One step at `scale` times the peak learning rates; gradients are cleared."""
        for name, matrix in self._muon.named.items():
            if matrix.grad is not None:
                rate, config = self._muon.lr * scale, self._config
                moments = self._moments.setdefault(name, {})
                muon(matrix, moments, rate, self._muon.decay, config.momentum)
        for group in self._adamw:
            self._step_adamw(group, group.lr * scale)
        for name, parameter in self._named.items():
            parameter.grad = None
            if self._config.position_pull and name.startswith(POSITION_PREFIX):
                parameter.lerp_(parameter.round(), self._config.position_pull * scale)

    def _step_adamw(self, group: _Group, rate: float) -> None:
        learning = {n: p for n, p in group.named.items() if p.grad is not None}
        for name, parameter in learning.items():
            if name not in self._moments:
                self._moments[name] = _at_rest(parameter)
        kept = [self._moments[name] for name in learning]
        adamw(
            list(learning.values()),
            [p.grad for p in learning.values() if p.grad is not None],
            [moments["exp_avg"] for moments in kept],
            [moments["exp_avg_sq"] for moments in kept],
            [],
            [moments["step"] for moments in kept],
            fused=True,
            amsgrad=False,
            beta1=self._config.beta1,
            beta2=self._config.beta2,
            lr=rate,
            weight_decay=group.decay,
            eps=_EPSILON,
            maximize=False,
        )

    def state(self) -> dict[str, Tensor]:
        """All moments, flat: '<parameter>/<moment>' -> tensor."""
        return {
            f"{name}/{key}": value
            for name, moments in self._moments.items()
            for key, value in moments.items()
        }

    def load(self, state: dict[str, Tensor]) -> None:
        """Take up what `state()` gave, for the same model and config."""
        for path, value in state.items():
            name, key = path.rsplit("/", 1)
            if name in self._named:
                self._moments.setdefault(name, {})[key] = value


def rate_scale(step: int, share: float, warmup_steps: int, final: float = 0.0) -> float:
    """Linear warm-up, then half a cosine over the rest of a run, down to `final`; `share` of it, 0
    to 1, is done."""
    warm = min(1.0, (step + 1) / max(1, warmup_steps))
    cosine = 0.5 * (1.0 + math.cos(math.pi * share))
    return warm * (final + (1.0 - final) * cosine)


def _adamw_groups(named: dict[str, nn.Parameter], config: OptimizerConfig) -> list[_Group]:
    """Weight decay on matrices only: norms, biases and scales have no reason to shrink."""
    rates = {POSITION_PREFIX: config.position_lr, SCALE_PREFIX: config.scale_lr}
    rest = {n: p for n, p in named.items() if not n.startswith(tuple(rates))}
    groups = [
        _Group({n: p for n, p in rest.items() if p.ndim >= 2}, config.lr, config.weight_decay),
        _Group({n: p for n, p in rest.items() if p.ndim < 2}, config.lr, 0.0),
    ]
    for prefix, lr in rates.items():
        own = {n: p for n, p in named.items() if n.startswith(prefix)}
        groups.append(_Group(own, lr, 0.0))
    return [group for group in groups if group.named]


def _at_rest(parameter: nn.Parameter) -> dict[str, Tensor]:
    """AdamW's moments before the first step."""
    steps = torch.zeros((), dtype=torch.float32, device=parameter.device)
    averages = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
    return averages | {"step": steps}


def muon(
    matrix: Tensor, moments: dict[str, Tensor], lr: float, weight_decay: float, momentum: float
) -> None:
    """Momentum whose step is made orthogonal; `moments` are what the steps of `matrix` remember.

    As `torch.optim.Muon` computes it, except that the products are in the numbers in which this
    hardware multiplies fastest. There it is bfloat16 everywhere, which takes four times as long as
    float32 on processors without such instructions, and that is as long as all else in a step.
    """
    grad = matrix.grad
    assert grad is not None
    if "momentum_buffer" not in moments:
        moments["momentum_buffer"] = torch.zeros_like(grad)
    buffer = moments["momentum_buffer"].lerp_(grad, 1 - momentum)
    update = orthogonal(grad.lerp(buffer, momentum))  # Nesterov's look ahead
    rows, columns = matrix.shape
    matrix.mul_(1 - lr * weight_decay)
    matrix.add_(update.to(matrix.dtype), alpha=-lr * max(1, rows / columns) ** 0.5)


# Of a polynomial of degree 5, so steep at zero that five steps bring nearly all singular values
# near one: https://kellerjordan.github.io/posts/muon/.
_COEFFICIENTS, _ITERATIONS = (3.4445, -4.7750, 2.0315), 5


def orthogonal(matrix: Tensor) -> Tensor:
    """The matrix with all its singular values brought to about one, by Newton and Schulz's
    iteration."""
    x = matrix.to(product_dtype(min(matrix.shape), matrix.device))
    wide = x if len(matrix) <= matrix.shape[1] else x.T
    wide = wide / wide.norm().clamp(min=1e-7)  # the largest is at most one
    a, b, c = _COEFFICIENTS
    for _ in range(_ITERATIONS):
        gram = wide @ wide.T
        wide = torch.addmm(wide, torch.addmm(gram, gram, gram, beta=b, alpha=c), wide, beta=a)
    return wide if len(matrix) <= matrix.shape[1] else wide.T
