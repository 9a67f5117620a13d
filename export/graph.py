"""The graph: the model's own forward, traced with a cached attention in place of PyTorch's.

`torch.onnx.export(dynamo=True)` sees `GPT.forward` with `CachedAttention` for its `attend`, which
emits one onnxruntime GroupQueryAttention a layer: it rotates, appends to the cache and attends
(https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md). Past and present
are meant to be bound to the same buffer, [batch, kv_heads, max_length, head_dim].
"""

from __future__ import annotations

import copy
import logging
import warnings
from typing import Any

import onnx_ir as ir
import onnx_ir.passes.common as passes
import onnxscript.optimizer
import torch
from torch import Tensor, nn

from gptrt.architecture import ModelConfig
from gptrt.format import (
    ATTENTION_MASK,
    HIDDEN_STATES,
    INPUT_IDS,
    LOGITS,
    NUM_LOGITS_TO_KEEP,
    POSITION_IDS,
    past_name,
    present_name,
)

from .model import GPT, attention_scale, keep_last, rotary_tables

PARAMETER_PREFIX = "model."  # of the constants: the rest is the parameter's name in GPT
OPSET = 21  # the newest whose every operator onnxruntime has had for long


class CachedAttention:
    """`attend` for export: GroupQueryAttention over one shared buffer a layer."""

    def __init__(
        self,
        config: ModelConfig,
        mask: Tensor,
        past: tuple[Tensor, ...],
        tables: tuple[Tensor, ...],
    ) -> None:
        self.config, self.past, self.tables = config, past, tables
        self.present: list[Tensor] = []
        # The operator wants the index of each row's last valid position, and the longest length.
        self.last = (mask.sum(dim=1, keepdim=True) - 1).to(torch.int32)  # [batch, 1]
        self.total = torch.scalar_tensor(mask.shape[1], dtype=torch.int32)

    def __call__(self, layer: int, packed: Tensor) -> Tensor:
        config = self.config
        past_key, past_value = self.past[2 * layer : 2 * layer + 2]
        # Key and value travel inside the query, as c_attn gives them: no split, no copies.
        cache = (past_key, past_value, self.last, self.total)
        rotated = config.positions == "rotary" and layer not in config.unrotated
        inputs = (packed, None, None, *cache, *(self.tables if rotated else ()))
        width = config.n_head * config.head_dim
        y, present_key, present_value = torch.onnx.ops.symbolic_multi_out(
            "com.microsoft::GroupQueryAttention",
            inputs,
            {
                "num_heads": config.n_head,
                "kv_num_heads": config.n_kv_head,
                "do_rotary": int(rotated),
                "local_window_size": config.window_of(layer) or -1,
                "scale": attention_scale(config),
            },
            dtypes=(packed.dtype, past_key.dtype, past_value.dtype),
            shapes=((*packed.shape[:2], width), past_key.shape, past_value.shape),
            version=1,
        )
        self.present += [present_key, present_value]
        attended: Tensor = y
        return attended


