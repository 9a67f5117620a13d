"""Text for perplexity: the same ids in the same windows for everyone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from .models import Checkpoint


def write_windows(
    checkpoint: Checkpoint, paths: Sequence[Path], window: int, count: int, work: Path
) -> Path:
    """An array [count, window + 1] of ids: each row predicts `window` of them, all but its first.

    Files are joined by the end-of-text token, typographic punctuation is made plain, and rows
    share the one id at which they meet.
    """
    from gptrt_export.tokenization import END_OF_TEXT, PLAIN_PUNCTUATION, load_tokenizer

    tokenizer = load_tokenizer(checkpoint.path / "tokenizer.json")
    plain = str.maketrans(PLAIN_PUNCTUATION)
    end = tokenizer.token_to_id(END_OF_TEXT)
    ids: list[int] = []
    for path in paths:
        ids += tokenizer.encode(path.read_text(encoding="utf-8").translate(plain)).ids
        ids += [] if end is None else [end]
    count = min(count, (len(ids) - 1) // window)
    rows = np.array([ids[i * window : (i + 1) * window + 1] for i in range(count)], np.int64)
    target = work / f"{checkpoint.name}-windows.npy"
    np.save(target, rows)
    return target.resolve()
