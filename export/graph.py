"""The graph: the model's own forward, traced with a cached attention in place of PyTorch's.

`tracing` writes down what `GPT` does, with `CachedAttention` for its `attend`, which is one
GroupQueryAttention of onnxruntime's a layer: it rotates, appends to the cache and attends
(https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md). Past and present
are meant to be bound to the same buffer, [batch, kv_heads, max_length, head_dim].
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
from torch import Tensor

from gptrt.architecture import ModelConfig
from gptrt.format import (
    ATTENTION_MASK,
    CACHE_PARTS,
    HIDDEN_STATES,
    INPUT_IDS,
    LOGITS,
    NUM_LOGITS_TO_KEEP,
    POSITION_IDS,
    past_name,
    present_name,
)

from .model import GPT, attention_scale, rotary_tables
from .tracing import Output, Shape, Traced, Tracer, dtype_of

PARAMETER_PREFIX = "model."  # of the constants: the rest is the parameter's name in GPT
OPSET = 21  # the newest whose every operator onnxruntime has had for long

_END = np.iinfo(np.int64).max  # of a slice: wherever that is


def build_graph(model: GPT, *, hidden_states: bool = False) -> ir.Model:
    """The fp32 (or fp16, as the model is) decoder graph, its weights shared with the model; with
    `hidden_states` it gives those of the last norm, too."""
    config, dtype = model.config, dtype_of(model.wte.weight)
    parameters = dict(model.named_parameters(prefix=PARAMETER_PREFIX[:-1], remove_duplicate=False))
    tables = dict[str, Tensor]()
    if config.positions == "rotary":
        cos, sin = rotary_tables(config, config.n_positions)
        tables = {"rotary_cos": cos.to(model.wte.weight), "rotary_sin": sin.to(model.wte.weight)}
    tracer = Tracer(parameters | tables)
    ids = tracer.input(INPUT_IDS, ir.DataType.INT64, ["batch", "new"])
    mask = tracer.input(ATTENTION_MASK, ir.DataType.INT64, ["batch", "length"])
    positions = tracer.input(POSITION_IDS, ir.DataType.INT64, ["batch", "new"])
    keep = tracer.input(NUM_LOGITS_TO_KEEP, ir.DataType.INT64, [1])
    cache: Shape = ["batch", config.n_kv_head, "cache_length", config.head_dim]
    each = [(layer, part) for layer in range(config.n_layer) for part in CACHE_PARTS]
    past = [tracer.input(past_name(*one), dtype, cache) for one in each]
    attend = CachedAttention(config, mask, past, list(tables.values()))
    # To the modules what is traced is a tensor.
    states: Traced = model.states(model.embed(ids, positions), attend)  # type: ignore[arg-type,assignment]
    kept = model.to_head(_last(states, keep))  # type: ignore[arg-type]
    outputs: dict[str, Output] = {
        LOGITS: _in_fp32(model.lm_head(kept), dtype, ["batch", "kept", config.vocab_size])
    }
    if hidden_states:
        outputs[HIDDEN_STATES] = _in_fp32(states, dtype, ["batch", "new", config.n_embd])
    for one, present in zip(each, attend.present, strict=True):
        outputs[present_name(*one)] = (present, dtype, cache)
    graph = tracer.model(outputs, OPSET)
    _keep_all_by_default(graph)
    return graph


class CachedAttention:
    """`attend` for export: GroupQueryAttention over one shared buffer a layer."""

    def __init__(
        self,
        config: ModelConfig,
        mask: Traced,
        past: Sequence[Traced],
        tables: Sequence[Tensor],
    ) -> None:
        self.config, self.past, self.tables = config, past, tables
        self.present: list[Traced] = []
        # The operator wants the index of each row's last valid position, and the longest length.
        node, integers, int32 = mask.tracer.node, mask.tracer.integers, ir.DataType.INT32
        lengths = node("ReduceSum", mask, integers(1), keepdims=1)  # [batch, 1]
        self.last = node("Cast", node("Sub", lengths, integers(1)), to=int32)
        length = node("Squeeze", node("Shape", mask, start=1, end=2, rank=1), rank=0)
        self.total = node("Cast", length, to=int32)

    def __call__(self, layer: int, packed: Traced) -> Traced:
        config = self.config
        rotated = config.positions == "rotary" and layer not in config.unrotated
        # Key and value travel inside the query, as c_attn gives them: no split, no copies.
        cache = (*self.past[2 * layer : 2 * layer + 2], self.last, self.total)
        attended, *present = packed.tracer.nodes(
            "GroupQueryAttention",
            3,
            *(packed, None, None, *cache, *(self.tables if rotated else ())),
            name=f"{PARAMETER_PREFIX}h.{layer}.attn/GroupQueryAttention",
            domain="com.microsoft",
            num_heads=config.n_head,
            kv_num_heads=config.n_kv_head,
            do_rotary=int(rotated),
            local_window_size=config.window_of(layer) or -1,
            scale=attention_scale(config),
        )
        self.present += present
        return attended


def _last(states: Traced, keep: Traced) -> Traced:
    """The last `keep` [1] positions of states [batch, new, n]; all of them where `keep` is 0.

    From max(length - keep, 0) mod length on: made of a shape, so that onnxruntime computes it on
    the processor also where the slice is made on a card. Otherwise it is copied there and back, and
    with such a copy no CUDA graph can be captured.
    """
    node, integers = states.tracer.node, states.tracer.integers
    length = node("Shape", states, start=1, end=2, rank=1)
    start = node("Max", node("Sub", length, keep), integers(0))
    return node("Slice", states, node("Mod", start, length), integers(_END), integers(1))


def _in_fp32(x: Traced, dtype: ir.DataType, shape: Shape) -> Output:
    """What the model gives, whatever it computes in."""
    fp32 = ir.DataType.FLOAT
    return (x if dtype == fp32 else x.tracer.node("Cast", x, to=fp32)), fp32, shape


def _keep_all_by_default(graph: ir.Model) -> None:
    """An input that is also an initializer is optional: 0, all positions, for other runtimes."""
    value = next(v for v in graph.graph.inputs if v.name == NUM_LOGITS_TO_KEEP)
    value.const_value = ir.tensor([0], ir.DataType.INT64, name=NUM_LOGITS_TO_KEEP)
    graph.graph.initializers.add(value)
