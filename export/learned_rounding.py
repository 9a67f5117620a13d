"""Rounding by gradient: which way each weight goes and how large the steps of its block are, so
that the model predicts what it predicted before.

SignRound (https://arxiv.org/abs/2309.05516) asks this of one layer after the other; here it is
asked of all at once, and of what they are for: the divergence of the predictions on calibration
text. No integer moves by more than one, and what is not rounded stays as it was: nothing is trained
anew.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import numpy as np
import torch

from .averaging import Average
from .blocks import BlockFormat, BlockMatrix
from .calibration import Ids, correct_errors
from .loss import Lesson, linear_cross_entropy
from .model import GPT
from .optimizer import Optimizer, rate_scale
from .precision import autocast, product_dtype
from .progress import Progress, within
from .settings import OptimizerConfig
from .trained_rounding import TrainedRounding, hidden_and_head

_WARM_UP = 10
_RATE = 0.01  # steps of the grid a step: few steps must turn what is to be turned
_BATCH_TOKENS = 1024
MORE_TEXT = 4  # times as much as error correction needs: each weight learns for itself
_REACH = 1.0  # steps of the grid that a weight may go from where it began
_MEMORY = 0.98  # of the mean: of about 50 steps
_CORRECTION = 0.1  # of the time, about


def learn_rounding(
    model: GPT,
    formats: Mapping[str, BlockFormat],
    windows: Ids,
    progress: Progress,
    steps: int = 600,
) -> dict[str, BlockMatrix]:
    """Round every matrix in `formats` for `windows` of calibration text [count, length]: first as
    error correction does, then by steps from there. The same input gives the same matrices."""
    correcting = within(progress, 0.0, _CORRECTION)
    corrected = correct_errors(model, formats, windows[::MORE_TEXT], correcting, by_row=True)
    frozen = copy.deepcopy(model).eval().requires_grad_(False)
    rounding = TrainedRounding.start(corrected, frozen.state_dict())
    home = {name: tensor.detach().clone() for name, tensor in rounding.positions.items()}
    learning = rounding.parameters()
    average = Average(learning, _MEMORY)
    # So few steps gain little by a pull.
    optimizer = Optimizer(learning, OptimizerConfig(position_lr=_RATE, position_pull=0.0))
    draw = np.random.default_rng(0)
    size = max(1, _BATCH_TOKENS // windows.shape[1])
    for step in range(steps):
        ids = torch.from_numpy(windows[draw.integers(0, len(windows), size)])
        loss = _divergence(frozen, rounding, ids)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step(rate_scale(step, step / steps, _WARM_UP))
        with torch.no_grad():
            for name, positions in rounding.positions.items():
                positions.clamp_(home[name] - _REACH, home[name] + _REACH)
        average.update(step + 1)
        share = _CORRECTION + (1.0 - _CORRECTION) * (step + 1) / steps
        progress(share, f"learning to round: step {step + 1}, divergence {loss.item():.4f} nats")
    with average.in_place():
        return rounding.matrices()


def _divergence(model: GPT, rounding: TrainedRounding, ids: torch.Tensor) -> torch.Tensor:
    """Mean KL(model || rounded model) in nats a token."""
    dtype = product_dtype(model.config.n_embd, ids.device)
    with autocast(dtype, ids.device):
        hidden, head = hidden_and_head(model, rounding, ids)
        with torch.no_grad():
            lesson = Lesson(model.hidden(ids).flatten(0, 1), model.lm_head.weight, 1.0)
    return linear_cross_entropy(hidden.flatten(0, 1), head, None, dtype, lesson)
