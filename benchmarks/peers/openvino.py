"""OpenVINO GenAI: LLMPipeline over a folder that optimum-intel has written."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from .worker import Rows, Step, call, main


def build(checkpoint: Path, out: Path, settings: dict[str, Any]) -> None:
    """Through `optimum-cli`, as its documents show; the scales are symmetric, its faster form."""
    program = Path(sys.executable).with_name("optimum-cli")
    command = [str(program), "export", "openvino", "--task", "text-generation-with-past"]
    command += ["--model", str(checkpoint)]
    command += [str(part) for key, value in settings.items() for part in (f"--{key}", value)]
    if settings["weight-format"] == "int4":
        command += ["--ratio", "1.0", "--sym"]
    call([*command, str(out)])


class OpenVino:
    def __init__(self, path: Path, threads: int, context: int, **properties: Any) -> None:
        del context  # the cache grows
        import numpy as np
        import openvino
        import openvino_genai

        self._np, self._openvino, self._genai = np, openvino, openvino_genai
        properties |= {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
        self._pipeline = openvino_genai.LLMPipeline(str(path), "CPU", **properties)

    def generate(self, rows: Rows, new: int, step: Step) -> None:
        config = self._genai.GenerationConfig()
        config.max_new_tokens = new
        config.ignore_eos = True
        config.do_sample = False
        ids = self._np.array(rows, self._np.int64)
        inputs = self._genai.TokenizedInputs(
            self._openvino.Tensor(ids), self._openvino.Tensor(self._np.ones_like(ids))
        )
        self._pipeline.generate(inputs, config, _streamer(self._genai, step))


def _streamer(genai: Any, step: Step) -> Any:
    """Its streamer for ids, which must be a class derived from its own."""

    class Streamer(genai.StreamerBase):  # type: ignore[misc]
        def write(self, token: Any) -> Any:
            for _ in token if isinstance(token, list) else [token]:
                step()
            return genai.StreamingStatus.RUNNING

        def end(self) -> None:
            pass

    return Streamer()


if __name__ == "__main__":
    main(build, OpenVino)
