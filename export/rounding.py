"""Ways to round one matrix to blocks of integers.

`nearest`, `k_quant` and `hqq` look at the matrix alone. `error_corrected` also knows what the
matrix will be multiplied with, and makes the rounding of one column good for that of another.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from gptrt.engine import import_onnxruntime

from .blocks import BlockFormat, BlockMatrix, Float, Grid, least_squares_grid, to_blocks

Method = Literal["nearest", "k-quant", "hqq", "gptq", "learned"]

_DAMPING = 0.01  # of the mean of the Hessian's diagonal: keeps its inverse tame
_LAZY_COLUMNS = 64  # columns corrected at a time before the rest of the matrix is
_SWEEPS = 2


def nearest(weight: Float, fmt: BlockFormat) -> BlockMatrix:
    """Each value to the nearest of its block's grid, the grid of least squared error."""
    grid = least_squares_grid(weight, fmt)
    return grid.matrix(grid.integers(weight), weight.shape[1])


def k_quant(weight: Float, fmt: BlockFormat) -> BlockMatrix:
    """llama.cpp's search for scale and minimum of a block, by onnxruntime's quantizer."""
    quantizer: Any = _quantizers("neural_compressor.weight_only").quant_tensor_k_quant_cpu
    blocks = to_blocks(weight, fmt.block_size)
    with np.errstate(divide="ignore", invalid="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it casts what it divided by zero
        _, scales, zeros = quantizer(blocks, fmt.bits, fmt.block_size)
    shape = blocks.shape[:2]
    grid = _with_flat_blocks(weight, Grid(fmt, scales.reshape(shape), zeros.reshape(shape)))
    return grid.matrix(grid.integers(weight), weight.shape[1])


def hqq(weight: Float, fmt: BlockFormat) -> BlockMatrix:
    """Half-quadratic quantization (https://dropbox.github.io/hqq_blog/) by onnxruntime's
    quantizer; its zeros are rounded, as kernels are fast with whole ones only."""
    quantizer: Any = _quantizers("matmul_nbits_quantizer").HQQWeightOnlyQuantizer(None)
    _, scales, zeros = quantizer.quantize_internal(
        torch.from_numpy(weight), bits=fmt.bits, group_size=fmt.block_size
    )
    zeros = zeros.round().clip(0, fmt.levels - 1)
    grid = _with_flat_blocks(weight, Grid(fmt, scales.numpy(), zeros.numpy()))
    return grid.matrix(grid.integers(weight), weight.shape[1])


def _with_flat_blocks(weight: Float, grid: Grid) -> Grid:
    """`grid`, but plain where all values of a block are equal: there both quantizers go astray."""
    blocks, plain = (
        to_blocks(weight, grid.format.block_size),
        least_squares_grid(weight, grid.format),
    )
    flat = blocks.min(axis=-1) == blocks.max(axis=-1)
    pairs = ((plain.scales, grid.scales), (plain.zeros, grid.zeros))
    return Grid(grid.format, *(np.where(flat, *pair).astype(np.float32) for pair in pairs))


def _quantizers(module: str) -> Any:
    import importlib

    import_onnxruntime()  # its telemetry off
    return importlib.import_module(f"onnxruntime.quantization.{module}")


@dataclass(frozen=True)
class Moments:
    """Of the inputs x of a product, summed over the calibration text.

    `hessian` is the sum of x x^T [in, in], with x as the quantized layers before it give it;
    `drift` the sum of (reference x - x) x^T, or None where nothing before it was rounded.
    """

    hessian: Tensor
    drift: Tensor | None = None


def error_corrected(weight: Float, fmt: BlockFormat, moments: Moments) -> BlockMatrix:
    """Minimize |Q x - W x_reference|^2 over the calibration text, for one matrix [out, in].

    First the best real-valued matrix for the inputs as they are now (as GPTAQ does,
    https://arxiv.org/abs/2504.02692), then GPTQ (https://arxiv.org/abs/2210.17323): columns are
    rounded from the heaviest to the lightest, each error made good in the columns to come. Scales
    are fitted to the integers by least squares, and sweeps of coordinate descent follow, which can
    only lower the error.
    """
    hessian, dead = _damped(moments.hessian.double())
    target = torch.from_numpy(weight).double()
    if moments.drift is not None:
        target = target + torch.linalg.solve(hessian, (target @ moments.drift.double()).T).T
    target[:, dead] = 0.0
    grid = least_squares_grid(
        target.float().numpy(), fmt, hessian.diagonal().float().clamp(min=0).numpy()
    )
    solver = _Rounder(target.float(), hessian.float(), grid)
    solver.round_in_order(_inverse_factor(hessian))
    for _ in range(_SWEEPS):
        solver.fit_scales()
        solver.descend()
    solver.fit_scales()
    return solver.matrix()


def corrected_where_known(weight: Float, fmt: BlockFormat, moments: Moments | None) -> BlockMatrix:
    """Error-corrected, or plain where nothing is known of the inputs: a table of rows has none."""
    return nearest(weight, fmt) if moments is None else error_corrected(weight, fmt, moments)


def _damped(hessian: Tensor) -> tuple[Tensor, Tensor]:
    """The Hessian made invertible, and which inputs are always zero."""
    diagonal = hessian.diagonal()
    dead = diagonal == 0
    damp = _DAMPING * diagonal.mean() + torch.where(dead, 1.0, 0.0)
    return hessian + torch.diag(damp), dead


def _inverse_factor(hessian: Tensor) -> tuple[Tensor, Tensor]:
    """The order of columns, heaviest first, and the upper Cholesky factor of the inverse in it."""
    order = hessian.diagonal().argsort(descending=True, stable=True)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian[order][:, order]))
    return order, torch.linalg.cholesky(inverse, upper=True).float()