class GraphLinear(nn.Module):
    """A linear layer whose weight keeps its name in the graph, turned for MatMul: [in, out]."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = nn.Parameter(linear.weight.T, requires_grad=False)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        y = x @ self.weight
        return y if self.bias is None else y + self.bias


class GraphRMSNorm(nn.Module):
    """RMSNorm as the one operator that onnxruntime has for it, instead of six."""

    def __init__(self, norm: nn.RMSNorm) -> None:
        super().__init__()
        self.weight, self.eps = norm.weight, norm.eps or 0.0

    def forward(self, x: Tensor) -> Tensor:
        attributes: dict[str, Any] = {"axis": -1, "epsilon": self.eps, "stash_type": 1}
        y: Tensor = torch.onnx.ops.symbolic(
            "SimplifiedLayerNormalization",
            (x, self.weight),
            attributes,
            dtype=x.dtype,
            shape=x.shape,
            version=1,
        )
        return y


def graph_model(model: GPT) -> GPT:
    """The model with modules that trace into clean nodes; parameters are shared, not copied.

    A tied head stays as it is, so that its transpose is seen to be of the embedding.
    """
    shared = {id(p): p for p in model.parameters()}
    twin = copy.deepcopy(model, shared)
    for parent in list(twin.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.RMSNorm):
                setattr(parent, name, GraphRMSNorm(child))
            elif isinstance(child, nn.Linear) and child.weight is not twin.wte.weight:
                setattr(parent, name, GraphLinear(child))
    return twin.eval()


class DecoderGraph(nn.Module):
    """The exported face of a model: its inputs and outputs are those of `gptrt.format`."""

    def __init__(self, model: GPT, *, hidden_states: bool = False) -> None:
        super().__init__()
        self.model = graph_model(model)
        self.hidden_states = hidden_states
        if model.config.positions == "rotary":
            dtype = model.wte.weight.dtype
            cos, sin = rotary_tables(model.config, model.config.n_positions)
            self.rotary_cos, self.rotary_sin = nn.Buffer(cos.to(dtype)), nn.Buffer(sin.to(dtype))

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        num_logits_to_keep: Tensor,
        *past: Tensor,
    ) -> tuple[Tensor, ...]:
        rotary = self.model.config.positions == "rotary"
        tables = (self.rotary_cos, self.rotary_sin) if rotary else ()
        attend = CachedAttention(self.model.config, attention_mask, past, tables)
        states = self.model.states(self.model.embed(input_ids, position_ids), attend)
        kept = self.model.to_head(keep_last(states, num_logits_to_keep))
        given = [self.model.lm_head(kept)]
        if self.hidden_states:
            given.append(states)
        floats = (x if x.dtype == torch.float32 else x.float() for x in given)
        return *floats, *attend.present


def build_graph(model: GPT, *, hidden_states: bool = False) -> ir.Model:
    """The fp32 (or fp16, as the model is) decoder graph, its weights shared with the model; with
    `hidden_states` it gives those of the last norm, too."""
    config = model.config
    layers = range(config.n_layer)
    past = [past_name(layer, part) for layer in layers for part in ("key", "value")]
    present = [present_name(layer, part) for layer in layers for part in ("key", "value")]
    with warnings.catch_warnings(), _quiet("torch.onnx"):
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            DecoderGraph(model, hidden_states=hidden_states),
            _example(model, past_length=8, new=4),
            dynamo=True,
            opset_version=OPSET,
            input_names=[INPUT_IDS, ATTENTION_MASK, POSITION_IDS, NUM_LOGITS_TO_KEEP, *past],
            output_names=[LOGITS, *([HIDDEN_STATES] if hidden_states else []), *present],
            dynamic_shapes=_dynamic_shapes(len(past)),
            optimize=False,
            verbose=False,
        )
    assert program is not None
    graph: ir.Model = program.model
    _simplify(graph)
    _keep_by_length(graph)
    _name_dimensions(graph)
    _keep_all_by_default(graph)
    return graph


def _simplify(graph: ir.Model) -> None:
    """The exporter's own optimization less one step: it merges parameters of equal value, and
    then the graph could not be read back into a model by the names of its parameters."""
    onnxscript.optimizer.fold_constants(graph)
    for step in (
        passes.InlinePass(),
        passes.IdentityEliminationPass(),
        passes.RemoveUnusedNodesPass(),
        passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        passes.CommonSubexpressionEliminationPass(),
        passes.RemoveUnusedFunctionsPass(),  # type: ignore[no-untyped-call]
        passes.RemoveUnusedOpsetsPass(),
        passes.NameFixPass(),
    ):
        step(graph)


def _keep_by_length(model: ir.Model) -> None:
    """Slice from max(length - keep, 0) mod length instead of from -keep: the same, and made of a
    shape, so that onnxruntime computes it on the processor also where the slice is made on a card.
    Otherwise it is copied there and back, and with such a copy no CUDA graph can be captured."""
    graph = model.graph
    keep = next(v for v in graph.inputs if v.name == NUM_LOGITS_TO_KEEP)
    (cut,) = [node for node in graph if node.op_type == "Slice" and _reads(node.inputs[1], keep)]
    zero = ir.Value(name="no_positions", const_value=ir.tensor([0], ir.DataType.INT64))
    graph.initializers.add(zero)
    length = ir.node("Shape", [cut.inputs[0]], {"start": 1, "end": 2})
    before = ir.node("Sub", [length.outputs[0], keep])
    least = ir.node("Max", [before.outputs[0], zero])
    start = ir.node("Mod", [least.outputs[0], length.outputs[0]])
    graph.insert_before(cut, [length, before, least, start])
    cut.replace_input_with(1, start.outputs[0])
    passes.RemoveUnusedNodesPass()(model)


def _reads(value: ir.Value | None, source: ir.Value) -> bool:
    """Whether a value is computed from the other."""
    if value is None or value is source:
        return value is source
    producer = value.producer()
    return producer is not None and any(_reads(v, source) for v in producer.inputs)


def _name_dimensions(graph: ir.Model) -> None:
    """Readable names instead of the tracer's symbols; a cache has a length of its own."""
    for value in (*graph.graph.inputs, *graph.graph.outputs):
        name, shape = str(value.name), value.shape
        if shape is None or name == NUM_LOGITS_TO_KEEP:
            continue
        if name.startswith(("past", "present")):
            value.shape = ir.Shape(["batch", shape[1], "cache_length", shape[3]])
        elif name == LOGITS:
            value.shape = ir.Shape(["batch", "kept", shape[2]])
        elif name == HIDDEN_STATES:
            value.shape = ir.Shape(["batch", "new", shape[2]])
        else:
            value.shape = ir.Shape(["batch", "length" if name == ATTENTION_MASK else "new"])


