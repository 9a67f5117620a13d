"""How much memory a bundle will take, before it is opened."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from gptrt.architecture import ForeignModel, ModelConfig
from gptrt.decoder import cache_bytes
from gptrt.errors import OptionError
from gptrt.format import Manifest, read_manifest
from gptrt.reading import LONGEST_PASS

# Measured with benchmarks/memory.py on Linux, CPython 3.11, onnxruntime 1.32, GPT-2 124M and 355M.
RUNTIME = 85_000_000  # the interpreter, numpy, onnxruntime and its session
_TOKENIZER = 240  # an entry
_KEPT = 1.12  # of the weights: packed for the kernels, the embedding's rows beside them


@dataclass(frozen=True)
class MemoryEstimate:
    """In bytes, within a tenth: libraries and tokenizer, weights, keys and values, and what the
    longest pass over a prompt needs."""

    runtime: int
    weights: int
    cache: int
    passes: int

    @property
    def total(self) -> int:
        return self.runtime + self.weights + self.cache + self.passes


def estimate(
    path: str | os.PathLike[str], *, max_length: int | None = None, batch: int = 1
) -> MemoryEstimate:
    """What a process needs that opens the bundle at `path` and continues `batch` prompts at a time,
    prompt and new ids together `max_length` (default: the context). Only the manifest is read.

    Raises BundleError, and OptionError for a length that the context has not.
    """
    manifest = read_manifest(Path(path))
    context = manifest.model.n_positions
    length = context if max_length is None else max_length
    if not 1 <= length <= context or batch < 1:
        raise OptionError(
            f"max_length from 1 to {context} and batch of 1 or more",
            found=f"{length} and {batch}",
            do="correct them",
        )
    return MemoryEstimate(
        runtime=RUNTIME + _TOKENIZER * manifest.model.vocab_size,
        weights=int(_KEPT * manifest.weights_bytes),
        cache=cache_bytes(manifest.cache, length, batch),
        passes=_pass_bytes(manifest, length, batch),
    )


def _pass_bytes(manifest: Manifest, length: int, batch: int) -> int:
    """Activations of the longest pass, its attention, and the logits of a step, in float32: once,
    though more is kept for the next pass, as what opening took at its peak is free by then."""
    model, new = manifest.model, min(length, LONGEST_PASS)
    width, inner, heads = _widths(model, manifest)
    values = new * (8 * width + 2 * inner) + heads * new * length + batch * model.vocab_size
    return 4 * values


def _widths(model: ModelConfig | ForeignModel, manifest: Manifest) -> tuple[int, int, int]:
    """n_embd, n_inner and heads; of a foreign model what its cache lets guess."""
    if isinstance(model, ModelConfig):
        return model.n_embd, model.n_inner, model.n_head
    width = manifest.cache.kv_heads * manifest.cache.head_dim
    return width, 4 * width, manifest.cache.kv_heads
