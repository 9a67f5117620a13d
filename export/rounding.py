"""Ways to round one matrix to blocks of integers.

`nearest`, `k_quant` and `hqq` look at the matrix alone. `error_corrected` also knows what the
matrix will be multiplied with, and makes the rounding of one column good in that of another; where
it knows what errors of the products cost, it does so between rows as well.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gptrt.engine import import_onnxruntime

from .blocks import BlockFormat, BlockMatrix, Float, Grid, least_squares_grid, to_blocks
from .settings import Method

_DAMPING = 0.01  # of the mean of the Hessian's diagonal: keeps its inverse tame
_OUTPUT_DAMPING = 0.05  # the same of output costs, which gradients of less text tell, less surely
_LAZY_COLUMNS = 64  # columns corrected at a time before the rest of the matrix is
_SWEEPS = 2
# Rows are rounded in so many groups, of so many at least, and know of those in other groups: one by
# one they would take as many times as long. Twice as many are closer, and take 1.4 to 1.8 times as
# long: seconds, of a matrix that is small.
_GROUPS, _LEAST_ROWS = 8, 64
_FINE_GROUPS, _FINE_LEAST_ROWS = 16, 32
_SMALL = 1 << 19  # weights


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
    root = logging.getLogger()
    level, handlers = root.level, root.handlers.copy()
    try:
        return importlib.import_module(f"onnxruntime.quantization.{module}")
    finally:  # one of them sets up the logging of the whole process
        root.setLevel(level)
        root.handlers = handlers


@dataclass(frozen=True)
class Moments:
    """Of the inputs x of a product, summed over the calibration text.

    `hessian` is the sum of x x^T [in, in], with x as the quantized layers before it give it, or
    [out, in, in] where rows have their own; `drift` the sum of (reference x - x) x^T, or None where
    nothing before it was rounded. `output_costs` [out, out] is the Fisher matrix of what the
    product gives (`fisher`); None where an error in one output is as bad as in any other.
    """

    hessian: Tensor
    drift: Tensor | None = None
    output_costs: Tensor | None = None


def error_corrected(
    weight: Float, formats: Sequence[BlockFormat], moments: Moments
) -> list[BlockMatrix]:
    """One matrix [out, in] in each of `formats`: minimize |Q x - W x_reference|^2 over the
    calibration text.

    First the drift of the inputs is undone, then GPTQ (https://arxiv.org/abs/2210.17323): columns
    are rounded from the heaviest to the lightest, each error made good in the columns to come.
    Scales are fitted to the integers by least squares, and sweeps of coordinate descent follow,
    which can only lower the error. With `output_costs` G it is the trace of G E H E^T that is
    minimized, E the errors and H the Hessian, and errors of rows are made good in the rows to come
    in the same way: as YAQA does (https://arxiv.org/abs/2505.22988).
    """
    own = moments.hessian.ndim == 3  # so many that fp64 would take twice as long
    hessian, dead = _damped(moments.hessian if own else moments.hessian.double())
    target = torch.where(dead, 0.0, without_drift(torch.from_numpy(weight), moments))
    heaviest_first = _by_weight(hessian)
    solve = partial(
        _solved,
        hessian=hessian.float(),
        order=heaviest_first,
        feedback=_feedback(hessian, heaviest_first),
    )
    if moments.output_costs is None:
        return [solve(target.float(), fmt) for fmt in formats]
    costs, _ = _damped(moments.output_costs.double(), _OUTPUT_DAMPING)
    fine = target.numel() <= _SMALL
    most = (_FINE_GROUPS, _FINE_LEAST_ROWS) if fine else (_GROUPS, _LEAST_ROWS)
    order, size = _spread(_by_weight(costs), *most)
    feedback, target = _feedback(costs, order), target.float()[order]

    def in_groups(fmt: BlockFormat) -> BlockMatrix:
        errors, parts = torch.zeros_like(target), []
        for first in range(0, len(order), size):
            group = slice(first, first + size)
            wanted = target[group] + feedback[:first, group].T @ errors[:first]
            parts.append(solve(wanted, fmt))
            errors[group] = target[group] - torch.from_numpy(parts[-1].dequantize())
        return BlockMatrix.stack(parts).rows(order.argsort().numpy())

    return [in_groups(fmt) for fmt in formats]


def _solved(
    target: Tensor, fmt: BlockFormat, hessian: Tensor, order: Tensor, feedback: Tensor
) -> BlockMatrix:
    """Rows that do not know of each other, to the integers and scales of least error."""
    importance = _diagonal(hessian).clamp(min=0).numpy()
    solver = _Rounder(target, hessian, least_squares_grid(target.numpy(), fmt, importance))
    solver.round_in_order(order, feedback)
    for _ in range(_SWEEPS):
        solver.fit_scales()
        solver.descend()
    solver.fit_scales()
    return solver.matrix()


def without_drift(weight: Tensor, moments: Moments) -> Tensor:
    """The real-valued matrix [out, in], in fp64, that of the inputs as they are makes most nearly
    what `weight` makes of the reference's (GPTAQ, https://arxiv.org/abs/2504.02692)."""
    target = weight.double()
    if moments.drift is None:
        return target
    hessian, _ = _damped(moments.hessian.double())
    undone: Tensor = torch.linalg.solve(hessian, (target @ moments.drift.double()).T).T
    return target + undone


def corrected_where_known(
    weight: Float, formats: Sequence[BlockFormat], moments: Moments | None
) -> list[BlockMatrix]:
    """Error-corrected, or plain where nothing is known of the inputs: a table of rows has none."""
    if moments is None:
        return [nearest(weight, fmt) for fmt in formats]
    return error_corrected(weight, formats, moments)


def _damped(hessian: Tensor, share: float = _DAMPING) -> tuple[Tensor, Tensor]:
    """The Hessian made invertible, and which inputs are always zero."""
    diagonal = _diagonal(hessian)
    dead = diagonal == 0
    damp = share * diagonal.mean(-1, keepdim=True) + torch.where(dead, 1.0, 0.0)
    damped = hessian.clone()
    _diagonal(damped).add_(damp)
    return damped, dead


def _by_weight(hessian: Tensor) -> Tensor:
    """The order of columns, heaviest first."""
    heavy = _diagonal(hessian).reshape(-1, hessian.shape[-1]).mean(0)
    return heavy.argsort(descending=True, stable=True)


def _spread(order: Tensor, groups: int, least: int) -> tuple[Tensor, int]:
    """An order of rows in so many groups at most, each of so many rows at least, with some of the
    heaviest and some of the lightest, and the size of a group: those that are alike, and make good
    the most for each other, are apart."""
    count = min(groups, -(-len(order) // least))
    return torch.cat([order[first::count] for first in range(count)]), -(-len(order) // count)


def _feedback(hessian: Tensor, order: Tensor) -> Tensor:
    """The unit upper U of hessian = U D U^T, its columns in `order`: what the error of each asks of
    those behind it. GPTQ as QuIP writes it, without an inverse (https://arxiv.org/abs/2307.13304).
    """
    backwards = order.flip(0)
    turned = hessian[..., backwards[:, None], backwards]
    lower, fault = torch.linalg.cholesky_ex(turned)
    if fault.any():  # more than fp32 can tell apart
        lower = torch.linalg.cholesky(turned.double())
    upper = lower.flip(-1, -2)
    unit: Tensor = upper.div_(_diagonal(upper).unsqueeze(-2).clone()).float()
    return unit


def _diagonal(matrices: Tensor) -> Tensor:
    return matrices.diagonal(dim1=-2, dim2=-1)


def _times(rows: Tensor, matrices: Tensor) -> Tensor:
    """[out, a] by one matrix [a, b], or each row by its own of [out, a, b]."""
    return (rows.unsqueeze(-2) @ matrices).squeeze(-2)


class _Rounder:
    """A matrix on its way to integers: `target` [out, in], what it is to approximate under
    `hessian`, [in, in] or a row's own [out, in, in], and `values` [out, in], the signed integers
    chosen so far."""

    def __init__(self, target: Tensor, hessian: Tensor, grid: Grid) -> None:
        self.target, self.hessian, self.grid = target, hessian, grid
        self.block = torch.arange(target.shape[1]) // grid.format.block_size  # of a column
        self.scales = torch.from_numpy(grid.scales)
        self.low = -torch.from_numpy(grid.zeros)
        self.high = self.low + (grid.format.levels - 1)
        self.values = torch.zeros_like(target)

    def round_in_order(self, order: Tensor, feedback: Tensor) -> None:
        """Each column with the errors of those before it made good in it."""
        errors = torch.zeros_like(self.target)
        for first in range(0, len(order), _LAZY_COLUMNS):
            last = min(first + _LAZY_COLUMNS, len(order))
            wanted = self.target[:, order[first:last]]
            wanted = wanted + _times(errors[:, :first], feedback[..., :first, first:last])
            for at in range(first, last):
                column = int(order[at])
                lately = _times(errors[:, first:at], feedback[..., first:at, at : at + 1])[:, 0]
                rounded = self._round(wanted[:, at - first] + lately, column)
                errors[:, at] = self.target[:, column] - rounded

    def descend(self) -> None:
        """Each column once more to its best integers, all others held."""
        gradient = _times(self._matrix() - self.target, self.hessian)  # half of the gradient
        for column in range(self.target.shape[1]):
            scale = self.scales[:, self.block[column]]
            before = self.values[:, column] * scale
            wanted = before - gradient[:, column] / self.hessian[..., column, column]
            after = self._round(wanted, column)
            gradient += (after - before)[:, None] * self.hessian[..., column, :]

    def fit_scales(self) -> None:
        """The scales of least error for the integers as they are: one small system a row."""
        blocks, size = self.scales.shape[1], self.grid.format.block_size
        wanted = _times(self.target, self.hessian)  # [out, in]
        normal = torch.empty(len(self.values), blocks, blocks)
        for a in range(blocks):
            part = slice(a * size, (a + 1) * size)
            seen = _times(self.values[:, part], self.hessian[..., part, :])  # [out, in]
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
