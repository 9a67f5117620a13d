"""What optimum and transformers share: `generate` with a streamer."""

from __future__ import annotations

from typing import Any

from .worker import Rows, Step


def generate(model: Any, rows: Rows, new: int, step: Step) -> None:
    """Greedy, past any end of text."""
    import torch

    ids = torch.tensor(rows)
    with torch.inference_mode():
        model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            min_new_tokens=new,
            max_new_tokens=new,
            do_sample=False,
            pad_token_id=0,
            streamer=_Streamer(step),
        )


class _Streamer:
    """Told of the prompt first and then of every step."""

    def __init__(self, step: Step) -> None:
        self._step = step
        self._begun = False

    def put(self, value: Any) -> None:
        del value
        if self._begun:
            self._step()
        self._begun = True

    def end(self) -> None:
        pass
