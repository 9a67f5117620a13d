"""A stream: pieces of text as they come, and what they come to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Self

from gptrt.results import Generation


class Stream(Iterator[str]):
    """Pieces of text as they come, each as soon as its characters are whole.

    It may be left at any time; `close`, or the end of a `with` block, lets go of what it holds.
    """

    def __init__(self, pieces: Iterator[str], result: Callable[[], Generation]) -> None:
        self._pieces, self._result = pieces, result

    def __next__(self) -> str:
        return next(self._pieces)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """End it here. From another thread use a `Cancellation`."""
        self._pieces.close()  # type: ignore[attr-defined]

    @property
    def result(self) -> Generation:
        """What came so far; at the end, what `complete` gives. A stream that was left before it is
        "cancelled"."""
        return self._result()
