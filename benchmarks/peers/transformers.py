"""transformers in PyTorch, eager, with its default attention."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from . import hugging_face
from .worker import Rows, Step, main


def build(checkpoint: Path, out: Path, settings: dict[str, Any]) -> None:
    """The same weights in the type that they are computed in."""
    _load(checkpoint, dtype=settings["dtype"]).save_pretrained(str(out))


def _load(path: Path, **options: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(str(path), local_files_only=True, **options)


class Transformers:
    def __init__(self, path: Path, threads: int, context: int) -> None:
        del context  # the cache grows
        import torch

        torch.set_num_threads(threads)
        self._torch = torch
        self._model = _load(path, dtype="auto").eval()

    def generate(self, rows: Rows, new: int, step: Step) -> None:
        hugging_face.generate(self._model, rows, new, step)

    def logits(self, ids: list[int]) -> Any:
        with self._torch.inference_mode():
            return self._model(self._torch.tensor([ids])).logits[0].float().numpy()


if __name__ == "__main__":
    main(build, Transformers)
