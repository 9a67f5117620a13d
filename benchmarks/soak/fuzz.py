"""Promise: a damaged file is refused with an error of gptrt's own, or changes nothing.

Child processes read thousands of them, so that one that kills or holds up its process is told as
such and the next one is read. What must not be is a finding; alike ones are told once.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import tempfile
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import chain
from multiprocessing.connection import Connection
from pathlib import Path

from .harness import Harness, Outcome
from .kinds import KINDS, REHASHED_GRAPH, kind_of

_CHILDREN = 2
_CASE_SECONDS = 20.0  # a case takes milliseconds
_CHILD_BYTES = 16 << 30  # of addresses: an absurd size is refused to it, not found by the machine


@dataclass(frozen=True)
class Finding:
    """What must not be, how often it was, and the first seed that shows it."""

    kind: str
    outcome: Outcome
    seed: int
    times: int

    @property
    def native(self) -> bool:
        """onnxruntime died of a graph whose hash agrees: that hashes agree is the only defence
        against this, which is why files are hashed before a native parser reads them."""
        return self.kind == REHASHED_GRAPH and self.outcome.result in ("crashed", "hung")


@dataclass(frozen=True)
class Fuzz:
    """All cases: how many of each kind had which result, and what must not be."""

    cases: int
    seconds: float
    results: dict[str, dict[str, int]]
    findings: list[Finding]

    @property
    def failures(self) -> list[Finding]:
        return [one for one in self.findings if not one.native]


def damage_often(bundle: Path, cases: int) -> Fuzz:
    """Read so many damaged files, of the seeds from 0 on."""
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(_CHILDREN) as pool:
        serve = partial(_read_damaged, bundle, Path(folder))
        parts = [range(n, cases, _CHILDREN) for n in range(_CHILDREN)]
        found = sorted(chain(*pool.map(lambda seeds: list(outcomes(serve, seeds)), parts)))
    results: dict[str, Counter[str]] = {kind: Counter() for kind in KINDS}
    for seed, outcome in found:
        results[kind_of(seed)][outcome.result] += 1
    counted = {kind: dict(counter) for kind, counter in results.items() if counter}
    return Fuzz(cases, time.perf_counter() - began, counted, findings(found))


def findings(found: Sequence[tuple[int, Outcome]]) -> list[Finding]:
    """What must not be, of outcomes and their seeds."""
    alike: dict[tuple[str, str, str], list[tuple[int, Outcome]]] = {}
    for seed, outcome in found:
        kind = kind_of(seed)
        if outcome.result not in ("refused", *KINDS[kind].harmless):
            place = outcome.what.split(": ", 1)[0]  # without the message
            alike.setdefault((kind, outcome.result, place), []).append((seed, outcome))
    return [Finding(kind, each[0][1], each[0][0], len(each)) for (kind, *_), each in alike.items()]


# --- child processes ----------------------------------------------------------------------------

Serve = Callable[[Connection, Sequence[int]], None]


def outcomes(
    serve: Serve, seeds: Sequence[int], *, seconds: float = _CASE_SECONDS
) -> Iterator[tuple[int, Outcome]]:
    """Of each seed, from a process that runs `serve`, and from another one after it died or was
    too slow. `serve` says True once it is ready, then the outcome of each seed in turn."""
    context = multiprocessing.get_context("spawn")  # a fork of a process with threads may hang
    waiting = deque(seeds)
    while waiting:
        ours, theirs = context.Pipe(duplex=False)
        child = context.Process(target=serve, args=(theirs, tuple(waiting)), daemon=True)
        child.start()
        theirs.close()
        ours.recv()
        try:
            while waiting and ours.poll(seconds):
                outcome: Outcome = ours.recv()
                yield waiting.popleft(), outcome
            if waiting:
                yield waiting.popleft(), Outcome("hung", f"more than {seconds:g} s")
        except (EOFError, OSError):
            child.join()
            yield waiting.popleft(), Outcome("crashed", _death(child.exitcode or 0))
        finally:
            child.kill()
            child.join()
            ours.close()


def _death(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit status {code}"


def _read_damaged(bundle: Path, folder: Path, pipe: Connection, seeds: Sequence[int]) -> None:
    """In a child."""
    with suppress(ImportError, ValueError, OSError):  # where there is none, or a lower one
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (_CHILD_BYTES, _CHILD_BYTES))
    for stream in (1, 2):  # native parsers talk much
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    harness = Harness(bundle, Path(tempfile.mkdtemp(dir=folder)))
    pipe.send(True)
    for seed in seeds:
        pipe.send(harness.outcome(seed))
