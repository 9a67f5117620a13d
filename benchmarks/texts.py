"""Text for perplexity, and to calibrate with: the same ids in the same windows for everyone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .models import Checkpoint

_CALIBRATION_TOKENS = 1 << 16  # as many as gptrt takes for a model of 10 million parameters

# What reads the inputs of a product of ours, in a GGUF file of GPT-2 or of Llama.
_READERS = {
    "attn.c_attn": ("attn_qkv", "attn_q", "attn_k", "attn_v"),
    "attn.c_proj": ("attn_output",),
    "mlp.c_fc": ("ffn_gate", "ffn_up"),
    "mlp.c_proj": ("ffn_down",),
}


def write_windows(
    checkpoint: Checkpoint, paths: Sequence[Path], window: int, count: int, work: Path
) -> Path:
    """An array [count, window + 1] of ids: each row predicts `window` of them, all but its first.

    Rows share the one id at which they meet.
    """
    ids = _read(checkpoint, paths)
    count = min(count, (len(ids) - 1) // window)
    rows = np.array([ids[i * window : (i + 1) * window + 1] for i in range(count)], np.int64)
    target = work / f"{checkpoint.name}-windows.npy"
    np.save(target, rows)
    return target.resolve()


def write_importance(checkpoint: Checkpoint, path: Path, window: int, work: Path) -> Path:
    """llama.cpp's importance matrix: of each product's inputs the mean square over a text, by the
    names of GGUF's tensors, float32 [in].

    Of the products in blocks alone, as `llama-imatrix` has it.
    """
    import torch
    from gptrt_export.checkpoint import load_checkpoint
    from gptrt_export.data import spread_windows

    model = load_checkpoint(checkpoint.path).model().eval()
    found: dict[str, NDArray[np.float32]] = {}

    def remember(names: list[str]) -> Any:
        def hook(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            del module
            squares = inputs[0].square().sum(dim=(0, 1)).numpy()
            for name in names:
                found[name] = found.get(name, np.float32(0)) + squares

        return hook

    for number, block in enumerate(model.h):
        for product, readers in _READERS.items():
            names = [f"blk.{number}.{reader}.weight" for reader in readers]
            block.get_submodule(product).register_forward_pre_hook(remember(names))
    ids = np.array(_read(checkpoint, [path]), np.uint32)
    windows = torch.from_numpy(spread_windows(ids, window, _CALIBRATION_TOKENS))
    with torch.no_grad():
        for rows in windows.split(16):
            model.hidden(rows)
    target = work / f"{checkpoint.name}-importance.npz"
    np.savez(target, **{name: sums / windows.numel() for name, sums in found.items()})
    return target.resolve()


def _read(checkpoint: Checkpoint, paths: Sequence[Path]) -> list[int]:
    """Files are joined by the end-of-text token, and typographic punctuation is made plain."""
    from gptrt_export.tokenization import END_OF_TEXT, PLAIN_PUNCTUATION, load_tokenizer

    tokenizer = load_tokenizer(checkpoint.path / "tokenizer.json")
    plain = str.maketrans(PLAIN_PUNCTUATION)
    end = tokenizer.token_to_id(END_OF_TEXT)
    ids: list[int] = []
    for path in paths:
        ids += tokenizer.encode(path.read_text(encoding="utf-8").translate(plain)).ids
        ids += [] if end is None else [end]
    return ids
