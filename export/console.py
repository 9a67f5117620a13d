"""What the commands of `gptrt-export` share."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from gptrt.errors import OptionError

PATH = click.Path(path_type=Path)


def pairs(option: str, words: tuple[str, ...]) -> dict[str, str]:
    """Of an option given as KEY=VALUE, several times. Raises OptionError."""
    for word in words:
        if "=" not in word:
            raise OptionError(f"{option} KEY=VALUE", found=word, do="add the value")
    return dict(word.split("=", 1) for word in words)


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


def report(summary: dict[str, Any], as_json: bool) -> None:
    """One JSON object, or a line for each value."""
    if as_json:
        click.echo(json.dumps(summary))
    else:
        for key, value in summary.items():
            click.echo(f"{key:22} {value:.5g}" if isinstance(value, float) else f"{key:22} {value}")
