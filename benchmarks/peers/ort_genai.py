"""onnxruntime-genai: models of its own builder, and bundles of ours."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from .worker import Rows, Step, call, main


def build(checkpoint: Path, out: Path, settings: dict[str, Any]) -> None:
    """Its model builder, with its default 4-bit format."""
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(checkpoint)]
    command += ["-o", str(out), "-c", str(out / "cache"), "-p", "int4", "-e", "cpu"]
    command += ["--extra_options", *(f"int4_{key}={value}" for key, value in settings.items())]
    call(command)


class OrtGenai:
    def __init__(self, path: Path, threads: int, context: int) -> None:
        del context  # the cache is made as long as the call needs it
        import onnxruntime_genai

        self._genai = onnxruntime_genai
        config = onnxruntime_genai.Config(str(path))
        options = {"intra_op_num_threads": threads}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
        self._model = onnxruntime_genai.Model(config)

    def generate(self, rows: Rows, new: int, step: Step) -> None:
        parameters = self._genai.GeneratorParams(self._model)
        length = len(rows[0]) + new
        parameters.set_search_options(
            max_length=length, min_length=length, do_sample=False, batch_size=len(rows)
        )
        generator = self._genai.Generator(self._model, parameters)
        generator.append_tokens(rows[0] if len(rows) == 1 else rows)
        for _ in range(new):
            generator.generate_next_token()
            generator.get_next_tokens()
            step()


if __name__ == "__main__":
    main(build, OrtGenai)
