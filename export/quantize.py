"""Block quantization of a decoder graph: every matrix becomes integers with one scale a block.

A matrix [out, in] is cut along `in` into blocks. A block of values w is stored as integers q and
one fp32 scale s with w ~ s * (q - zero), zero = 2^(bits-1): the symmetric form of onnxruntime's
MatMulNBits, the fastest there. At 4 bits and block 128 that is 4.25 bits a weight.

A matrix that is both embedding and head is stored once, read by MatMulNBits and by
GatherBlockQuantized.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from gptrt.errors import OptionError
from gptrt.format import LOGITS, Quantization

Float = NDArray[np.float32]
Bytes = NDArray[np.uint8]

MICROSOFT = "com.microsoft"
BLOCK_SIZES = (16, 32, 64, 128, 256)
DEFAULT_BLOCK = 128
PACKED_SUFFIX = "_quantized"  # of a matrix's integers; the rest of the name is the parameter's
_INT8_ACTIVATIONS = 4  # MatMulNBits accuracy_level: products in int8, sums in int32

# Shrinking the largest value of a block by up to a third can lower the error of all the others.
_SCALE_CANDIDATES = np.linspace(1.0, 0.68, 9, dtype=np.float32)


@dataclass(frozen=True)
class BlockFormat:
    """How one matrix is stored."""

    bits: int
    block_size: int

    @property
    def zero(self) -> int:
        return 1 << (self.bits - 1)

    @property
    def bits_per_weight(self) -> float:
        return self.bits + 32 / self.block_size


@dataclass(frozen=True)
class BlockMatrix:
    """A quantized matrix [rows, columns] as onnxruntime reads it.

    packed is uint8 [rows, blocks, block_size * bits / 8], low bits first; scales [rows, blocks].
    """

    format: BlockFormat
    columns: int
    packed: Bytes
    scales: Float

    def dequantize(self) -> Float:
        """The fp32 matrix [rows, columns] that the kernels compute with."""
        q = unpack(self.packed, self.format.bits).astype(np.float32) - self.format.zero
        values = q * self.scales[:, :, None]
        return values.reshape(len(values), -1)[:, : self.columns]


def quantize_matrix(weight: Float, fmt: BlockFormat) -> BlockMatrix:
    """Round [rows, columns] to the nearest integers, with the scale of least squared error."""
    blocks = _to_blocks(weight, fmt.block_size)
    scales = best_scales(blocks, fmt)
    q = round_to(blocks, scales, fmt) + fmt.zero
    return BlockMatrix(fmt, weight.shape[1], pack(q.astype(np.uint8), fmt.bits), scales)


def best_scales(blocks: Float, fmt: BlockFormat) -> Float:
    """Per block [rows, blocks, size] the candidate scale with the least squared error.

    The integers reach from -zero to zero - 1: so the value of largest magnitude is put at -zero,
    the end with one step more, and the scale takes its sign.
    """
    at = np.abs(blocks).argmax(axis=-1, keepdims=True)
    extreme = np.take_along_axis(blocks, at, axis=-1)[..., 0]
    full = np.float32(-1.0 / fmt.zero) * extreme
    if fmt.bits == 8:
        return full  # the error is far below what the products round away
    best, least = full, np.full(full.shape, np.inf, np.float32)
    for factor in _SCALE_CANDIDATES:
        scales = full * factor
        error = np.square(round_to(blocks, scales, fmt) * scales[..., None] - blocks).sum(axis=-1)
        best = np.where(error < least, scales, best)
        least = np.minimum(error, least)
    return best


def round_to(blocks: Float, scales: Float, fmt: BlockFormat) -> Float:
    """Signed integers, as floats, in [-zero, zero - 1]."""
    inverse = np.divide(np.float32(1.0), scales, out=np.zeros_like(scales), where=scales != 0)
    return np.clip(np.rint(blocks * inverse[..., None]), -fmt.zero, fmt.zero - 1)


def _to_blocks(weight: Float, size: int) -> Float:
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


# --- the graph ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """What a user asks for. `head_bits` is for the matrix that gives the logits, which is the most
    sensitive one; where it is the embedding too, it is stored once in that precision."""

    mode: Literal["int8", "int4"]
    block_size: int = DEFAULT_BLOCK
    head_bits: int = 8

    def __post_init__(self) -> None:
        if self.block_size not in BLOCK_SIZES:
            sizes = ", ".join(map(str, BLOCK_SIZES))
            raise OptionError(
                f"a block size of {sizes}", found=str(self.block_size), do="choose one of them"
            )

    @property
    def bits(self) -> int:
        return {"int8": 8, "int4": 4}[self.mode]

    def format_for(self, product: Product) -> BlockFormat:
        """No block reaches beyond the row by more than its nearest size."""
        columns = product.columns
        size = min([self.block_size, *(size for size in BLOCK_SIZES if size >= columns)])
        return BlockFormat(self.head_bits if product.is_head else self.bits, size)


@dataclass(frozen=True)
class Product:
    """A MatMul by a constant in the graph. `weight` is [in, out], or [out, in] if transposed."""

    node: ir.Node
    weight: ir.Value
    transpose: ir.Node | None

    def matrix(self) -> Float:
        """The constant as [out, in], fp32."""
        assert self.weight.const_value is not None
        values = self.weight.const_value.numpy().astype(np.float32)
        return np.ascontiguousarray(values if self.transpose else values.T)

    @property
    def columns(self) -> int:
        assert self.weight.const_value is not None
        return self.weight.const_value.shape.numpy()[1 if self.transpose else 0]

    @property
    def is_head(self) -> bool:
        """Whether the product is the logits, but for a cast."""
        value = self.node.outputs[0]
        uses = [node for node, _ in value.uses()]
        if len(uses) == 1 and uses[0].op_type == "Cast":
            value = uses[0].outputs[0]
        return value.name == LOGITS


def products(graph: ir.Graph) -> Iterator[Product]:
    """Every MatMul of an activation by a constant matrix."""
    for node in graph:
        if node.op_type != "MatMul" or node.inputs[1] is None:
            continue
        weight, transpose = node.inputs[1], None
        producer = weight.producer()
        if producer is not None and producer.op_type == "Transpose" and producer.inputs[0]:
            weight, transpose = producer.inputs[0], producer
        if weight.const_value is not None and len(weight.const_value.shape) == 2:
            yield Product(node, weight, transpose)


def quantize_graph(model: ir.Model, recipe: Recipe) -> Quantization:
    """Replace every matrix of `model`, in place, by its quantized form."""
    graph = model.graph
    model.opset_imports[MICROSOFT] = 1
    stored: dict[str, BlockMatrix] = {}
    for product in list(products(graph)):
        name = str(product.weight.name)
        if name not in stored:
            stored[name] = quantize_matrix(product.matrix(), recipe.format_for(product))
            _add_constants(graph, name, stored[name])
        _replace_product(graph, product, stored[name])
    for node in list(graph):
        if node.op_type == "Gather" and node.inputs[0] is not None:
            name = str(node.inputs[0].name)
            if name in stored:
                _replace_gather(graph, node, stored[name], name)
    _remove_unused(graph, stored)
    return _describe(recipe, stored)


def _names(name: str) -> tuple[str, str]:
    return name + PACKED_SUFFIX, name + "_scales"


def _add_constants(graph: ir.Graph, name: str, matrix: BlockMatrix) -> None:
    packed, scales = _names(name)
    graph.initializers.add(ir.Value(name=packed, const_value=ir.tensor(matrix.packed, name=packed)))
    graph.initializers.add(ir.Value(name=scales, const_value=ir.tensor(matrix.scales, name=scales)))


def _replace_product(graph: ir.Graph, product: Product, matrix: BlockMatrix) -> None:
    """MatMul, and the bias that follows it, become one MatMulNBits."""
    node, fmt = product.node, matrix.format
    constants = [graph.initializers[key] for key in _names(str(product.weight.name))]
    last, bias = node, _bias_after(node)
    if bias is not None:
        last = next(iter(node.outputs[0].uses()))[0]
    attributes = {
        "K": matrix.columns,
        "N": len(matrix.scales),
        "bits": fmt.bits,
        "block_size": fmt.block_size,
        "accuracy_level": _INT8_ACTIVATIONS,
    }
    inputs = [node.inputs[0], *constants, *([None, None, bias] if bias is not None else [])]
    new = ir.node("MatMulNBits", inputs, attributes, domain=MICROSOFT, name=node.name)
    _substitute(graph, last, new, also=[node] if last is not node else [])


def _bias_after(node: ir.Node) -> ir.Value | None:
    """The constant vector that is added to the product and nothing else, if there is one."""
    uses = list(node.outputs[0].uses())
    if len(uses) != 1 or uses[0][0].op_type != "Add" or node.outputs[0].is_graph_output():
        return None
    add, index = uses[0]
    other = add.inputs[1 - index]
    constant = other.const_value if other is not None else None
    return other if constant is not None and len(constant.shape) == 1 else None


def _replace_gather(graph: ir.Graph, node: ir.Node, matrix: BlockMatrix, name: str) -> None:
    """Rows of the shared matrix: [..., blocks, block_size] come back, made [..., columns]."""
    packed, scales = (graph.initializers[key] for key in _names(name))
    axis = _constant(graph, f"{name}_axis", np.array([2], np.int64))
    wide = _constant(graph, f"{name}_row", np.array([0, 0, -1], np.int64))
    column_scales = ir.node("Unsqueeze", [scales, axis])
    rows = ir.node(
        "GatherBlockQuantized",
        [packed, node.inputs[1], column_scales.outputs[0]],
        {
            "bits": matrix.format.bits,
            "block_size": matrix.format.block_size,
            "gather_axis": 0,
            "quantize_axis": 2,
        },
        domain=MICROSOFT,
    )
    new = [column_scales, rows, ir.node("Reshape", [rows.outputs[0], wide])]
    if matrix.scales.shape[1] * matrix.format.block_size > matrix.columns:  # padded
        bounds = [
            _constant(graph, f"{name}_{key}", np.array([value], np.int64))
            for key, value in (("from", 0), ("to", matrix.columns), ("last", -1))
        ]
        new.append(ir.node("Slice", [new[-1].outputs[0], *bounds]))
    _substitute(graph, node, *new)


def _constant(graph: ir.Graph, name: str, array: NDArray[np.int64]) -> ir.Value:
    if name not in graph.initializers:
        graph.initializers.add(ir.Value(name=name, const_value=ir.tensor(array, name=name)))
    return graph.initializers[name]


def _substitute(
    graph: ir.Graph, old: ir.Node, *new: ir.Node, also: list[ir.Node] | None = None
) -> None:
    """Put `new` where `old` stood; the last of them gives what `old` gave, under its name."""
    ir.convenience.replace_nodes_and_values(
        graph, old, [*(also or []), old], list(new), old.outputs, new[-1].outputs
    )


def _remove_unused(graph: ir.Graph, stored: dict[str, BlockMatrix]) -> None:
    for node in list(graph):
        if node.op_type == "Transpose" and not node.outputs[0].uses():
            graph.remove(node, safe=True)
    for name in stored:
        if not graph.initializers[name].uses():
            graph.initializers.pop(name)


def _describe(recipe: Recipe, stored: dict[str, BlockMatrix]) -> Quantization:
    weights = sum(len(m.scales) * m.columns for m in stored.values())
    bits = sum(8 * (m.packed.nbytes + m.scales.nbytes) for m in stored.values())
    return Quantization(
        mode=recipe.mode,
        method="round-to-nearest, least-squares scales",
        bits=recipe.bits,
        head_bits=recipe.head_bits,
        block_size=recipe.block_size,
        bits_per_weight=round(bits / max(1, weights), 4),
    )
