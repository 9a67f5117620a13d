"""Promise: of thousands of cancellations, from other threads and at random moments, none is lost.

A few calls run at a time, most of which would go on for minutes. Each is ended from outside: by its
own `Cancellation`, by the generator's `cancel()`, which ends those beside it too, or by its
`timeout`. It must return within milliseconds and say so, and in the end nothing of it may be left.
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
_WAYS = ("cancellation", "generator", "timeout")


@dataclass(frozen=True)
class Storm:
    """Calls that other threads, or a time, ended at random moments.

    `ends` counts calls: "ended" from outside, "finished" before that; and what must not be: "lost"
    ones went on, or said that they had not been ended, "hung" ones did not even end when all was
    cancelled again, "raised" ones ended with an exception. `median_ms` and `worst_ms` are from a
    cancellation to the return of its call. `left` counts threads, caches and calls that were still
    there when all was over, `usable` says whether the generator gives the ids of before.
    """

    calls: int
    seconds: float
    ends: dict[str, int]
    median_ms: float
    worst_ms: float
    left: int
    usable: bool

    @property
    def failed(self) -> bool:
        return bool(self.ends.keys() - {"ended", "finished"} or self.left or not self.usable)


@dataclass(frozen=True)
class _Ended:
    """What became of a call; `latency` is in seconds, from its cancellation to its return."""

    end: Literal["ended", "finished", "lost", "hung", "raised"]
    latency: float | None = None


def cancel_often(
    generator: Generator, calls: int, *, workers: int = _WORKERS, patience: float = _PATIENCE
) -> Storm:
    """So many calls, a few at a time, each ended from outside at a random moment."""
    endless = type(generator).from_parts(generator.decoder, generator.tokenizer.endless())
    began, threads = time.perf_counter(), threading.active_count()
    before = endless.complete([1, 2, 3], max_new_tokens=8).ids
    found: list[_Ended] = []
    with ThreadPoolExecutor(workers) as pool:
        for one in pool.map(partial(_end_one, endless, patience), range(calls)):
            found.append(one)
            if one.end == "hung":
                break  # and the rest is dropped: each would hold up a worker for its patience
    latencies = [one.latency for one in found if one.latency is not None]
    return Storm(
        calls=calls,
        seconds=time.perf_counter() - began,
        ends=dict(Counter(one.end for one in found)),
        median_ms=1e3 * median(latencies or [0.0]),
        worst_ms=1e3 * max(latencies, default=0.0),
        left=_left(endless, threads, patience),
        usable=endless.complete([1, 2, 3], max_new_tokens=8).ids == before,
    )


def _left(generator: Generator, threads: int, patience: float) -> int:
    """What is still there of calls that are over."""
    deadline = time.monotonic() + patience
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

    way: str  # one of _WAYS
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


def _end_one(generator: Generator, patience: float, number: int) -> _Ended:
    """A call in a thread of its own, ended by this one."""
    rng, decoder = Random(number), generator.decoder
    run = rng.choice(LONG_CALLS)
    plan = _Plan(rng.choice(_WAYS), 1e-4 + 0.03 * rng.random() ** 2, rng.random() < 0.75)
    length = decoder.context * 3 // 4 if plan.endless else 4  # long ones take time to read
    prompt = rng.choices(range(decoder.vocab_size), k=length)

    call = _started(partial(run, generator, prompt, plan))
    if plan.way != "cancellation":  # the two others end nothing that begins later
        call.add_done_callback(lambda _: plan.begun.set())
        plan.begun.wait(patience)
    cancelled = None
    if not _over(call, plan.delay):
        cancelled = time.monotonic()
        if plan.way == "generator":
            generator.cancel()
        elif plan.way == "cancellation":
            plan.cancellation.cancel()
    if not _over(call, patience):
        plan.cancellation.cancel()
        generator.cancel()
        return _Ended("lost" if _over(call, patience) else "hung")
    return _judged(call, plan, cancelled)


def _judged(call: Future[_Returned], plan: _Plan, cancelled: float | None) -> _Ended:
    """A call that is over, and was in time."""
    if call.exception():
        return _Ended("raised")
    reasons, returned = call.result()
    stopped = [reason in ("cancelled", "time") for reason in reasons]
    if plan.endless and not all(stopped):
        return _Ended("lost")
    latency = None if cancelled is None else max(0.0, returned - cancelled)
    return _Ended("ended" if any(stopped) else "finished", latency)


_Returned = tuple[list[str], float]  # what a call gave, and when, by time.monotonic()


def _started(run: Callable[[], list[str]]) -> Future[_Returned]:
    """By a daemon: a call that hangs must not hold up the end of the process."""
    future: Future[_Returned] = Future()

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


LONG_CALLS = (_complete, _stream, _batch, _session)