def _example(model: GPT, past_length: int, new: int) -> tuple[Any, ...]:
    config, batch = model.config, 2
    # Two tensors: the exporter takes one tensor given twice for one input.
    ids, positions = (torch.zeros(batch, new, dtype=torch.int64) for _ in range(2))
    mask = torch.ones(batch, past_length + new, dtype=torch.int64)
    keep = torch.zeros(1, dtype=torch.int64)
    shape = (batch, config.n_kv_head, past_length + new, config.head_dim)
    dtype = next(model.parameters()).dtype
    caches = (torch.zeros(shape, dtype=dtype) for _ in range(2 * config.n_layer))
    return (ids, mask, positions, keep, *caches)


def _dynamic_shapes(caches: int) -> tuple[Any, ...]:
    batch, new, total = (torch.export.Dim.DYNAMIC for _ in range(3))
    cache = {0: batch, 2: torch.export.Dim.DYNAMIC}
    return ({0: batch, 1: new}, {0: batch, 1: total}, {0: batch, 1: new}, None, (cache,) * caches)


def _keep_all_by_default(graph: ir.Model) -> None:
    """An input that is also an initializer is optional: 0, all positions, for other runtimes."""
    value = next(v for v in graph.graph.inputs if v.name == NUM_LOGITS_TO_KEEP)
    value.const_value = ir.tensor([0], ir.DataType.INT64, name=NUM_LOGITS_TO_KEEP)
    graph.graph.initializers.add(value)


class _quiet:
    """The exporter logs its progress as if it were the application."""

    def __init__(self, name: str) -> None:
        self._logger = logging.getLogger(name)

    def __enter__(self) -> None:
        self._level = self._logger.level
        self._logger.setLevel(logging.ERROR)

    def __exit__(self, *exc: object) -> None:
        self._logger.setLevel(self._level)
