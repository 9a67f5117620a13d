"""Where a run's batches come from: windows of text, or the examples of its task."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from .data import Batch, Windows, in_order, open_ids
from .examples import Examples
from .runs import Run


class Source(Protocol):
    """Where batches come from."""

    def batches(self, step: int, size: int, count: int) -> Iterator[Batch]: ...
    def in_order(self, size: int, tokens: int) -> Iterator[Batch]: ...


@dataclass(frozen=True)
class Texts:
    """Batches of windows of text."""

    windows: Windows

    def batches(self, step: int, size: int, count: int) -> Iterator[Batch]:
        numbers = range(step * count, (step + 1) * count)
        return (Batch.whole(self.windows.batch(number, size)) for number in numbers)

    def in_order(self, size: int, tokens: int) -> Iterator[Batch]:
        """Full batches that hold `tokens`, from all over the text."""
        ids, length = self.windows.ids, self.windows.length
        batches = -(-tokens // (length * size))
        return map(Batch.whole, in_order(ids, length, size, batches * size))


def open_sources(run: Run) -> tuple[Source, Source]:
    """What a run trains on, and what it is judged by. Raises DataError for too little of either."""
    config = run.config.train
    if run.config.task is None:
        train, valid = (
            Texts(Windows(open_ids(path), config.seq_len, config.seed))
            for path in (run.train_ids, run.valid_ids)
        )
        return train, valid
    examples = Examples.open(
        *(run.train_ids, config.seq_len, config.seed),
        prompt_share=config.prompt_share,
        class_weights=run.config.class_weights,
    )
    return examples, Examples.open(run.valid_ids, config.seq_len, config.seed)
