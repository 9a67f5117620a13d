"""A bundle as a checkpoint: its quantized matrices made fp32 again, to be fine-tuned further.

What comes back is the model that the bundle computes, rounding included. At 8 bits that is the
trained model to three digits, so a bundle can be shipped alone and still be taught.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from gptrt.errors import CheckpointError
from gptrt.format import GRAPH_FILE, MANIFEST_FILE, TOKENIZER_FILE, open_bundle

from .checkpoint import Checkpoint, load_checkpoint
from .graph import PARAMETER_PREFIX
from .model import GPT
from .quantize import PACKED_SUFFIX, BlockFormat, BlockMatrix, products
from .tokenization import load_tokenizer


def load_checkpoint_or_bundle(path: Path) -> Checkpoint:
    """What `--from` takes: a run, a Hugging Face folder, or a bundle of ours."""
    return load_bundle(path) if (path / MANIFEST_FILE).is_file() else load_checkpoint(path)


def load_bundle(path: Path) -> Checkpoint:
    """The checkpoint that a bundle holds. Raises BundleError, and CheckpointError for a graph
    that was not made by us."""
    bundle = open_bundle(path)
    manifest = bundle.manifest
    graph = ir.load(bundle.file(GRAPH_FILE)).graph
    found = dict(_plain(graph)) | dict(_quantized(graph))
    with torch.device("meta"):
        wanted = dict(GPT(manifest.model).named_parameters())
    if "wte.weight" not in found:  # tied, it bears one of its two names
        found["wte.weight"] = found.pop("lm_head.weight", None)
    if missing := [name for name in wanted if found.get(name) is None]:
        raise CheckpointError(
            f"every parameter of the model in {path}",
            found=f"no {', '.join(missing)}",
            do="fine-tune the checkpoint that it was made from",
        )
    state = {n: torch.from_numpy(np.array(found[n], np.float32, order="C")) for n in wanted}
    if manifest.model.tied:
        state["lm_head.weight"] = state["wte.weight"]
    tokenizer = load_tokenizer(bundle.file(TOKENIZER_FILE))
    return Checkpoint(manifest.model, state, tokenizer, manifest.lineage)


def _plain(graph: ir.Graph) -> Iterator[tuple[str, Any]]:
    """Parameters stored as they are; the matrix of a product is turned back to [out, in]."""
    turned = {str(product.weight.name) for product in products(graph) if not product.transpose}
    for name, value in graph.initializers.items():
        if name.startswith(PARAMETER_PREFIX):
            values = _array(value)
            yield name.removeprefix(PARAMETER_PREFIX), values.T if name in turned else values


def _quantized(graph: ir.Graph) -> Iterator[tuple[str, Any]]:
    """Parameters stored in blocks, [out, in]."""
    for node in graph:
        if node.op_type == "MatMulNBits" and node.inputs[1] is not None and node.inputs[2]:
            fmt = BlockFormat(
                node.attributes["bits"].as_int(), node.attributes["block_size"].as_int()
            )
            packed, scales = (_array(value) for value in node.inputs[1:3] if value is not None)
            matrix = BlockMatrix(fmt, node.attributes["K"].as_int(), packed, scales)
            name = str(node.inputs[1].name).removesuffix(PACKED_SUFFIX)
            yield name.removeprefix(PARAMETER_PREFIX), matrix.dequantize()


def _array(value: ir.Value) -> Any:
    assert value.const_value is not None
    return value.const_value.numpy()
