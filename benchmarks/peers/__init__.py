"""The peers: which runtimes are measured, in which kinds, and with which settings.

One line of `PEERS` is one runtime. Its adapter is the file here of the same name, which runs in a
process and, where there is one, in an environment of its own, and imports that runtime alone.
Every kind is the best that the runtime's own documents advise, at 4 bits or more. What text to
calibrate with can make of it counts in perplexity alone: ours, and llama.cpp's importance matrix.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import product
from typing import Any

Settings = dict[str, Any]


@dataclass(frozen=True)
class Kind:
    """One form of the weights. `build` and `options` go to the adapter as they are.

    `choices` are settings between which the suite decides by a trial on the model itself.
    `borrows` names the kind of ours whose files are run instead of files of its own. `cache_bits`
    is what a value of its KV cache takes.
    """

    name: str
    bits: int
    build: Settings = field(default_factory=dict)
    options: Settings = field(default_factory=dict)
    choices: tuple[Settings, ...] = ({},)
    families: tuple[str, ...] = ("gpt2", "llama")
    cache_bits: int = 32
    curves: bool = False  # drawn against context, batch and size
    borrows: str = ""
    scores: bool = False  # whether its adapter gives the logits of all positions
    speed: bool = True


@dataclass(frozen=True)
class Peer:
    """`needs` are what pip installs for it; of the first ones, `shown`, versions are reported."""

    name: str
    adapter: str
    needs: tuple[str, ...]
    kinds: tuple[Kind, ...]
    shown: int = 1
    without: tuple[str, ...] = ()  # comes along, is not needed and does harm
    batches: bool = True  # whether its streaming takes several rows

    @property
    def packages(self) -> list[str]:
        """Names without extras and versions."""
        return [need.split("[")[0].split("==")[0] for need in self.needs]


_ALL = ("gpt2", "llama", "gptrt")  # the last one holds every shape and only we read it
_TORCH = "torch==2.13.0"  # its wheels are for the CPU alone
_LLAMA: Settings = {
    "choices": tuple(
        {"flash_attention": flash, "n_ubatch": size}
        for flash, size in product((False, True), (128, 512))
    ),
    "cache_bits": 16,
    "scores": True,
}
_OPENVINO: Settings = {
    "choices": ({"ATTENTION_BACKEND": "SDPA"}, {"ATTENTION_BACKEND": "PA"}),
    "cache_bits": 8,
}

PEERS = (
    Peer(
        "gptrt",
        "gptrt",
        ("gptrt[cpu,export]", "onnxruntime"),
        (
            Kind("int4", 4, {"quantize": "int4"}, families=_ALL, curves=True, scores=True),
            Kind(
                "int4 with int8 head",
                4,
                {"quantize": "int4", "head-bits": 8},
                families=_ALL,
                scores=True,
            ),
            Kind(
                "int4 throughout",
                4,
                {"quantize": "int4", "head-bits": 4},
                families=_ALL,
                scores=True,
            ),
            Kind("int8", 8, {"quantize": "int8"}, families=_ALL, curves=True, scores=True),
            Kind("int2", 2, {"quantize": "int2"}),  # for models trained for it: speed alone
        ),
        shown=2,
    ),
    Peer(
        "llama.cpp",
        "llamacpp",
        ("llama-cpp-python", "gguf", "safetensors"),
        (
            Kind("Q4_0", 4, {"type": "Q4_0"}, **_LLAMA, curves=True),
            Kind("Q4_K_M", 4, {"type": "Q4_K_M"}, **_LLAMA),
            Kind("Q4_0 imatrix", 4, {"type": "Q4_0", "imatrix": True}, **_LLAMA, speed=False),
            Kind("Q4_K_M imatrix", 4, {"type": "Q4_K_M", "imatrix": True}, **_LLAMA, speed=False),
            Kind("Q8_0", 8, {"type": "Q8_0"}, **_LLAMA, curves=True),
            Kind("F32", 32, {"type": "F32"}, **_LLAMA, speed=False),
        ),
    ),
    Peer(
        "onnxruntime-genai",
        "ort_genai",
        ("onnxruntime-genai", "onnxruntime", _TORCH, "transformers", "onnx", "onnx-ir"),
        (
            Kind("int4 of gptrt", 4, borrows="int4"),
            Kind("int4", 4, {"block_size": 32, "accuracy_level": 4}, families=("llama",)),
        ),
        shown=2,
    ),
    Peer(
        "CTranslate2",
        "ctranslate2",
        ("ctranslate2", _TORCH, "transformers"),
        (Kind("int8", 8, {"quantization": "int8"}, {"compute_type": "int8"}, curves=True),),
    ),
    Peer(
        "OpenVINO GenAI",
        "openvino",
        ("openvino-genai", "optimum-intel[openvino]", _TORCH),
        (
            Kind("int4", 4, {"weight-format": "int4", "group-size": 64}, **_OPENVINO),
            Kind("int8", 8, {"weight-format": "int8"}, **_OPENVINO),
        ),
        shown=2,
        without=("torchvision",),  # its wheels are for another torch than the CPU's
        batches=False,
    ),
    Peer(
        "optimum-onnx",
        "optimum",
        ("optimum-onnx[onnxruntime]", "onnxruntime", _TORCH),
        (
            Kind("fp32", 32),
            Kind("dynamic int8", 8, {"quantize": True}),
        ),
        shown=2,
    ),
    Peer(
        "transformers",
        "transformers",
        ("transformers", _TORCH),
        (
            Kind("fp32", 32, {"dtype": "float32"}, scores=True),
            Kind("bf16", 16, {"dtype": "bfloat16"}, cache_bits=16),
        ),
        shown=2,
    ),
)
OURS = PEERS[0]
