"""CTranslate2, streamed through the callback of `generate_batch`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from .worker import Rows, Step, main


def build(checkpoint: Path, out: Path, settings: dict[str, Any]) -> None:
    """Its converter for Hugging Face folders."""
    from ctranslate2.converters import TransformersConverter

    TransformersConverter(str(checkpoint)).convert(str(out), **settings)
    config = json.loads((out / "config.json").read_text())
    config["unk_token"] = config["unk_token"] or config["eos_token"]  # without one it does not load
    (out / "config.json").write_text(json.dumps(config))


class CTranslate2:
    def __init__(self, path: Path, threads: int, context: int, compute_type: str) -> None:
        del context  # it grows
        for name in ("torch", "transformers"):  # imported for the converter alone: see as absent
            sys.modules[name] = None  # type: ignore[assignment]
        import ctranslate2

        self._words: list[str] = json.loads((path / "vocabulary.json").read_text())
        self._generator = ctranslate2.Generator(
            str(path),
            device="cpu",
            compute_type=compute_type,
            intra_threads=threads,
            inter_threads=1,
        )

    def generate(self, rows: Rows, new: int, step: Step) -> None:
        last = len(rows) - 1

        def told(result: Any) -> bool:
            if result.batch_id == last:
                step()
            return False

        self._generator.generate_batch(
            [[self._words[i] for i in row] for row in rows],
            min_length=new,
            max_length=new,
            sampling_topk=1,
            include_prompt_in_result=False,
            callback=told,
        )


if __name__ == "__main__":
    main(build, CTranslate2)
