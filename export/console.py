"""What the commands of `gptrt-export` share."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import click


@contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Ctrl-C or a polite kill asks the loop to save and stop; a second Ctrl-C stops at once."""
    asked = False

    def ask(signum: int, _frame: object) -> None:
        nonlocal asked
        if asked and signum == signal.SIGINT:
            raise KeyboardInterrupt
        asked = True

    before = {s: signal.signal(s, ask) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: asked
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def say(line: str) -> None:
    """For people: standard output is for results."""
    click.echo(line, err=True)
