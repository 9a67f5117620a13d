"""The optimizers: Muon for the matrices of the blocks, AdamW for everything else.

Muon (https://kellerjordan.github.io/posts/muon/) takes steps whose singular values are all one;
on matrices it needs about half the steps of AdamW. Embeddings, head, norms and biases are not
maps between residual streams, so they stay with AdamW.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gptrt.schema import bounded

from .precision import product_dtype
from .trained_rounding import POSITION_PREFIX, SCALE_PREFIX


@dataclass(frozen=True)
class OptimizerConfig:
    """Learning rates are peaks, reached after warm-up; `matrix_lr` is Muon's, where a
    model is trained for its rounding, `position_lr` is that of its weights in steps of their grid,
    and `scale_lr` that of the logarithms of the scales. `position_pull` draws weights to the middle
    of their integers, by that share of the way a step at the peak rate, so that noise does not
    gather and turn them to and fro (https://arxiv.org/abs/2203.11086 calls it dampening)."""

    kind: Literal["muon", "adamw"] = "muon"
    lr: float = bounded(0.0, 10.0, default=3e-3)
    matrix_lr: float = bounded(0.0, 10.0, default=0.02)
    position_lr: float = bounded(0.0, 10.0, default=0.004)
    scale_lr: float = bounded(0.0, 10.0, default=1e-3)
    position_pull: float = bounded(0.0, 1.0, default=5e-4)
    weight_decay: float = bounded(0.0, 10.0, default=0.1)
    beta1: float = bounded(0.0, 0.999999, default=0.9)
    beta2: float = bounded(0.0, 0.999999, default=0.95)
    momentum: float = bounded(0.0, 1.0, default=0.95)


class Optimizer:
    """One or two PyTorch optimizers that step as one, their state kept by parameter name."""

    def __init__(self, named: dict[str, nn.Parameter], config: OptimizerConfig) -> None:
        """For parameters by name, a tied one once."""
        matrices = {
            n: p
            for n, p in named.items()
            if config.kind == "muon" and n[:2] == "h." and p.ndim == 2
        }
        rest = {n: p for n, p in named.items() if n not in matrices}
        self._names: dict[Tensor, str] = {p: n for n, p in named.items()}
        self._positions = [p for n, p in named.items() if n.startswith(POSITION_PREFIX)]
        self._pull = config.position_pull
        makers = ((_adamw, rest), (_muon, matrices))
        self._parts = [make(part, config) for make, part in makers if part]
        self._peaks = [[group["lr"] for group in part.param_groups] for part in self._parts]

    def step(self, scale: float) -> None:
        """One step at `scale` times the peak learning rates; gradients are cleared."""
        for part, peaks in zip(self._parts, self._peaks, strict=True):
            for group, peak in zip(part.param_groups, peaks, strict=True):
                group["lr"] = peak * scale
            part.step()
            part.zero_grad(set_to_none=True)
        if self._pull:
            with torch.no_grad():
                for positions in self._positions:
                    positions.lerp_(positions.round(), self._pull * scale)

    def state(self) -> dict[str, Tensor]:
        """All moments, flat: '<parameter>/<moment>' -> tensor."""
        return {
            f"{self._names[parameter]}/{key}": torch.as_tensor(value)
            for part in self._parts
            for parameter, moments in part.state.items()
            for key, value in moments.items()
        }

    def load(self, state: dict[str, Tensor]) -> None:
        """Take up what `state()` gave, for the same model and config."""
        by_name: dict[str, dict[str, Tensor]] = {}
        for path, value in state.items():
            name, key = path.rsplit("/", 1)
            by_name.setdefault(name, {})[key] = value
        for part in self._parts:
            for group in part.param_groups:
                for parameter in group["params"]:
                    if moments := by_name.get(self._names[parameter]):
                        part.state[parameter] = moments


def rate_scale(step: int, share: float, warmup_steps: int, final: float = 0.0) -> float:
    """Linear warm-up, then half a cosine over the rest of a run, down to `final`; `share` of it, 0
    to 1, is done."""
    warm = min(1.0, (step + 1) / max(1, warmup_steps))
    cosine = 0.5 * (1.0 + math.cos(math.pi * share))
    return warm * (final + (1.0 - final) * cosine)


def _adamw(named: dict[str, nn.Parameter], config: OptimizerConfig) -> torch.optim.Optimizer:
    """Weight decay on matrices only: norms, biases and scales have no reason to shrink."""
    rates = {POSITION_PREFIX: config.position_lr, SCALE_PREFIX: config.scale_lr}
    rest = [p for n, p in named.items() if not n.startswith(tuple(rates))]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in rest if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
    ]
    for prefix, lr in rates.items():
        own = [p for n, p in named.items() if n.startswith(prefix)]
        groups.append({"params": own, "weight_decay": 0.0, "lr": lr})
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        fused=True,
    )


def _muon(named: dict[str, nn.Parameter], config: OptimizerConfig) -> torch.optim.Optimizer:
    rates = {"lr": config.matrix_lr, "weight_decay": config.weight_decay}
    return Muon(list(named.values()), **rates, momentum=config.momentum)


class Muon(torch.optim.Optimizer):
    """Momentum whose steps are made orthogonal, for matrices.

    As `torch.optim.Muon` computes it, except that the products are in the numbers in which this
    hardware multiplies fastest. There it is bfloat16 everywhere, which takes four times as long as
    float32 on processors without such instructions, and that is as long as all else in a step.
    """

    def __init__(
        self, matrices: list[nn.Parameter], *, lr: float, weight_decay: float, momentum: float
    ) -> None:
        rates = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum}
        super().__init__(matrices, rates)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        del closure  # of interest to other optimizers
        for group in self.param_groups:
            for matrix in group["params"]:
                if matrix.grad is not None:
                    self._step(matrix, group)

    def _step(self, matrix: nn.Parameter, group: dict[str, Any]) -> None:
        state, grad, momentum = self.state[matrix], matrix.grad, group["momentum"]
        assert grad is not None
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(grad)
        buffer = state["momentum_buffer"].lerp_(grad, 1 - momentum)
        update = orthogonal(grad.lerp(buffer, momentum))  # Nesterov's look ahead
        rows, columns = matrix.shape
        matrix.mul_(1 - group["lr"] * group["weight_decay"])
        matrix.add_(update.to(matrix.dtype), alpha=-group["lr"] * max(1, rows / columns) ** 0.5)


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
