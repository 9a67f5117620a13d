"""What both commands, `gptrt` and `gptrt-export`, are made of: errors in one line, pipes that are
closed early, results for people and for programs, how far a long table is."""

from __future__ import annotations

import io
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from gptrt.errors import GptrtError, OptionError, TargetError

INTERRUPTED, CLOSED_PIPE = 130, 141  # 128 + the signal: what a shell expects of them
PATH = click.Path(path_type=Path)


class OneLineErrors(click.Group):
    """Errors as one line on standard error, with the exit status of their kind."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        try:
            if sys.stdout is None:  # closed by who started this
                raise TargetError(
                    "an open standard output", found="a closed one", do="leave it open"
                )
            return super().main(*args, **kwargs | {"standalone_mode": False})
        except GptrtError as e:
            message, status = str(e), e.exit_status
        except click.ClickException as e:
            message, status = f"{e.format_message().rstrip('.')}; see `{self.name} --help`", 2
        except ModuleNotFoundError as e:
            extras = "gptrt[cpu]" if self.name == "gptrt" else "gptrt[cpu,export]"
            message = f"wanted the package {e.name}; found it missing; pip install '{extras}'"
            status = 2
        except OSError as e:
            place = e.filename or "standard output"
            message, status = f"wanted to read or write {place}; found {e.strerror}", 2
            message += "; check that it is there, that it may be used, and that the disk has room"
        except (click.Abort, KeyboardInterrupt):
            sys.exit(INTERRUPTED)
        click.echo(f"{self.name}: error: {' '.join(message.split())}", err=True)
        sys.exit(status)

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        with _pipe():  # --help prints here
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: click.Context) -> Any:
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="replace")  # a narrow encoding must not end a stream
        with _pipe():
            result = super().invoke(ctx)
            sys.stdout.flush()
            return result


@contextmanager
def _pipe() -> Iterator[None]:
    """Ends quietly where whoever read has had enough."""
    try:
        yield
    except BrokenPipeError:
        # Python would flush once more at its end, and complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(CLOSED_PIPE)


def pairs(option: str, words: tuple[str, ...]) -> dict[str, str]:
    """Of an option given as KEY=VALUE, several times. Raises OptionError."""
    for word in words:
        if "=" not in word.rstrip("="):
            raise OptionError(f"{option} KEY=VALUE", found=word, do="add the value")
    return dict(word.split("=", 1) for word in words)


def report(summary: Mapping[str, Any], as_json: bool) -> None:
    """One JSON object, or a line for each value."""
    if as_json:
        click.echo(json.dumps(summary))
        return
    for key, value in summary.items():
        shown = f"{value:.5g}" if isinstance(value, float) else value
        if isinstance(value, dict):
            shown = " ".join(f"{k}={v}" for k, v in value.items())
        click.echo(f"{key:22} {shown}")


def duration(seconds: float) -> str:
    """Hours, minutes and seconds."""
    minutes, rest = divmod(round(seconds), 60)
    if not minutes:
        return f"{seconds:.1f} s" if seconds < 10 else f"{rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class RowProgress:
    """Rows, on standard error; in one line that changes, where that is a terminal."""

    def __init__(self) -> None:
        self._began: tuple[float, int] | None = None
        self._done = (0, 0)
        self._shows = sys.stderr.isatty()

    def __call__(self, done: int, rows: int) -> None:
        now, self._done = time.monotonic(), (done, rows)
        self._began = self._began or (now, done)
        new, seconds = done - self._began[1], now - self._began[0]
        if self._shows:
            rate = f", {new / seconds:.3g} rows/s" if new else ""
            left = f", {duration((rows - done) * seconds / new)} left" if new else ""
            click.echo(f"\r\x1b[K{done:,} of {rows:,} rows{rate}{left}", nl=False, err=True)

    def clear(self) -> None:
        if self._shows and self._began:
            click.echo("\r\x1b[K", nl=False, err=True)

    def stopped(self) -> None:
        """Say how to go on, where something was begun."""
        self.clear()
        if self._began:
            done, rows = self._done
            again = "the same command, without --force, goes on from there"
            click.echo(f"stopped after {done:,} of {rows:,} rows: {again}", err=True)
