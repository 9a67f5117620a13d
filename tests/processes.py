"""`gptrt-export` in processes to be interrupted and killed. They are forked from one that has
imported PyTorch, which takes longer than all that they do."""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

from export.cli import main

_FORKING = multiprocessing.get_context("forkserver")
_FORKING.set_forkserver_preload(["export.training", "export.pipeline"])


def start(*words: object, errors: Path) -> BaseProcess:
    """The command with these words; what it says on standard error goes to a file."""
    process = _FORKING.Process(target=_carry_out, args=([str(word) for word in words], errors))
    process.start()
    return process


def _carry_out(words: list[str], errors: Path) -> None:
    with errors.open("wb") as stream:
        os.dup2(stream.fileno(), sys.__stderr__.fileno() if sys.__stderr__ else 2)
    try:
        main(words)
    finally:
        print("compiler imported:", "torch._dynamo" in sys.modules, file=sys.__stderr__)


def wait_until(process: BaseProcess, holds: Callable[[], object]) -> None:
    """Until the process has got so far. Fails where it ends before."""
    deadline = time.monotonic() + 60
    while not holds():
        assert process.is_alive(), "the process ended before"
        assert time.monotonic() < deadline, "the process did not get there"
        time.sleep(0.01)
