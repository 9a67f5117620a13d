"""Quantized matrices in a decoder graph: MatMul becomes MatMulNBits, Gather becomes
GatherBlockQuantized.

A matrix that is both embedding and head is stored once and read by both, in memory and on disk.
Scales are stored in fp16. Kernels want them in the type of the activations: onnxruntime casts them
as it opens the graph, so that to the kernels they are constants.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from gptrt.format import GRAPH_DATA_FILE, GRAPH_FILE

from .blocks import BlockMatrix
from .graph import PARAMETER_PREFIX
from .parts import parts_of, rows_of

MICROSOFT = "com.microsoft"
# Of the constants of a matrix; the rest of their names is the parameter's.
PACKED_SUFFIX, SCALES_SUFFIX, ZEROS_SUFFIX = "_quantized", "_scales", "_zeros"
_INT8_ACTIVATIONS = 4  # MatMulNBits accuracy_level: products in int8, sums in int32


@dataclass(frozen=True)
class Product:
    """A MatMul by a constant in the graph. `weight` is [in, out], or [out, in] if transposed."""

    node: ir.Node
    weight: ir.Value
    transpose: ir.Node | None


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


def store_matrices(model: ir.Model, matrices: Mapping[str, BlockMatrix]) -> None:
    """Put `matrices`, by parameter name, in place of the constants of `model`."""
    graph = model.graph
    model.opset_imports[MICROSOFT] = 1
    stored = {n: found for n in list(graph.initializers) if (found := _parts(graph, matrices, n))}
    for product in list(products(graph)):
        name = str(product.weight.name)
        if name in stored:
            _replace_product(graph, product, stored[name])
    for node in list(graph):
        if node.op_type == "Gather" and node.inputs[0] is not None:
            name = str(node.inputs[0].name)
            if name in stored:
                _replace_gather(graph, node, stored[name], name)
    _remove_unused(graph, stored)


@dataclass(frozen=True)
class Part:
    """Some rows of a matrix, `first` the uppermost; `rows` is what their names end with. `packed`,
    `scales` and `zeros` are what nodes read."""

    rows: str
    first: int
    matrix: BlockMatrix
    packed: ir.Value
    scales: ir.Value
    zeros: ir.Value | None

    @property
    def count(self) -> int:
        return len(self.matrix.scales)


def _parts(graph: ir.Graph, matrices: Mapping[str, BlockMatrix], name: str) -> list[Part]:
    """The matrix of a constant, in its parts, put into the graph; a tied one may bear the name of
    the head."""
    parameter = name.removeprefix(PARAMETER_PREFIX)
    names = parts_of(parameter, matrices)
    if parameter == "lm_head.weight" and not names:
        parameter = "wte.weight"
        names = parts_of(parameter, matrices)
    dtype = graph.initializers[name].dtype or ir.DataType.FLOAT
    return [
        _part(graph, name, dtype, part.removeprefix(parameter), rows_of(part), matrices[part])
        for part in names
    ]


def _part(
    graph: ir.Graph, name: str, dtype: ir.DataType, rows: str, at: slice, matrix: BlockMatrix
) -> Part:
    own, zeros = name + rows, matrix.packed_zeros
    packed = _constant(graph, own + PACKED_SUFFIX, matrix.packed)
    scales = _constant(graph, own + SCALES_SUFFIX, matrix.scales.astype(np.float16))
    if dtype != ir.DataType.FLOAT16:
        cast = ir.node("Cast", [scales], {"to": dtype})
        graph.insert_before(graph[0], cast)
        scales = cast.outputs[0]
    own_zeros = None if zeros is None else _constant(graph, own + ZEROS_SUFFIX, zeros)
    return Part(rows, at.start or 0, matrix, packed, scales, own_zeros)


def _replace_product(graph: ir.Graph, product: Product, parts: list[Part]) -> None:
    """MatMul, and the bias that follows it, become one MatMulNBits; or one for each part, whose
    results stand side by side."""
    node = product.node
    last, bias = node, _bias_after(node) if len(parts) == 1 else None
    if bias is not None:
        last = next(iter(node.outputs[0].uses()))[0]
    new = [_product(node, part, bias) for part in parts]
    if len(new) > 1:
        new.append(ir.node("Concat", [n.outputs[0] for n in new], {"axis": -1}))
    _substitute(graph, last, *new, also=[node] if last is not node else [])


def _product(node: ir.Node, part: Part, bias: ir.Value | None) -> ir.Node:
    matrix, fmt = part.matrix, part.matrix.format
    attributes = {
        "K": matrix.columns,
        "N": part.count,
        "bits": fmt.bits,
        "block_size": fmt.block_size,
        "accuracy_level": _INT8_ACTIVATIONS,
    }
    inputs = [node.inputs[0], part.packed, part.scales, part.zeros]
    inputs += [None, bias]  # None: none; the fifth, an order
    while inputs[-1] is None:
        inputs.pop()
    label = f"{node.name}{part.rows}"
    return ir.node("MatMulNBits", inputs, attributes, domain=MICROSOFT, name=label)


def _bias_after(node: ir.Node) -> ir.Value | None:
    """The constant vector that is added to the product and nothing else, if there is one."""
    uses = list(node.outputs[0].uses())
    if len(uses) != 1 or uses[0][0].op_type != "Add" or node.outputs[0].is_graph_output():
        return None
    add, index = uses[0]
    other = add.inputs[1 - index]
    constant = other.const_value if other is not None else None
    return other if constant is not None and len(constant.shape) == 1 else None


def _replace_gather(graph: ir.Graph, node: ir.Node, parts: list[Part], name: str) -> None:
    """Rows of the shared matrix. Of several parts each is asked for the row of its own that is
    nearest, and the one that has it is chosen."""
    ids = node.inputs[1]
    assert ids is not None
    if len(parts) == 1:
        _substitute(graph, node, *_gather(graph, ids, parts[0], name))
        return
    new: list[ir.Node] = []
    for part in reversed(parts):
        below = new[-1].outputs[0] if new else None
        bounds = {"first": part.first, "none": 0, "last": part.count - 1}
        bounds |= {"after": part.first + part.count}
        first, none, last, after = (
            _constant(graph, f"{name}{part.rows}_{key}", np.array(value, np.int64))
            for key, value in bounds.items()
        )
        shifted = ir.node("Sub", [ids, first])
        own = ir.node("Clip", [shifted.outputs[0], none, last])
        new += [shifted, own, *_gather(graph, own.outputs[0], part, name)]
        if below is not None:
            axis = _constant(graph, f"{name}_last_axis", np.array([-1], np.int64))
            within = ir.node("Less", [ids, after])
            wide = ir.node("Unsqueeze", [within.outputs[0], axis])
            choice = ir.node("Where", [wide.outputs[0], new[-1].outputs[0], below])
            new += [within, wide, choice]
    _substitute(graph, node, *new)


def _gather(graph: ir.Graph, ids: ir.Value, part: Part, name: str) -> list[ir.Node]:
    """Rows of one part: [..., blocks, block_size] come back, made [..., columns]."""
    matrix = part.matrix
    axis = _constant(graph, f"{name}_axis", np.array([2], np.int64))
    wide = _constant(graph, f"{name}_row", np.array([0, 0, -1], np.int64))
    column_scales = ir.node("Unsqueeze", [part.scales, axis])
    rows = ir.node(
        "GatherBlockQuantized",
        [part.packed, ids, column_scales.outputs[0]],
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
    return new


def _constant(graph: ir.Graph, name: str, array: NDArray[Any]) -> ir.Value:
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


def _remove_unused(graph: ir.Graph, stored: Iterable[str]) -> None:
    for node in list(graph):
        if node.op_type == "Transpose" and not node.outputs[0].uses():
            graph.remove(node, safe=True)
    for name in stored:
        if not graph.initializers[name].uses():
            graph.initializers.pop(name)


# --- on disk ------------------------------------------------------------------------------------


def save_graph(graph: ir.Model, folder: Path) -> None:
    """The graph, and beside it its weights, which onnxruntime maps into memory instead of
    copying them (and protobuf stops at 2 GiB)."""
    path = folder / GRAPH_FILE
    _forget_its_making(graph)
    ir.save(graph, path, external_data=GRAPH_DATA_FILE)
    saved = ir.load(path)
    for node in saved.graph:
        if node.op_type == "GatherBlockQuantized":
            _name_rows(saved.graph, node)
    ir.save(saved, path)


def _forget_its_making(model: ir.Model) -> None:
    """What other exporters note, with the paths of the machine, and shapes that onnxruntime infers
    by itself: two thirds of the bytes of such a graph."""
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    kept = {*model.graph.inputs, *model.graph.outputs}
    for node in model.graph:
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
            if value not in kept:
                value.shape, value.type = None, None
    for value in (*kept, *model.graph.initializers.values()):
        value.metadata_props.clear()


def _name_rows(graph: ir.Graph, gather: ir.Node) -> None:
    """Give the matrix that rows are gathered from a second name for the same bytes on disk.

    onnxruntime repacks the matrix of a product and then lets the original go, unless somebody else
    uses it by that name. Of the rows only those that are read ever come into memory.
    """
    matrix = gather.inputs[0]
    assert matrix is not None
    stored = matrix.const_value
    if len(matrix.uses()) < 2 or not isinstance(stored, ir.ExternalTensor):
        return
    name = f"{matrix.name}_rows"
    place = (stored.location, stored.offset, stored.length, stored.dtype)
    twin = ir.ExternalTensor(*place, name=name, shape=stored.shape, base_dir=stored.base_dir)
    value = ir.Value(name=name, shape=stored.shape, type=matrix.type, const_value=twin)
    graph.initializers.add(value)
    gather.replace_input_with(0, value)
