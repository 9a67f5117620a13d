"""Quantization-aware training: the forward pass computes with rounded matrices, and both the
matrices and the scales of their blocks learn from it.

What is rounded is what a bundle stores (`blocks`), to the bit: a scale a block, the integers of
MatMulNBits. Rounding has no gradient, so the weight takes that of its rounded value (the
straight-through estimator, https://arxiv.org/abs/1308.3432), and a scale takes that of the rounding
error as in LSQ (https://arxiv.org/abs/1902.08153). Scales are learnt by their logarithm: a step
then changes each by a share of itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptrt.errors import CheckpointError, OptionError
from gptrt.schema import decode

from .blocks import BlockFormat, BlockMatrix, Grid
from .model import GPT

SCALE_PREFIX = "log_scales/"  # of what learns beside the parameters of the model
_SIGN_PREFIX = "signs/"
_SMALLEST = 1e-9  # a block of zeros has a scale too
_CELL = 0.2  # of a step to either side of an integer: nearer to the edge, noise alone would turn it


class TrainedRounding:
    """The scales of a model's matrices, by parameter name, while they learn.

    `log_scales` and `signs` are [rows, blocks]; formats are symmetric.
    """

    def __init__(
        self,
        formats: Mapping[str, BlockFormat],
        log_scales: Mapping[str, Tensor],
        signs: Mapping[str, Tensor],
    ) -> None:
        self.formats, self.signs = dict(formats), dict(signs)
        self.log_scales = {name: nn.Parameter(tensor) for name, tensor in log_scales.items()}

    @classmethod
    def start(cls, matrices: Mapping[str, BlockMatrix]) -> TrainedRounding:
        """From matrices that are rounded already."""
        scales = {name: torch.from_numpy(m.scales) for name, m in matrices.items()}
        return cls(
            {name: m.format for name, m in matrices.items()},
            {name: s.abs().clamp(min=_SMALLEST).log() for name, s in scales.items()},
            {name: torch.where(s < 0, -1.0, 1.0) for name, s in scales.items()},
        )

    def weights(self, model: GPT) -> dict[str, Tensor]:
        """The rounded matrices of `model` by parameter name; gradients reach it and the scales."""
        return {n: self._rounded(n, model.get_parameter(n)) for n in self.formats}

    def _rounded(self, name: str, weight: Tensor) -> Tensor:
        fmt = self.formats[name]
        columns = weight.shape[1]
        blocks = F.pad(weight, (0, -columns % fmt.block_size)).view(len(weight), -1, fmt.block_size)
        scales = (self.log_scales[name].exp() * self.signs[name]).unsqueeze(-1)
        snapped: Tensor = _Snap.apply(blocks, scales, fmt.zero)  # type: ignore[no-untyped-call]
        return snapped.flatten(1)[:, :columns]

    def parameters(self) -> dict[str, nn.Parameter]:
        """What learns, by names of its own."""
        return {SCALE_PREFIX + name: tensor for name, tensor in self.log_scales.items()}

    def grid(self, name: str) -> Grid:
        """Where the values of a matrix may lie now."""
        fmt = self.formats[name]
        scales = (self.log_scales[name].detach().exp() * self.signs[name]).cpu().numpy()
        return Grid(fmt, scales, np.full(scales.shape, fmt.zero, np.float32))

    def matrices(self, state: Mapping[str, Tensor]) -> dict[str, BlockMatrix]:
        """The matrices that a bundle stores: those that the forward pass computes with."""
        found = {}
        for name in self.formats:
            grid, weight = self.grid(name), state[name].detach().cpu().numpy()
            found[name] = grid.matrix(grid.integers(weight), weight.shape[1])
        return found

    def to(self, device: torch.device) -> TrainedRounding:
        log_scales = {n: t.detach().to(device) for n, t in self.log_scales.items()}
        signs = {n: t.to(device) for n, t in self.signs.items()}
        return TrainedRounding(self.formats, log_scales, signs)

    # --- on disk: tensors, and the formats as JSON -----------------------------------------------

    def tensors(self) -> dict[str, Tensor]:
        named: dict[str, Tensor] = dict(self.parameters())
        return named | {_SIGN_PREFIX + name: tensor for name, tensor in self.signs.items()}

    def formats_json(self) -> dict[str, Any]:
        return {name: asdict(fmt) for name, fmt in self.formats.items()}

    @classmethod
    def read(
        cls,
        formats: Any,
        tensors: Mapping[str, Tensor],
        weights: Mapping[str, Tensor],
        source: str,
    ) -> TrainedRounding:
        """The inverse of `formats_json` and `tensors`, for a model of these weights.

        Raises CheckpointError with every matrix that does not fit.
        """
        try:
            known = decode(dict[str, BlockFormat], formats, error=CheckpointError, source=source)
        except OptionError as e:  # bits or blocks that there are not
            raise CheckpointError(f"a valid {source}", found=str(e), do=_RESTORE) from e
        parts = [{n: tensors.get(prefix + n) for n in known} for prefix in _PREFIXES]
        faults = [f"{name} is unknown" for name in known.keys() - weights.keys()]
        faults += [f"{name} is unknown" for name in tensors if name.partition("/")[2] not in known]
        for name, fmt in known.items():
            if name in weights and any(not _fits(p[name], weights[name], fmt) for p in parts):
                faults.append(f"the scales of {name} do not fit")
        if faults:
            raise CheckpointError(
                f"scales for the matrices in {source}", found="; ".join(sorted(faults)), do=_RESTORE
            )
        log_scales, signs = ({n: t for n, t in p.items() if t is not None} for p in parts)
        return cls(known, log_scales, signs)


_PREFIXES = (SCALE_PREFIX, _SIGN_PREFIX)
_RESTORE = "restore the checkpoint"


def _fits(scales: Tensor | None, weight: Tensor, fmt: BlockFormat) -> bool:
    """Whether there is one number for each block, all finite, and the blocks are symmetric."""
    if scales is None or weight.ndim != 2 or not fmt.symmetric:
        return False
    blocks = -(-weight.shape[1] // fmt.block_size)
    return scales.shape == (weight.shape[0], blocks) and bool(scales.isfinite().all())


class _Snap(torch.autograd.Function):
    """The nearest value of the grid: blocks [rows, blocks, size], scales [rows, blocks, 1]."""

    @staticmethod
    def forward(ctx: Any, blocks: Tensor, scales: Tensor, zero: int) -> Tensor:
        x = blocks / scales
        q = x.round().clamp_(-zero, zero - 1)
        inside = (x >= -zero - 0.5) & (x <= zero - 0.5)
        ctx.save_for_backward(torch.where(inside, q - x, q), inside)
        return q * scales

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        slope, inside = ctx.saved_tensors
        return grads[0] * inside, (grads[0] * slope).sum(-1, keepdim=True), None


def hidden_with(model: GPT, weights: Mapping[str, Tensor], ids: Tensor) -> Tensor:
    """`model.hidden(ids)`, computed with `weights` in place of its own."""
    named = {f"model.{name}": weight for name, weight in weights.items()}
    out: Tensor = torch.func.functional_call(_Hidden(model), named, (ids,))
    return out


class _Hidden(nn.Module):
    """`GPT.hidden` as a module's forward, which is what functional_call can call."""

    def __init__(self, model: GPT) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        return self.model.hidden(ids)


def pulled_into_cells(
    state: Mapping[str, Tensor], matrices: Mapping[str, BlockMatrix]
) -> dict[str, Tensor]:
    """Weights that round to `matrices`, and on that side of each integer where they were."""
    moved = dict(state)
    for name, matrix in matrices.items():
        center = torch.from_numpy(matrix.dequantize())
        reach = torch.from_numpy(np.abs(matrix.scales)).repeat_interleave(
            matrix.format.block_size, dim=1
        )[:, : matrix.columns]
        moved[name] = state[name].clamp(center - _CELL * reach, center + _CELL * reach)
        for twin, tensor in state.items():  # a tied matrix is one tensor under two names
            if twin != name and tensor.data_ptr() == state[name].data_ptr():
                moved[twin] = moved[name]
    return moved
