"""Whether a row of a batch has the bits of the same row alone, by the kernel for each format.

    python -m benchmarks.exact

A product with random weights in each format that `gptrt-export convert` makes, in the three shapes
of a small model's matrices, on one thread: the largest difference between rows of a batch and the
same rows one by one, over the largest result. 0 is the same, to the last bit.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import date
from importlib.metadata import version

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper
from onnx.helper import make_graph, make_model, make_node, make_opsetid, make_tensor_value_info

Float = NDArray[np.float32]

_ROWS = 8
_SHAPES = ((512, 1536), (1024, 512), (512, 7168))  # [in, out]
_BLOCKS = (32, 64, 128, 256)


def main() -> None:
    print(f"{date.today()}; onnxruntime {version('onnxruntime')}\n")
    print("| bits | " + " | ".join(f"block {size}" for size in _BLOCKS) + " |")
    print("|---" * (1 + len(_BLOCKS)) + "|")
    for bits in (8, 4, 2):
        cells = (max(difference(*shape, bits, size) for shape in _SHAPES) for size in _BLOCKS)
        print(f"| {bits} | " + " | ".join(f"{cell:.0e}" if cell else "0" for cell in cells) + " |")


def difference(columns: int, rows: int, bits: int, block_size: int) -> float:
    """Of batches of 2 to 8 rows."""
    compute = product(columns, rows, bits, block_size)
    x = np.random.default_rng(0).standard_normal((_ROWS, columns), np.float32)
    alone = np.concatenate([compute(x[n : n + 1]) for n in range(_ROWS)])
    apart = [np.abs(compute(x[:n]) - alone[:n]).max() for n in range(2, _ROWS + 1)]
    return float(max(apart) / np.abs(alone).max())


def product(columns: int, rows: int, bits: int, block_size: int) -> Callable[[Float], Float]:
    """x [n, columns] to [n, rows]."""
    random = np.random.default_rng(1)
    blocks = columns // block_size
    packed = random.integers(0, 256, (rows, blocks, block_size * bits // 8), np.uint8)
    scales = 0.01 * random.random((rows, blocks), np.float32)
    node = make_node(
        *("MatMulNBits", ["x", "packed", "scales"], ["y"]),
        domain="com.microsoft",
        K=columns,
        N=rows,
        bits=bits,
        block_size=block_size,
        accuracy_level=4,
    )
    graph = make_graph(
        *([node], "product"),
        [make_tensor_value_info("x", TensorProto.FLOAT, ["n", columns])],
        [make_tensor_value_info("y", TensorProto.FLOAT, ["n", rows])],
        [numpy_helper.from_array(packed, "packed"), numpy_helper.from_array(scales, "scales")],
    )
    opsets = [make_opsetid("", 21), make_opsetid("com.microsoft", 1)]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    model = make_model(graph, opset_imports=opsets, ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)

    def compute(x: Float) -> Float:
        y: Float = session.run(["y"], {"x": x})[0]
        return y

    return compute


if __name__ == "__main__":
    main()
