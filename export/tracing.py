"""A forward pass, written down: PyTorch's modules run on values that stand for tensors, and what is
done with these becomes the nodes of an ONNX graph.

So a model is defined once, and its graph has the operators that are meant, not a decomposition of
what PyTorch does. That such values may go into PyTorch's functions is its own protocol, of
`__torch_function__` (https://docs.pytorch.org/docs/stable/notes/extending.html). A module that
calls a function which is not among the translations at the end needs one there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
import torch.nn.functional as F
from torch import Tensor

_IR_VERSION = 10  # the file format of OPSET's time
_DTYPES = {torch.float32: ir.DataType.FLOAT, torch.float16: ir.DataType.FLOAT16}

Shape = Sequence[int | str]  # a name stands for a size that is known when the graph runs


class Traced:
    """Stands for a tensor of `rank` dimensions: an input of the graph or an output of a node."""

    def __init__(self, tracer: Tracer, value: ir.Value, rank: int) -> None:
        self.tracer, self.value, self.rank = tracer, value, rank

    @classmethod
    def __torch_function__(
        cls,
        function: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        del types
        if function not in _TRANSLATIONS:
            return NotImplemented  # for which PyTorch raises TypeError, with the function's name
        return _TRANSLATIONS[function](*args, **kwargs or {})

    @property
    def shape(self) -> tuple[int, ...]:
        """As `view` takes it: a dimension of 0 is left as it is."""
        return (0,) * self.rank

    def __add__(self, other: Any) -> Traced:
        return self.tracer.node("Add", self, other)

    def __mul__(self, other: Any) -> Traced:
        return self.tracer.node("Mul", self, other)

    def view(self, *shape: int) -> Traced:
        return self.tracer.node("Reshape", self, self.tracer.integers(*shape), rank=len(shape))

    def flatten(self, start: int) -> Traced:
        return self.view(*self.shape[:start], -1)

    def chunk(self, count: int, dim: int) -> list[Traced]:
        return self.tracer.nodes("Split", count, self, axis=dim, num_outputs=count)


Output = tuple[Traced, ir.DataType, Shape]


class Tracer:
    """A graph in the making. `parameters` become constants of these names where they are used: a
    matrix as MatMul takes it, [in, out], unless its rows are asked for too."""

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        # Of two names for one tensor the last counts.
        self._names = {id(tensor): name for name, tensor in parameters.items()}
        self._parameters = dict(parameters)
        self._constants: dict[str, ir.Value] = {}
        self._inputs: list[ir.Value] = []
        self._nodes: list[ir.Node] = []
        self._used: Counter[str] = Counter()

    def input(self, name: str, dtype: ir.DataType, shape: Shape) -> Traced:
        value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))
        self._inputs.append(value)
        return Traced(self, value, len(shape))

    def node(self, operator: str, *inputs: Any, rank: int | None = None, **options: Any) -> Traced:
        """The output of a node that has one, of the rank of its first input unless that is said."""
        (output,) = self.nodes(operator, 1, *inputs, rank=rank, **options)
        return output

    def nodes(
        self,
        operator: str,
        outputs: int,
        *inputs: Traced | Tensor | ir.Value | None,
        rank: int | None = None,
        name: str = "",
        domain: str = "",
        **attributes: Any,
    ) -> list[Traced]:
        """The outputs of a node, which is named after the module whose parameter it reads, if it
        reads one."""
        read = [x.value if isinstance(x, Traced) else x for x in inputs]
        values = [self.rows(x) if isinstance(x, Tensor) else x for x in read]
        while values[-1] is None:
            values.pop()
        name = self._unused(name or self._label(operator, values))
        node = ir.node(operator, values, attributes, domain=domain, num_outputs=outputs, name=name)
        self._nodes.append(node)
        for number, output in enumerate(node.outputs):
            output.name = name if outputs == 1 else f"{name}_{number}"
        ranks = (x.rank for x in inputs if isinstance(x, Traced))
        rank = next(ranks) if rank is None else rank
        return [Traced(self, output, rank) for output in node.outputs]

    def rows(self, parameter: Tensor) -> ir.Value:
        """A parameter as it is."""
        return self._constant(self._names[id(parameter)], parameter)

    def transposed(self, parameter: Tensor) -> ir.Value:
        """The transpose of a matrix; stored as such, if its rows are not."""
        name = self._names[id(parameter)]
        if name in self._constants:
            return self.node("Transpose", parameter, rank=2, perm=[1, 0]).value
        return self._constant(name, parameter.T)

    def integers(self, *values: int) -> ir.Value:
        """A vector of integers."""
        name = "_".join(map(str, ("integers", *values)))
        return self._constant(name, np.array(values, np.int64))

    def model(self, outputs: Mapping[str, Output], opset: int) -> ir.Model:
        """The whole graph, and what it gives, by name."""
        for name, (traced, dtype, shape) in outputs.items():
            value = traced.value
            value.name, value.type, value.shape = name, ir.TensorType(dtype), ir.Shape(shape)
        graph = ir.Graph(
            self._inputs,
            [traced.value for traced, *_ in outputs.values()],
            nodes=self._nodes,
            initializers=list(self._constants.values()),
            opset_imports={"": opset, "com.microsoft": 1},
            name="decoder",
        )
        return ir.Model(graph, ir_version=_IR_VERSION, producer_name="gptrt-export")

    def _constant(self, name: str, values: Any) -> ir.Value:
        if name not in self._constants:
            array = values.detach().numpy() if isinstance(values, Tensor) else values
            tensor = ir.tensor(array, name=name)
            self._constants[name] = ir.Value(
                name=name,
                shape=ir.Shape(array.shape),
                type=ir.TensorType(tensor.dtype),
                const_value=tensor,
            )
        return self._constants[name]

    def _label(self, operator: str, values: Sequence[ir.Value | None]) -> str:
        names = (str(value.name) for value in values if value is not None)
        modules = (name.rpartition(".")[0] for name in names if name in self._parameters)
        module = next(modules, "")
        return f"{module}/{operator}" if module else operator

    def _unused(self, name: str) -> str:
        self._used[name] += 1
        return name if self._used[name] == 1 else f"{name}_{self._used[name]}"


def dtype_of(tensor: Tensor) -> ir.DataType:
    """The ONNX type of weights in fp32 or fp16."""
    return _DTYPES[tensor.dtype]


# --- translations -------------------------------------------------------------------------------


def _embedding(ids: Traced, weight: Tensor, *_: Any, **__: Any) -> Traced:
    return ids.tracer.node("Gather", weight, ids, axis=0, rank=ids.rank + 1)


def _linear(x: Traced, weight: Tensor, bias: Tensor | None = None) -> Traced:
    y = x.tracer.node("MatMul", x, x.tracer.transposed(weight))
    return y if bias is None else y + bias


def _layer_norm(
    x: Traced, shape: Any, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5
) -> Traced:
    del shape
    return x.tracer.node("LayerNormalization", x, weight, bias, axis=-1, epsilon=eps, stash_type=1)


def _rms_norm(x: Traced, shape: Any, weight: Tensor, eps: float | None = None) -> Traced:
    """As the one operator that onnxruntime has for it, instead of six."""
    del shape
    return x.tracer.node(
        "SimplifiedLayerNormalization", x, weight, axis=-1, epsilon=eps or 0.0, stash_type=1
    )


def _gelu(x: Traced, approximate: str = "none") -> Traced:
    return x.tracer.node("Gelu", x, approximate=approximate)


def _relu(x: Traced, inplace: bool = False) -> Traced:
    del inplace
    return x.tracer.node("Relu", x)


def _silu(x: Traced, inplace: bool = False) -> Traced:
    del inplace
    return x * x.tracer.node("Sigmoid", x)


def _dropout(x: Traced, *_: Any, **__: Any) -> Traced:
    """A graph is not trained."""
    return x


def _split(x: Traced, sizes: Sequence[int], dim: int) -> list[Traced]:
    return x.tracer.nodes("Split", len(sizes), x, x.tracer.integers(*sizes), axis=dim)


def _cat(parts: Sequence[Traced], dim: int) -> Traced:
    return parts[0].tracer.node("Concat", *parts, axis=dim)


_TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    F.embedding: _embedding,
    F.linear: _linear,
    F.layer_norm: _layer_norm,
    F.rms_norm: _rms_norm,
    F.gelu: _gelu,
    F.relu: _relu,
    F.silu: _silu,
    F.dropout: _dropout,
    torch.split: _split,
    torch.cat: _cat,
}
