"""What the process of every peer does: build a model, or load one and answer requests.

    python -m benchmarks.peers.ADAPTER build '{"checkpoint": ..., "out": ..., "settings": ...}'
    python -m benchmarks.peers.ADAPTER serve '{"path": ..., "threads": ..., "vocab_size": ...}'

A request and a reply are one line of JSON each. Replies go to the standard output that the process
was started with; whatever the peer prints goes to standard error.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any, Protocol, TextIO

Rows = list[list[int]]
Step = Callable[[], None]
_PROMPTS = count(step=1009)  # no prompt begins like an earlier one: some peers remember them
Build = Callable[[Path, Path, dict[str, Any]], None]


class Runtime(Protocol):
    """A loaded model. Its class imports the peer when it is called, so that this time counts."""

    def generate(self, rows: Rows, new: int, step: Step) -> None:
        """Continue equally long prompts greedily by `new` ids, past any end of text.

        `step` is called as soon as every row has one id more.
        """


class Scorer(Runtime, Protocol):
    """A runtime that can also be asked for perplexity."""

    def logits(self, ids: list[int]) -> Any:
        """float32 [len(ids), vocab_size]: what follows each of `ids`."""


def main(build: Build, runtime: Callable[..., Runtime]) -> None:
    """Do what the command line says. `runtime` takes path, threads, context and options."""
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    command, settings = sys.argv[1], json.loads(sys.argv[2])
    if command == "build":
        build(Path(settings["checkpoint"]), Path(settings["out"]), settings["settings"])
        return
    vocab_size = settings.pop("vocab_size")
    began = time.perf_counter()
    loaded = runtime(Path(settings.pop("path")), **settings)
    _reply(replies, load_s=time.perf_counter() - began)
    for line in sys.stdin:
        request = json.loads(line)
        if "windows" in request:
            _reply(replies, **_score(loaded, Path(request["windows"])))
        else:
            _reply(replies, **_time(loaded, vocab_size, replies, **request))


def call(command: list[str]) -> None:
    """Run a peer's own tool, and end as it does, so that its last words are the reason."""
    done = subprocess.run(command, check=False)
    if done.returncode:
        sys.exit(done.returncode)


def _reply(replies: TextIO, **values: Any) -> None:
    replies.write(json.dumps(values) + "\n")


def _time(
    runtime: Runtime,
    vocab_size: int,
    replies: TextIO,
    *,
    prompt: int,
    new: int,
    batch: int,
    tell_first: bool = False,
) -> dict[str, float]:
    """Seconds to the first id of every row and from there to the last one."""
    first = next(_PROMPTS)
    rows = [[(first + row + i * 7919) % vocab_size for i in range(prompt)] for row in range(batch)]
    times: list[float] = []

    def step() -> None:
        if tell_first and not times:
            _reply(replies, first=True)
        times.append(time.perf_counter())

    began = time.perf_counter()
    runtime.generate(rows, new, step)
    if len(times) != new:
        raise SystemExit(f"{new} steps were wanted, {len(times)} came")
    return {"first_s": times[0] - began, "rest_s": times[-1] - times[0], "peak_mb": _peak_mb()}


def _score(runtime: Any, windows: Path) -> dict[str, float]:
    """The nll in nats, summed, of every id but the first in each row of an int array on disk."""
    import numpy as np

    total, tokens = 0.0, 0
    for row in np.load(windows):
        logits = np.asarray(runtime.logits(row[:-1].tolist()), np.float64)
        top = logits.max(axis=-1)
        chosen = logits[np.arange(len(logits)), row[1:]]
        total += float((np.log(np.exp(logits - top[:, None]).sum(axis=-1)) + top - chosen).sum())
        tokens += len(logits)
    return {"nll": total, "tokens": tokens}


def _peak_mb() -> float:
    """The most memory that was resident, in 10**6 bytes, pages of mapped files included."""
    status = Path("/proc/self/status")
    if status.is_file():  # getrusage would count what the parent had before this process began
        line = next(s for s in status.read_text().splitlines() if s.startswith("VmHWM"))
        return int(line.split()[1]) * 1024 / 1e6
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
