"""The KV cache in 8 bits: a quarter of the memory, and of the bytes that attention reads.

onnxruntime's GroupQueryAttention stores a key or a value k as the integer round(k / scale), one
scale for each channel of each head, fixed at export. Channels differ much and stay as they are
from text to text (https://arxiv.org/abs/2402.02750), so the largest magnitude that a calibration
text gives is put at 127; what exceeds it elsewhere is clipped.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch import Tensor

from gptrt.format import CACHE_PARTS, past_name, present_name

from .data import in_order
from .model import GPT, CausalAttention

Scales = NDArray[np.float32]  # [kv_heads, 1, head_dim]
CALIBRATION_TOKENS = 16_384
_LARGEST = 127
_SCALE_INPUTS = 12  # of GroupQueryAttention: the key's, then the value's


@dataclass(frozen=True)
class CacheScales:
    """Of one layer."""

    key: Scales
    value: Scales


class _Observer(CausalAttention):
    """Attention that remembers the largest magnitudes of what a cache would hold."""

    def __init__(self, model: GPT) -> None:
        super().__init__(model.config)
        shape = (model.config.n_layer, 2, model.config.n_kv_head, model.config.head_dim)
        self.largest = torch.zeros(shape)

    def heads(self, packed: Tensor, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = super().heads(packed, layer)
        seen = torch.stack([part.abs().amax(dim=(0, 2)) for part in (key, value)])
        self.largest[layer] = torch.maximum(self.largest[layer], seen)
        return query, key, value


@torch.no_grad()
def calibrate_cache(
    model: GPT, ids: NDArray[np.uint32], window: int | None = None
) -> list[CacheScales]:
    """The scales of every layer, from the first tokens of `ids`, in windows of `window` tokens, or
    of the context: keys differ with their positions."""
    observer = _Observer(model)
    read = min(CALIBRATION_TOKENS, len(ids) - 1)
    length = min(window or model.config.n_positions, read)
    count = read // length
    for windows in in_order(ids[: count * length + 1], length, 1):
        model.hidden(torch.from_numpy(windows[:, :-1]), attend=observer)
    scales = (observer.largest / _LARGEST).clamp(min=torch.finfo(torch.float32).tiny)
    return [CacheScales(*(part[:, None].numpy() for part in layer)) for layer in scales]


def quantize_cache(graph: ir.Graph, scales: list[CacheScales]) -> None:
    """Make the caches of `graph` int8, in place."""
    values = {value.name: value for value in (*graph.inputs, *graph.outputs)}
    attentions = [node for node in graph if node.op_type == "GroupQueryAttention"]
    for layer, (node, of_layer) in enumerate(zip(attentions, scales, strict=True)):
        node.resize_inputs(_SCALE_INPUTS + 2)
        for number, part in enumerate(CACHE_PARTS):
            constant = ir.tensor(getattr(of_layer, part), name=f"cache.{layer}.{part}_scale")
            scale = ir.Value(name=constant.name, const_value=constant)
            graph.initializers.add(scale)
            node.replace_input_with(_SCALE_INPUTS + number, scale)
            for name in (past_name(layer, part), present_name(layer, part)):
                values[name].type = ir.TensorType(ir.DataType.INT8)
            node.attributes[f"{part[0]}_quant_type"] = ir.AttrString(
                f"{part[0]}_quant_type", "PER_CHANNEL"
            )
        node.attributes["kv_cache_bit_width"] = ir.AttrInt64("kv_cache_bit_width", 8)
