"""Block quantization of one matrix: integers, and one scale a block.

A matrix [rows, columns] is cut along its columns into blocks. A block of values w is stored as
integers q and one fp16 scale s with w ~ s * (q - zero): the layout of onnxruntime's MatMulNBits
(https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md). Symmetric, zero is
2^(bits-1) for every block; asymmetric, each block has one of its own, in as many bits as a weight.
At 4 bits and block 64, symmetric, that is 4.25 bits a weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from gptrt.errors import OptionError

Float = NDArray[np.float32]
Bytes = NDArray[np.uint8]

BITS = (2, 4, 8)
BLOCK_SIZES = (16, 32, 64, 128, 256)

_SCALE_BITS, _LARGEST_SCALE = 16, float(np.finfo(np.float16).max)

# What onnxruntime's kernels for x86 keep of a block beside its integers, and read at every product:
# its scale in fp32, and the scale times its zero.
_KEPT_BITS = 64

# Shrinking the largest value of a block by up to a third can lower the error of all the others;
# at 2 bits, where only -2 to 1 exist, by up to three quarters.
_SHRINK = {2: np.linspace(1.0, 0.25, 16), 4: np.linspace(1.0, 0.68, 9), 8: np.ones(1)}


@dataclass(frozen=True)
class BlockFormat:
    """How one matrix is stored. Raises OptionError for bits or blocks that no kernel reads."""

    bits: int
    block_size: int
    symmetric: bool = True

    def __post_init__(self) -> None:
        for what, value, known in (
            ("a block size", self.block_size, BLOCK_SIZES),
            ("bits", self.bits, BITS),
        ):
            if value not in known:
                choices = ", ".join(map(str, known))
                raise OptionError(f"{what} of {choices}", found=str(value), do="choose one of them")

    @property
    def zero(self) -> int:
        """Where a symmetric block has its zero."""
        return 1 << (self.bits - 1)

    @property
    def levels(self) -> int:
        return 1 << self.bits

    def row_bytes(self, columns: int) -> float:
        """Of a row of so many values: whole blocks, what of the last is empty included."""
        zero = 0 if self.symmetric else self.bits
        return self._blocks(columns) * (self.bits * self.block_size + _SCALE_BITS + zero) / 8

    def row_bytes_read(self, columns: int) -> float:
        """What a product reads of the same row: as a processor's kernels have packed it."""
        return self._blocks(columns) * (self.bits * self.block_size + _KEPT_BITS) / 8

    def _blocks(self, columns: int) -> int:
        return -(-columns // self.block_size)

    def bits_per_weight(self, columns: int) -> float:
        return 8 * self.row_bytes(columns) / columns

    def within(self, columns: int) -> BlockFormat:
        """The same with the block, of this size or a smaller one, that stores such a row in the
        fewest bytes: where the last of the large ones would be half empty, a smaller one is both
        less and finer."""
        formats = self._no_larger(columns)
        return min(formats, key=lambda fmt: (fmt.row_bytes(columns), fmt.block_size))

    def fastest_within(self, columns: int) -> BlockFormat:
        """The same with the block of which a processor reads the fewest bytes: it pays for each
        block, in arithmetic too, so that of equal sizes it is the larger one."""
        formats = self._no_larger(columns)
        return min(formats, key=lambda fmt: (fmt.row_bytes_read(columns), -fmt.block_size))

    def _no_larger(self, columns: int) -> list[BlockFormat]:
        """In blocks of this size and smaller ones. Below 32 kernels are slow, so 16 is for rows of
        16 and for who asks."""
        usable = [size for size in BLOCK_SIZES if size >= 32 or columns <= size]
        sizes = [size for size in usable if size <= self.block_size] or [self.block_size]
        return [replace(self, block_size=size) for size in sizes]


@dataclass(frozen=True)
class Grid:
    """The values that a matrix can take: scales and zeros, both [rows, blocks]. Whatever scales it
    is given, it has those next to them that can be stored: so integers are chosen for them."""

    format: BlockFormat
    scales: Float
    zeros: Float  # whole numbers, 0 to levels - 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "scales", _storable(self.scales))

    def integers(self, weight: Float) -> Bytes:
        """The nearest integers [rows, blocks, block_size] of a matrix [rows, columns]."""
        scales = self.scales[..., None]
        inverse = np.divide(np.float32(1), scales, out=np.zeros_like(scales), where=scales != 0)
        q = np.rint(to_blocks(weight, self.format.block_size) * inverse) + self.zeros[..., None]
        return np.clip(q, 0, self.format.levels - 1).astype(np.uint8)

    def matrix(self, q: Bytes, columns: int) -> BlockMatrix:
        """Integers [rows, blocks, block_size] of this grid, as they are stored."""
        zeros = None if self.format.symmetric else self.zeros.astype(np.uint8)
        return BlockMatrix(self.format, columns, pack(q, self.format.bits), self.scales, zeros)


@dataclass(frozen=True)
class BlockMatrix:
    """A quantized matrix [rows, columns] as onnxruntime reads it.

    packed is uint8 [rows, blocks, block_size * bits / 8], low bits first; scales [rows, blocks],
    numbers that fp16 has; zeros, where blocks have their own, uint8 [rows, blocks], one a byte.
    """

    format: BlockFormat
    columns: int
    packed: Bytes
    scales: Float
    zeros: Bytes | None = None

    def dequantize(self) -> Float:
        """The fp32 matrix [rows, columns] that the kernels compute with."""
        zero = self.format.zero if self.zeros is None else self.zeros[..., None].astype(np.float32)
        values = (unpack(self.packed, self.format.bits) - np.float32(zero)) * self.scales[..., None]
        return values.reshape(len(values), -1)[:, : self.columns].astype(np.float32)

    @property
    def packed_zeros(self) -> Bytes | None:
        """The zeros of a row side by side in its bytes, as MatMulNBits reads them."""
        if self.zeros is None:
            return None
        per_byte = 8 // self.format.bits
        return pack(np.pad(self.zeros, ((0, 0), (0, -self.zeros.shape[1] % per_byte))), self.bits)

    def rows(self, order: NDArray[np.int64]) -> BlockMatrix:
        """Those rows, in that order."""
        zeros = None if self.zeros is None else self.zeros[order]
        return replace(self, packed=self.packed[order], scales=self.scales[order], zeros=zeros)

    @classmethod
    def stack(cls, parts: Sequence[BlockMatrix]) -> BlockMatrix:
        """Rows below rows, all of one format and width."""
        first = parts[0]
        zeros = [part.zeros for part in parts if part.zeros is not None]
        return cls(
            first.format,
            first.columns,
            np.concatenate([part.packed for part in parts]),
            np.concatenate([part.scales for part in parts]),
            np.concatenate(zeros) if zeros else None,
        )

    @property
    def bits(self) -> int:
        return self.format.bits

    @property
    def nbytes(self) -> int:
        zeros = self.packed_zeros
        scales = self.scales.size * _SCALE_BITS // 8
        return self.packed.nbytes + scales + (0 if zeros is None else zeros.nbytes)


def least_squares_grid(weight: Float, fmt: BlockFormat, importance: Float | None = None) -> Grid:
    """Of a few candidates the grid with the least squared error in each block of [rows, columns].

    `importance`, [columns] or [rows, columns], weighs the error of a column: where its inputs are
    large, it counts.
    """
    blocks = to_blocks(weight, fmt.block_size)
    even = np.ones(weight.shape[1], np.float32)
    weights = np.atleast_2d(even if importance is None else importance).astype(np.float32)
    weights = to_blocks(weights, fmt.block_size)  # [rows or 1, blocks, size]
    ends = _signed_extreme(blocks, fmt) if fmt.symmetric else _range(blocks, fmt)
    best, least = Grid(fmt, *ends), np.full(blocks.shape[:2], np.inf, np.float32)
    for factor in _SHRINK[fmt.bits]:
        grid = Grid(fmt, ends[0] * np.float32(factor), ends[1])
        q = grid.integers(weight) - grid.zeros[..., None]
        error = (np.square(q * grid.scales[..., None] - blocks) * weights).sum(axis=-1)
        best = Grid(fmt, np.where(error < least, grid.scales, best.scales), ends[1])
        least = np.minimum(error, least)
    return best


def _signed_extreme(blocks: Float, fmt: BlockFormat) -> tuple[Float, Float]:
    """Integers reach from -zero to zero - 1: so the value of largest magnitude is put at -zero,
    the end with one step more, and the scale takes its sign."""
    at = np.abs(blocks).argmax(axis=-1, keepdims=True)
    extreme = np.take_along_axis(blocks, at, axis=-1)[..., 0]
    return np.float32(-1.0 / fmt.zero) * extreme, np.full(extreme.shape, fmt.zero, np.float32)


def _range(blocks: Float, fmt: BlockFormat) -> tuple[Float, Float]:
    """From the least to the greatest value, zero included so that it stays exact."""
    low, high = blocks.min(axis=-1).clip(max=0), blocks.max(axis=-1).clip(min=0)
    scales = (high - low) / np.float32(fmt.levels - 1)
    zeros = np.divide(-low, scales, out=np.zeros_like(scales), where=scales != 0)
    return scales, np.rint(zeros)


def _storable(scales: Float) -> Float:
    """The nearest of fp16: off by a 2,000th at most, and it is the grid that gives way, not what is
    rounded to it. What is too small for fp16 becomes zero: weights of a few millionths at most."""
    held: Float = scales.clip(-_LARGEST_SCALE, _LARGEST_SCALE).astype(np.float16).astype(np.float32)
    return held


def to_blocks(weight: Float, size: int) -> Float:
    """[rows, columns] -> [rows, blocks, size], zeros behind the last column."""
    rows, columns = weight.shape
    padded = np.pad(weight, ((0, 0), (0, -columns % size)))
    return padded.reshape(rows, -1, size)


def pack(q: Bytes, bits: int) -> Bytes:
    """[..., n] values of `bits` bits -> [..., n * bits / 8] bytes, the first value lowest.

    >>> pack(np.array([1, 2, 3, 4], np.uint8), 4).tolist()
    [33, 67]
    """
    per_byte = 8 // bits
    parts = q.reshape(*q.shape[:-1], -1, per_byte)
    shifts = np.arange(per_byte, dtype=np.uint8) * np.uint8(bits)
    packed: Bytes = np.bitwise_or.reduce(parts << shifts, axis=-1).astype(np.uint8)
    return packed


def unpack(packed: Bytes, bits: int) -> Bytes:
    """The inverse of `pack`."""
    shifts = np.arange(8 // bits, dtype=np.uint8) * np.uint8(bits)
    parts = (packed[..., None] >> shifts) & np.uint8((1 << bits) - 1)
    return parts.reshape(*packed.shape[:-1], -1)
