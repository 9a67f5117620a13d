"""Promise: of thousands of cancellations, from other threads and at random moments, none is lost.

A few calls run at a time, most of which would go on for minutes. Each is ended from outside, by its
own `Cancellation`, by the generator's `cancel()`, which ends those beside it too, or by its
`timeout`. It must return within milliseconds and say so; in the end nothing may be left of any.
"""

from __future__ import annotations

import gc
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import partial
from random import Random
from statistics import median
from typing import Any, Literal

from gptrt.generator import Generator
from gptrt.interrupt import Cancellation
from gptrt.session import Session

_PATIENCE = 10.0  # seconds that a call may go on after it was cancelled: it takes milliseconds
_ENDLESS = 1 << 17  # new ids: minutes
_WORKERS = 4


@dataclass(frozen=True)
class Storm:
    """Calls that other threads, or a time, ended at random moments.

    `ended` were, the others had `finished` before. `lost` went on, or said that they had not been
    ended; `hung` did not even end when all was cancelled again; `raised` ended with an exception.
    `median_ms` and `worst_ms` are from a cancellation to the return of its call. `left` counts
    threads, caches and calls that were still there when all was over, `usable` says whether the
    generator gives the ids of before.
    """

    calls: int
    seconds: float
    ended: int
    finished: int
    lost: int
    hung: int
    raised: int
    median_ms: float
    worst_ms: float
    left: int
    usable: bool

    @property
    def failed(self) -> bool:
        return bool(self.lost or self.hung or self.raised or self.left or not self.usable)


def cancel_often(
    generator: Generator, calls: int, *, workers: int = _WORKERS, patience: float = _PATIENCE
) -> Storm:
    """So many calls, a few at a time, each ended from outside at a random moment."""
    endless = type(generator).from_parts(generator.decoder, generator.tokenizer.endless())
    began, threads = time.perf_counter(), threading.active_count()
    before = endless.complete([1, 2, 3], max_new_tokens=8).ids
    with ThreadPoolExecutor(workers) as pool:
        found = list(pool.map(partial(_cancel_one, endless, patience), range(calls)))
    latencies = [one.latency for one in found if one.latency is not None]
    ends = Counter(one.end for one in found)
    return Storm(
        calls=calls,
        seconds=time.perf_counter() - began,
        ended=ends["ended"],
        finished=ends["finished"],
        lost=sum(one.lost for one in found),
        hung=ends["hung"],
        raised=ends["raised"],
        median_ms=1e3 * median(latencies or [0.0]),
        worst_ms=1e3 * max(latencies, default=0.0),
        left=_left(endless, threads),
        usable=endless.complete([1, 2, 3], max_new_tokens=8).ids == before,
    )


def _left(generator: Generator, threads: int) -> int:
    """What is still there of calls that are over."""
    deadline = time.monotonic() + 2
    while threading.active_count() > threads and time.monotonic() < deadline:
        time.sleep(0.01)  # a timer that was cancelled needs a moment to end
    gc.collect()
    calls = generator.calls
    more = max(0, threading.active_count() - threads)
    return more + len(calls.listed) + bool(calls.shelf.lent)


# --- one call -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Plan:
    """How a call is to be ended, `delay` seconds after it began."""

    way: Literal["cancellation", "generator", "timeout"]
    delay: float
    endless: bool  # or so short that it may soon end by itself
    cancellation: Cancellation = field(default_factory=Cancellation)
    begun: threading.Event = field(default_factory=threading.Event)

    def options(self) -> dict[str, Any]:
        """Of the call, which begins now."""
        found = {
            "max_new_tokens": _ENDLESS if self.endless else 4,
            "context_overflow": "slide",
            "cancellation": self.cancellation,
            "progress": lambda *_: self.begun.set(),
        }
        if self.way == "timeout":
            self.begun.set()
            found["timeout"] = self.delay
        return found


@dataclass(frozen=True)
class _Ended:
    """What became of a call; `latency` is in seconds, from its cancellation to its return."""

    end: Literal["ended", "finished", "raised", "hung"]
    lost: bool
    latency: float | None = None


def _cancel_one(generator: Generator, patience: float, number: int) -> _Ended:
    """A call in a thread of its own, ended by this one."""
    rng = Random(number)
    way = rng.choice(("cancellation", "generator", "timeout"))
    delay, run = 1e-4 + 0.03 * rng.random() ** 2, rng.choice(LONG_CALLS)
    plan = _Plan(way, delay, endless=rng.random() < 0.75)
    decoder = generator.decoder
    length = decoder.context * 3 // 4 if plan.endless else 4  # what takes time to read
    prompt = rng.choices(range(decoder.vocab_size), k=length)

    call = _started(partial(run, generator, prompt, plan))
    if way != "cancellation":  # the two others end nothing that begins later
        call.add_done_callback(lambda _: plan.begun.set())
        plan.begun.wait(patience)
    cancelled = None
    if not _over(call, delay):
        cancelled = time.monotonic()
        if way == "generator":
            generator.cancel()
        elif way == "cancellation":
            plan.cancellation.cancel()
    lost = not _over(call, patience)
    if lost:
        plan.cancellation.cancel()
        generator.cancel()
        if not _over(call, patience):
            return _Ended("hung", lost)
    if call.exception():
        return _Ended("raised", lost)
    reasons, returned = call.result()
    stopped = [reason in ("cancelled", "time") for reason in reasons]
    return _Ended(
        "ended" if any(stopped) else "finished",
        lost or (plan.endless and not all(stopped)),
        None if cancelled is None else max(0.0, returned - cancelled),
    )


def _started(run: Callable[[], list[str]]) -> Future[tuple[list[str], float]]:
    """Its result and the time when it returned, from a daemon: one that hangs must not hold up the
    end of the process, as a thread of a pool would."""
    future: Future[tuple[list[str], float]] = Future()

    def work() -> None:
        try:
            future.set_result((run(), time.monotonic()))
        except BaseException as e:  # no call may raise, and the storm goes on
            traceback.print_exc()
            future.set_exception(e)

    threading.Thread(target=work, daemon=True).start()
    return future


def _over(call: Future[Any], seconds: float) -> bool:
    """Whether it is, after so many seconds at most."""
    return bool(wait([call], seconds).done)


# --- the calls: each gives its finish reasons ---------------------------------------------------


def _complete(generator: Generator, prompt: list[int], plan: _Plan) -> list[str]:
    return [generator.complete(prompt, **plan.options()).finish_reason]


def _stream(generator: Generator, prompt: list[int], plan: _Plan) -> list[str]:
    stream = generator.stream(prompt, **plan.options())
    list(stream)
    return [stream.result.finish_reason]


def _batch(generator: Generator, prompt: list[int], plan: _Plan) -> list[str]:
    prompts = [prompt[:length] for length in (1, 17, 40)]
    return [one.finish_reason for one in generator.complete_batch(prompts, **plan.options())]


def _session(generator: Generator, prompt: list[int], plan: _Plan) -> list[str]:
    with Session(generator, context_overflow="slide") as session:
        session.append(prompt, cancellation=plan.cancellation)
        result = session.complete(**plan.options())
        assert session.ids == (*prompt, *result.ids), "a session keeps what it has"
        return [result.finish_reason]


LONG_CALLS: tuple[Callable[[Generator, list[int], _Plan], list[str]], ...]
LONG_CALLS = (_complete, _stream, _batch, _session)
