"""A bundle as a checkpoint: its quantized matrices made fp32 again, to be fine-tuned further.

What comes back is the model that the bundle computes, rounding included. At 8 bits that is the
trained model to three digits, so a bundle can be shipped alone and still be taught.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from gptrt.architecture import ForeignModel
from gptrt.chat import ChatTemplate
from gptrt.errors import CheckpointError
from gptrt.format import (
    GENERATION_CONFIG_FILE,
    GRAPH_DATA_FILE,
    GRAPH_FILE,
    TOKENIZER_FILE,
    open_bundle,
)
from gptrt.schema import read_json

from .blocks import BlockFormat, BlockMatrix, unpack
from .checkpoint import Checkpoint
from .graph import PARAMETER_PREFIX
from .model import GPT
from .nbits import PACKED_SUFFIX, SCALES_SUFFIX, ZEROS_SUFFIX, products
from .parts import parameter_of, parts_of
from .tokenization import load_tokenizer, read_special_ids, special_ids

_MATRIX_INPUT = {"MatMulNBits": 1, "GatherBlockQuantized": 0}


def load_bundle(path: Path) -> Checkpoint:
    """The checkpoint that a bundle holds, its vocabulary in the basis that it has there. Raises
    BundleError, and CheckpointError for a graph that was not made by us."""
    bundle = open_bundle(path)
    manifest, model = bundle.manifest, bundle.manifest.model
    if isinstance(model, ForeignModel):
        raise CheckpointError(
            f"a model of ours in {path}",
            found=f"a graph built by {model.made_with}",
            do="fine-tune the checkpoint that it was made from",
        )
    graph = ir.load(bundle.file(GRAPH_FILE)).graph
    wanted = dict(GPT.outline(model).named_parameters())
    found = dict(_plain(graph)) | _joined(dict(_quantized(graph, wanted)))
    if "wte.weight" not in found:  # tied, it bears one of its two names
        found["wte.weight"] = found.pop("lm_head.weight", None)
    if missing := [name for name in wanted if found.get(name) is None]:
        raise CheckpointError(
            f"every parameter of the model in {path}",
            found=f"no {', '.join(missing)}",
            do="fine-tune the checkpoint that it was made from",
        )
    state = {n: torch.from_numpy(np.array(found[n], np.float32, order="C")) for n in wanted}
    if model.tied:
        state["lm_head.weight"] = state["wte.weight"]
    tokenizer = load_tokenizer(bundle.file(TOKENIZER_FILE))
    json = read_json(bundle.file(GENERATION_CONFIG_FILE), error=CheckpointError)
    special = read_special_ids(json, model.vocab_size) or special_ids(tokenizer)
    template = ChatTemplate.read(bundle.path)
    return Checkpoint(
        *(model, state, tokenizer, manifest.lineage, None, special, template),
        task=manifest.task,
    )


def _plain(graph: ir.Graph) -> Iterator[tuple[str, Any]]:
    """Parameters stored as they are; the matrix of a product is turned back to [out, in]."""
    turned = {str(product.weight.name) for product in products(graph) if not product.transpose}
    for name, value in graph.initializers.items():
        if name.startswith(PARAMETER_PREFIX):
            values = _array(value)
            yield name.removeprefix(PARAMETER_PREFIX), values.T if name in turned else values


def _quantized(
    graph: ir.Graph, wanted: Mapping[str, torch.nn.Parameter]
) -> Iterator[tuple[str, Any]]:
    """Parameters stored in blocks, [out, in], or their parts."""
    for node in graph:
        if node.op_type not in _MATRIX_INPUT:
            continue
        packed = node.inputs[_MATRIX_INPUT[node.op_type]]
        assert packed is not None
        stored = str(packed.name).partition(PACKED_SUFFIX)[0]
        name = stored.removeprefix(PARAMETER_PREFIX)
        parameter = parameter_of(name)
        columns = wanted[parameter if parameter in wanted else "wte.weight"].shape[1]
        ends = (SCALES_SUFFIX, ZEROS_SUFFIX)
        scales, zeros = (graph.initializers.get(stored + end) for end in ends)
        if scales is None:
            continue  # not a bundle of ours: the parameter will be found missing
        bits, size = (node.attributes[key].as_int() for key in ("bits", "block_size"))
        fmt = BlockFormat(bits, size, symmetric=zeros is None)
        steps = _array(scales).astype(np.float32)
        own_zeros = None if zeros is None else unpack(_array(zeros), bits)[:, : steps.shape[1]]
        matrix = BlockMatrix(fmt, columns, _array(packed), steps, own_zeros)
        yield name, matrix.dequantize()


def _joined(found: Mapping[str, Any]) -> dict[str, Any]:
    """Whole parameters of their parts."""
    return {
        parameter: np.concatenate([found[name] for name in parts_of(parameter, found)])
        for parameter in map(parameter_of, found)
    }


def _array(value: ir.Value) -> Any:
    tensor = value.const_value
    assert tensor is not None
    if not isinstance(tensor, ir.ExternalTensor):
        return tensor.numpy()
    # Read here: onnx_ir refuses a file that has two hard links, which installers like to give it.
    # Its hash is known by now.
    shape, dtype = tuple(tensor.shape.numpy()), tensor.dtype.numpy()
    file = Path(tensor.base_dir) / GRAPH_DATA_FILE
    return np.memmap(file, dtype, mode="r", offset=tensor.offset or 0, shape=shape)
