"""Progress of long work: a bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from rich import progress as bars
from rich.console import Console

_LINE_EVERY_S = 10.0

Progress = Callable[[float, str], None]  # share of the work done, what it is


def silent(share: float, note: str) -> None:
    """Progress that nobody looks at."""
    del share, note


def within(progress: Progress, first: float, last: float, what: str = "") -> Progress:
    """The progress of a part of the work: its shares lie from `first` to `last` of the whole."""

    def part(share: float, note: str) -> None:
        progress(first + share * (last - first), f"{what}, {note}" if what else note)

    return part


class ProgressBar:
    """Use as a context; `update` as often as you like."""

    def __init__(self, title: str, *, quiet: bool = False) -> None:
        self._title = title
        self._quiet = quiet
        self._last_line = time.monotonic()
        self._bar: bars.Progress | None = None
        self._task: bars.TaskID | None = None
        if sys.stderr.isatty() and not quiet:
            self._bar = bars.Progress(
                bars.TextColumn("{task.description}"),
                bars.BarColumn(),
                bars.TextColumn("{task.percentage:>3.0f}%  {task.fields[note]}"),
                bars.TimeRemainingColumn(),
                console=Console(stderr=True),
            )
            self._task = self._bar.add_task(title, total=1.0, note="")

    def __enter__(self) -> Self:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar:
            self._bar.stop()

    def update(self, share: float, note: str) -> None:
        """`share` of the work is done, 0 to 1."""
        if self._bar and self._task is not None:
            self._bar.update(self._task, completed=min(share, 1.0), note=note)
        elif not self._quiet and time.monotonic() - self._last_line >= _LINE_EVERY_S:
            self._last_line = time.monotonic()
            self.say(f"{self._title} {share:4.0%}  {note}")

    def say(self, line: str) -> None:
        """A line that stays."""
        if self._bar:
            self._bar.console.print(line, highlight=False)
        elif not self._quiet:
            print(line, file=sys.stderr, flush=True)
