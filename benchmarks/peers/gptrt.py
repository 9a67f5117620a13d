"""gptrt: Generator for one row, Decoder under it for several."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from .worker import Rows, Step, call, main

_TEXT = "It was the best of times, it was the worst of times.\n" * 40


def build(checkpoint: Path, out: Path, settings: dict[str, Any]) -> None:
    """Through the command line, as users do. Without `calibration-text` weights are random, and no
    text could correct their errors."""
    rounded = settings.get("quantize") not in ("none", "fp16")
    random = rounded and "calibration-text" not in settings
    options = {"method": "nearest"} | settings if random else settings
    text = out.with_suffix(".txt")
    text.write_text(_TEXT)
    arguments = [str(part) for key, value in options.items() for part in (f"--{key}", value)]
    command = [sys.executable, "-c", "from gptrt_export.cli import main; main()", "convert"]
    command += [str(checkpoint), "--out", str(out), *arguments]
    command += ["--verify-text", str(text), "--allow-loss", "--json"]
    call(command)


class Gptrt:
    def __init__(self, path: Path, threads: int, context: int) -> None:
        del context  # the cache is made as long as the call needs it
        from gptrt import Generator

        opened = Generator(path, device="cpu", threads=threads)
        self._decoder = opened.decoder
        # Every round reads its prompt anew, and no id ends a text.
        endless = opened.tokenizer.endless()
        self._generator = Generator.from_parts(self._decoder, endless, reuse="none")

    def generate(self, rows: Rows, new: int, step: Step) -> None:
        if len(rows) == 1:
            for _ in self._generator.tokens(rows[0], max_new_tokens=new):
                step()
            return
        cache = self._decoder.new_cache(len(rows[0]) + new, len(rows))
        for _ in range(new):
            rows = self._decoder.run(rows, cache)[:, -1].argmax(axis=-1)[:, None].tolist()
            step()

    def logits(self, ids: list[int]) -> Any:
        return self._decoder.run([ids], self._decoder.new_cache(len(ids)), keep=0)[0]


if __name__ == "__main__":
    main(build, Gptrt)
