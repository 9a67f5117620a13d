"""optimum-onnx: ORTModelForCausalLM, in fp32 and with dynamically quantized products."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from . import hugging_face
from .worker import Rows, Step, main


def build(checkpoint: Path, out: Path, settings: dict[str, Any]) -> None:
    """Its export, and its quantizer for AVX-512 VNNI."""
    from optimum.onnxruntime import ORTModelForCausalLM, ORTQuantizer
    from optimum.onnxruntime.configuration import AutoQuantizationConfig

    full = out / "full" if settings.get("quantize") else out
    ORTModelForCausalLM.from_pretrained(str(checkpoint), export=True).save_pretrained(str(full))
    if settings.get("quantize"):
        config = AutoQuantizationConfig.avx512_vnni(is_static=False, per_channel=False)
        quantizer = ORTQuantizer.from_pretrained(str(full), file_name="model.onnx")
        quantizer.quantize(save_dir=str(out), quantization_config=config)
        shutil.copy(full / "generation_config.json", out)
        shutil.rmtree(full)


class Optimum:
    def __init__(self, path: Path, threads: int, context: int) -> None:
        del context  # the cache grows
        import onnxruntime
        from optimum.onnxruntime import ORTModelForCausalLM

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        (file,) = path.glob("*.onnx")
        self._model = ORTModelForCausalLM.from_pretrained(
            str(path), file_name=file.name, session_options=options, use_io_binding=True
        )

    def generate(self, rows: Rows, new: int, step: Step) -> None:
        hugging_face.generate(self._model, rows, new, step)


if __name__ == "__main__":
    main(build, Optimum)