class _Rounder:
    """A matrix on its way to integers: `target` [out, in], what it is to approximate under
    `hessian`, and `values` [out, in], the signed integers chosen so far."""

    def __init__(self, target: Tensor, hessian: Tensor, grid: Grid) -> None:
        self.target, self.hessian, self.grid = target, hessian, grid
        self.block = torch.arange(target.shape[1]) // grid.format.block_size  # of a column
        self.scales = torch.from_numpy(grid.scales)
        self.low = -torch.from_numpy(grid.zeros)
        self.high = self.low + (grid.format.levels - 1)
        self.values = torch.zeros_like(target)

    def round_in_order(self, factor: tuple[Tensor, Tensor]) -> None:
        """GPTQ: the error of each column moves into those that are not yet rounded."""
        order, upper = factor
        rest = self.target[:, order].clone()
        for first in range(0, len(order), _LAZY_COLUMNS):
            last = min(first + _LAZY_COLUMNS, len(order))
            errors = torch.empty(len(rest), last - first)
            for at in range(first, last):
                column, value = int(order[at]), rest[:, at]
                rounded = self._round(value, column)
                error = (value - rounded) / upper[at, at]
                rest[:, at:last] -= torch.outer(error, upper[at, at:last])
                errors[:, at - first] = error
            rest[:, last:] -= errors @ upper[first:last, last:]

    def descend(self) -> None:
        """Each column once more to its best integers, all others held."""
        gradient = (self._matrix() - self.target) @ self.hessian  # half of the gradient
        for column in range(self.target.shape[1]):
            scale = self.scales[:, self.block[column]]
            before = self.values[:, column] * scale
            after = self._round(before - gradient[:, column] / self.hessian[column, column], column)
            gradient += torch.outer(after - before, self.hessian[column])

    def fit_scales(self) -> None:
        """The scales of least error for the integers as they are: one small system a row."""
        blocks, size = self.scales.shape[1], self.grid.format.block_size
        wanted = self.target @ self.hessian  # [out, in]
        normal = torch.empty(len(self.values), blocks, blocks)
        for a in range(blocks):
            part = slice(a * size, (a + 1) * size)
            seen = self.values[:, part] @ self.hessian[part]  # [out, in]
            normal[:, a] = _sum_blocks(seen * self.values, blocks, size)
        right = _sum_blocks(wanted * self.values, blocks, size)
        ridge = 1e-6 * normal.diagonal(dim1=1, dim2=2).mean(-1).clamp(min=1e-12)
        # Towards the scales as they are, so that a block of zeros keeps its own.
        normal.diagonal(dim1=1, dim2=2).add_(ridge[:, None])
        self.scales = torch.linalg.solve(normal, right + ridge[:, None] * self.scales)

    def matrix(self) -> BlockMatrix:
        fmt = self.grid.format
        q = to_blocks(self.values.numpy(), fmt.block_size) + self.grid.zeros[..., None]
        grid = Grid(fmt, self.scales.numpy(), self.grid.zeros)
        return grid.matrix(np.rint(q).astype(np.uint8), self.target.shape[1])

    def _round(self, value: Tensor, column: int) -> Tensor:
        """Choose the integers of a column; what they stand for."""
        block = self.block[column]
        scale = self.scales[:, block]
        q = torch.where(scale == 0, 0.0, value / scale).round()
        self.values[:, column] = q.clamp(self.low[:, block], self.high[:, block])
        return self.values[:, column] * scale

    def _matrix(self) -> Tensor:
        return self.values * self.scales[:, self.block]


def _sum_blocks(x: Tensor, blocks: int, size: int) -> Tensor:
    """[out, in] -> [out, blocks]."""
    padded = torch.nn.functional.pad(x, (0, blocks * size - x.shape[1]))
    return padded.view(len(x), blocks, size).sum(-1)


DATA_FREE: dict[Method, Callable[[Float, BlockFormat], BlockMatrix]] = {
    "nearest": nearest,
    "k-quant": k_quant,
    "hqq": hqq,
}
