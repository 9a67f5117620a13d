"""What shows only in numbers: memory that grows, calls that do not end, files that do harm.

    python -m benchmarks.soak [BUNDLE] [--generations 10000] [--opens 1000] [--cancels 1000]
                              [--fuzz 2000] [--json FILE]
    python -m benchmarks.soak [BUNDLE] --case SEED    # one damaged file again, in this process

Thousands of calls and of openings must leave memory as it was; of thousands of cancellations none
may be lost; thousands of damaged files must be refused with an error of gptrt's own, or change
nothing. The last are read in processes of their own, so that a crash is a figure and not the end.
A part that is asked for 0 times is left out. The exit status is 1 if anything failed. Linux.
"""

from __future__ import annotations

import ctypes
import gc
import hashlib
import json
import multiprocessing
import os
import platform
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import date
from functools import partial
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random
from statistics import median
from typing import Any, Literal, Protocol, Self

import click
import numpy as np

from gptrt import __version__
from gptrt.chat import TEMPLATE_FILE
from gptrt.engine import import_onnxruntime
from gptrt.errors import GptrtError, OptionError
from gptrt.format import (
    CONFIG_FILE,
    GENERATION_CONFIG_FILE,
    GRAPH_DATA_FILE,
    GRAPH_FILE,
    MANIFEST_FILE,
    TOKENIZER_CONFIG_FILE,
    TOKENIZER_FILE,
    describe_file,
)
from gptrt.generator import Generator, embedded_bundle
from gptrt.interrupt import Cancellation
from gptrt.session import Session

Ids = tuple[int, ...]

_TEXT = "Once upon a time the old king said to the queen that the birds had flown over the hills."


def open_generator(bundle: Path) -> Generator:
    """On the CPU and one thread: nothing here is about speed."""
    return Generator(bundle, device="cpu", threads=1)


# --- memory -------------------------------------------------------------------------------------

_SAMPLES = 100
_GROWN = 1_000_000  # bytes over half of a run: less is no leak worth the name


@dataclass(frozen=True)
class Growth:
    """Memory while something was done again and again; the first half of it is warm-up.

    `samples` are pairs: how often it had been done, and the bytes then. `slope` is the
    least-squares line through those of the second half, in bytes for each time, and `error` its
    standard error. `floor` is by how much the least of the last quarter is above the least of the
    quarter before: single samples are half a megabyte too high by chance, which moves lines.
    """

    times: int
    seconds: float
    samples: tuple[tuple[int, int], ...]
    slope: float
    error: float
    floor: int

    @property
    def grown(self) -> float:
        """Bytes over the second half, by the line."""
        return self.slope * self.times / 2

    @property
    def leaks(self) -> bool:
        """Whether that is not little, not within the noise of the samples, and true of the floor,
        which a leak raises by half of it."""
        large = self.grown >= _GROWN and self.slope > 2 * self.error
        return large and self.floor > self.grown / 4


def watched(times: int, act: Callable[[int], object], *, samples: int = _SAMPLES) -> Growth:
    """The memory of this process while `act` is called with each number."""
    began, every = time.perf_counter(), max(1, times // samples)
    found: list[tuple[int, int]] = []
    for number in range(times):
        act(number)
        if (number + 1) % every == 0:
            found.append((number + 1, _settled()))
    seconds, half = time.perf_counter() - began, len(found) // 2
    return Growth(times, seconds, tuple(found), *_line(found[half:]), _floor(found[half:]))


def _settled() -> int:
    """Bytes of this process that are in memory, once all went that nobody holds.

    Garbage in cycles waits for the collector, and glibc keeps freed memory for later, in pieces
    that depend on what came when. Both come and go and are no leak, but would drown a small one.
    """
    gc.collect()
    with suppress(OSError, AttributeError):  # another libc
        ctypes.CDLL(None).malloc_trim(0)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def _line(samples: Sequence[tuple[int, int]]) -> tuple[float, float]:
    """The slope of the least-squares line and its standard error."""
    if len(samples) < 3:
        return 0.0, 0.0
    x, y = np.array(samples, np.float64).T
    dx, dy = x - x.mean(), y - y.mean()
    slope = dx @ dy / (dx @ dx)
    rest = dy - slope * dx
    return float(slope), float(np.sqrt(rest @ rest / (len(x) - 2) / (dx @ dx)))


def _floor(samples: Sequence[tuple[int, int]]) -> int:
    """By how much the least of the second half is above the least of the first."""
    sizes, half = [size for _, size in samples], len(samples) // 2
    return min(sizes[half:]) - min(sizes[:half]) if half else 0


# --- 1: many calls ------------------------------------------------------------------------------


def generate_often(generator: Generator, times: int, *, samples: int = _SAMPLES) -> Growth:
    """Calls of every sort, mixed by chance; the same ones in each run."""
    rng = Random(0)
    return watched(times, lambda _: rng.choice(_DAY)(generator, rng), samples=samples)


def _prompt(generator: Generator, rng: Random) -> list[int]:
    """Mostly short. The same few come again, shorter or longer, so that caches are found."""
    decoder = generator.decoder
    length = 1 + int(decoder.context // 2 * rng.random() ** 4)
    return Random(rng.randrange(60)).choices(range(decoder.vocab_size), k=length)


def _options(generator: Generator, rng: Random) -> dict[str, Any]:
    new = 2 + int(min(24, generator.decoder.context // 4) * rng.random() ** 2)
    others: tuple[dict[str, Any], ...] = (
        {},
        {},
        {"temperature": 0.8, "top_p": 0.9, "seed": rng.randrange(99)},
        {"do_sample": True, "top_k": 20, "repetition_penalty": 1.1},
        {"stop_strings": ["the", "e"]},
        {"top_logprobs": 3},
        {"prompt_lookup_num_tokens": 4},
        {"no_repeat_ngram_size": 2, "min_new_tokens": 2},
        {"context_overflow": "slide"},
        {"timeout": 0.002},
    )
    return {"max_new_tokens": new, **rng.choice(others)}


def _text(generator: Generator, rng: Random) -> None:
    generator.generate(_TEXT[: 1 + rng.randrange(len(_TEXT))], **_options(generator, rng))


def _ids(generator: Generator, rng: Random) -> None:
    generator.complete(_prompt(generator, rng), **_options(generator, rng))


def _left_early(generator: Generator, rng: Random) -> None:
    with generator.stream(_prompt(generator, rng), **_options(generator, rng)) as stream:
        for _ in range(rng.randrange(4)):
            next(stream, None)


def _dropped(generator: Generator, rng: Random) -> None:
    """Begun, and neither read to its end nor closed."""
    next(generator.tokens(_prompt(generator, rng), max_new_tokens=9), None)


def _never_begun(generator: Generator, rng: Random) -> None:
    generator.stream(_prompt(generator, rng), cancellation=Cancellation())


def _batch(generator: Generator, rng: Random) -> None:
    prompts = [_prompt(generator, rng) for _ in range(1 + rng.randrange(4))]
    generator.generate_batch(prompts, batch_size=3, **_options(generator, rng))


def _several(generator: Generator, rng: Random) -> None:
    generator.complete_batch(
        [_prompt(generator, rng)], num_return_sequences=3, do_sample=True, max_new_tokens=4
    )


def _beams(generator: Generator, rng: Random) -> None:
    generator.complete(_prompt(generator, rng), num_beams=3, max_new_tokens=5)


def _scored(generator: Generator, rng: Random) -> None:
    generator.score(_prompt(generator, rng), [[1, 2], [3]])


def _refused(generator: Generator, rng: Random) -> None:
    with suppress(OptionError):
        generator.generate(_prompt(generator, rng), bad_words_ids=[[generator.decoder.vocab_size]])


def _cancelled(generator: Generator, rng: Random) -> None:
    stop = Cancellation()
    with generator.stream(_prompt(generator, rng), max_new_tokens=9, cancellation=stop) as stream:
        next(stream, None)
        stop.cancel()
        list(stream)


def _session(generator: Generator, rng: Random) -> None:
    with Session(generator, context_overflow="slide") as session:
        session.append(_prompt(generator, rng))
        session.generate(**_options(generator, rng))
        session.rewind(rng.randrange(len(session)))
        session.append([1, 2, 3])
        with session.fork() as other, other.stream(max_new_tokens=5) as stream:
            next(stream, None)
        session.generate(max_new_tokens=2)


def _session_file(generator: Generator, rng: Random) -> None:
    with tempfile.TemporaryDirectory() as folder, Session(generator) as session:
        session.append(_prompt(generator, rng))
        session.save(Path(folder) / "session")
        with Session.load(generator, Path(folder) / "session") as other:
            other.generate(max_new_tokens=2)


_DAY: tuple[Callable[[Generator, Random], None], ...] = (
    *(_text, _text, _ids, _ids, _ids, _left_early, _left_early, _dropped, _never_begun),
    *(_batch, _several, _beams, _scored, _refused, _cancelled, _session, _session_file),
)


# --- 2: many openings ---------------------------------------------------------------------------


def open_often(bundle: Path, times: int, *, samples: int = _SAMPLES) -> Growth:
    """The bundle opened, used for two ids, and closed."""

    def act(_: int) -> None:
        with open_generator(bundle) as generator:
            generator.generate([1], max_new_tokens=2)

    return watched(times, act, samples=samples)


# --- 3: many cancellations ----------------------------------------------------------------------

_PATIENCE = 10.0  # seconds that a call may go on after it was cancelled: it takes milliseconds
_ENDLESS = 1 << 17  # new ids: minutes
_WORKERS = 4

Way = Literal["cancellation", "generator", "timeout"]
_WAYS: tuple[Way, ...] = ("cancellation", "generator", "timeout")


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


@dataclass
class _Ending:
    """How one call is to be ended, and how it was."""

    generator: Generator
    way: Way
    delay: float  # seconds
    patience: float
    stop: Cancellation = field(default_factory=Cancellation)
    begun: threading.Event = field(default_factory=threading.Event)
    over: threading.Event = field(default_factory=threading.Event)
    asked: float | None = None  # by time.monotonic()
    returned: float = 0.0
    lost: bool = False

    def options(self, endless: bool) -> dict[str, Any]:
        """Of the call, which begins now. It cannot end by itself, or soon may."""
        found = {
            "max_new_tokens": _ENDLESS if endless else 4,
            "context_overflow": "slide",
            "cancellation": self.stop,
            "progress": lambda *_: self.begun.set(),
        }
        if self.way == "timeout":
            self.begun.set()
            found["timeout"] = self.delay
        return found

    def end(self) -> None:
        """In a thread of its own: wait, cancel, and see that it helps."""
        if self.way != "cancellation":
            self.begun.wait()  # the two others end nothing that begins later
        if self.over.wait(self.delay):
            return  # at its own end, or ended by the storm around it
        self.asked = time.monotonic()
        if self.way == "generator":
            self.generator.cancel()
        elif self.way == "cancellation":
            self.stop.cancel()
        if not self.over.wait(self.patience):
            self.lost = True
            self.stop.cancel()
            self.generator.cancel()

    def finish(self) -> None:
        """The call has returned."""
        self.returned = time.monotonic()
        self.over.set()
        self.begun.set()


@dataclass(frozen=True)
class _Ended:
    """What became of a call; `seconds` are from its cancellation to its return."""

    ended: bool
    lost: bool
    raised: bool
    seconds: float | None


def cancel_often(
    generator: Generator, calls: int, *, workers: int = _WORKERS, patience: float = _PATIENCE
) -> Storm:
    """So many calls, a few at a time, each ended from outside at a random moment."""
    endless = type(generator).from_parts(generator.decoder, generator.tokenizer.endless())
    began, threads = time.perf_counter(), threading.active_count()
    before = endless.complete([1, 2, 3], max_new_tokens=8).ids
    found, hung = _storm(endless, calls, workers, patience)
    seconds = [one.seconds for one in found if one.seconds is not None]
    ended = sum(one.ended for one in found)
    return Storm(
        calls=calls,
        seconds=time.perf_counter() - began,
        ended=ended,
        finished=sum(not (one.ended or one.raised) for one in found),
        lost=sum(one.lost for one in found),
        hung=hung,
        raised=sum(one.raised for one in found),
        median_ms=1e3 * median(seconds or [0.0]),
        worst_ms=1e3 * max(seconds, default=0.0),
        left=_left(endless, threads),
        usable=endless.complete([1, 2, 3], max_new_tokens=8).ids == before,
    )


def _storm(
    generator: Generator, calls: int, workers: int, patience: float
) -> tuple[list[_Ended], int]:
    """What became of the calls, and how many workers never came back."""
    found: list[_Ended] = []
    waiting = iter(range(calls))  # next() on it is one step: workers share it
    seen = [time.monotonic()]

    def work() -> None:
        for number in waiting:
            found.append(_end_one(generator, Random(number), patience))
            seen[0] = time.monotonic()

    # Daemons: one that hangs must not hold up the end of the process.
    threads = [threading.Thread(target=work, daemon=True) for _ in range(workers)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        for thread in threads:
            thread.join(0.05)
        if time.monotonic() - seen[0] > 3 * patience + 1:
            break
    return found, sum(thread.is_alive() for thread in threads)


def _end_one(generator: Generator, rng: Random, patience: float) -> _Ended:
    way = rng.choice(_WAYS)
    ending = _Ending(generator, way, 1e-4 + 0.03 * rng.random() ** 2, patience)
    call, endless = rng.choice(_LONG_CALLS), rng.random() < 0.75
    canceller = threading.Thread(target=ending.end, daemon=True)
    canceller.start()
    reasons: list[str] = []
    try:
        reasons = call(generator, rng, ending, endless)
    except Exception:  # no call may raise, and the storm goes on
        traceback.print_exc()
    ending.finish()
    canceller.join()
    stopped = [reason in ("cancelled", "time") for reason in reasons]
    lost = ending.lost or (endless and not all(stopped))
    seconds = None if ending.asked is None else max(0.0, ending.returned - ending.asked)
    return _Ended(any(stopped), lost, not reasons, seconds)


def _left(generator: Generator, threads: int) -> int:
    """What is still there of calls that are over."""
    deadline = time.monotonic() + 2
    while threading.active_count() > threads and time.monotonic() < deadline:
        time.sleep(0.01)  # a timer that was cancelled needs a moment to end
    gc.collect()
    calls = generator.calls
    more = max(0, threading.active_count() - threads)
    return more + len(calls.listed) + bool(calls.shelf.lent)


def _long_prompt(generator: Generator, rng: Random, endless: bool) -> list[int]:
    """What takes time to read, for a call that does not end by itself."""
    decoder = generator.decoder
    length = decoder.context * 3 // 4 if endless else 4
    return rng.choices(range(decoder.vocab_size), k=length)


def _complete(g: Generator, rng: Random, ending: _Ending, endless: bool) -> list[str]:
    return [g.complete(_long_prompt(g, rng, endless), **ending.options(endless)).finish_reason]


def _streamed(g: Generator, rng: Random, ending: _Ending, endless: bool) -> list[str]:
    stream = g.stream(_long_prompt(g, rng, endless), **ending.options(endless))
    for _ in stream:
        pass
    return [stream.result.finish_reason]


def _batched(g: Generator, rng: Random, ending: _Ending, endless: bool) -> list[str]:
    prompts = [_long_prompt(g, rng, endless)[: 1 + rng.randrange(40)] for _ in range(3)]
    results = g.complete_batch(prompts, **ending.options(endless))
    return [result.finish_reason for result in results]


def _in_session(g: Generator, rng: Random, ending: _Ending, endless: bool) -> list[str]:
    prompt = _long_prompt(g, rng, endless)
    with Session(g, context_overflow="slide") as session:
        session.append(prompt, cancellation=ending.stop)
        result = session.complete(**ending.options(endless))
        assert session.ids == (*prompt, *result.ids), "a session keeps what it has"
        return [result.finish_reason]


_LONG_CALLS = (_complete, _streamed, _batched, _in_session)


# --- 4: damaged files ---------------------------------------------------------------------------

_CHILDREN = 2
_CASE_SECONDS = 20.0  # a case takes milliseconds
_CHILD_BYTES = 16 << 30  # of addresses: an absurd size is refused to it, not found by the machine


@dataclass(frozen=True)
class Outcome:
    """Of one case: "refused" with an error of gptrt's, the "same" ids as of the intact files, or
    "other" ones; and what must not be, an "untyped" error, threads that are still "running" when
    all is over, "crashed", "hung"."""

    result: Literal["refused", "same", "other", "untyped", "running", "crashed", "hung"]
    what: str = ""


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
        return self.kind == _REHASHED_GRAPH and self.outcome.result in ("crashed", "hung")


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


def damage_often(bundle: Path, cases: int, *, first: int = 0, children: int = _CHILDREN) -> Fuzz:
    """Read so many damaged files, of seeds from `first` on, in long-lived child processes."""
    began = time.perf_counter()
    seeds = [range(first + n, first + cases, children) for n in range(children)]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(children) as pool:
        parts = pool.map(partial(_feed, bundle, Path(folder)), seeds)
        found = sorted(pair for part in parts for pair in part)
    results: dict[str, Counter[str]] = {kind: Counter() for kind in KINDS}
    for seed, outcome in found:
        results[kind_of(seed)][outcome.result] += 1
    seconds = time.perf_counter() - began
    counted = {kind: dict(counter) for kind, counter in results.items() if counter}
    return Fuzz(cases, seconds, counted, _findings(found))


def _findings(found: Sequence[tuple[int, Outcome]]) -> list[Finding]:
    """What must not be, alike ones together."""
    together: dict[tuple[str, str, str], list[tuple[int, Outcome]]] = {}
    for seed, outcome in found:
        kind = kind_of(seed)
        if outcome.result not in ("refused", *KINDS[kind].harmless):
            place = outcome.what.split(": ", 1)[0]  # without the message
            together.setdefault((kind, outcome.result, place), []).append((seed, outcome))
    return [
        Finding(kind, each[0][1], each[0][0], len(each)) for (kind, *_), each in together.items()
    ]


def _feed(bundle: Path, folder: Path, seeds: Sequence[int]) -> list[tuple[int, Outcome]]:
    with Child(partial(_serve, bundle, folder)) as child:
        return [(seed, child.ask(seed)) for seed in seeds]


class Serve(Protocol):
    """What a child does: say True once it is ready, then answer each number with an outcome."""

    def __call__(self, pipe: Connection, /) -> None: ...


class Child:
    """A process that answers numbers, and another one after it died or was too slow."""

    def __init__(self, serve: Serve, *, seconds: float = _CASE_SECONDS) -> None:
        self._serve, self._seconds = serve, seconds
        self._start()

    def ask(self, number: int) -> Outcome:
        self._pipe.send(number)
        try:
            if self._pipe.poll(self._seconds):
                outcome: Outcome = self._pipe.recv()
                return outcome
            outcome = Outcome("hung", f"more than {self._seconds:g} s")
        except (EOFError, ConnectionError):
            self._process.join()
            outcome = Outcome("crashed", _death(self._process.exitcode or 0))
        self._stop()
        self._start()
        return outcome

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")  # a fork of a process with threads may hang
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=self._serve, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()
        self._pipe.recv()

    def _stop(self) -> None:
        self._process.kill()
        self._process.join()
        self._pipe.close()


def _death(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit status {code}"


def _serve(bundle: Path, folder: Path, pipe: Connection) -> None:
    """A child: prepare, and answer seeds with outcomes until it is killed."""
    with suppress(ImportError, ValueError, OSError):  # where there is none, or a lower one
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (_CHILD_BYTES, _CHILD_BYTES))
    for stream in (1, 2):  # native parsers talk much
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    bench = Bench(bundle, Path(tempfile.mkdtemp(dir=folder)))
    pipe.send(True)
    while True:
        pipe.send(bench.outcome(pipe.recv()))


# --- one case -----------------------------------------------------------------------------------

_SAVED = "session"
_MAGIC = b"gptrt-session\n"
_DIGEST = 32  # bytes


class Bench:
    """Files to damage: a copy of a bundle, and a session file."""

    def __init__(self, bundle: Path, folder: Path) -> None:
        self.generator = open_generator(bundle)  # of the original: its files may stay mapped
        self.ids = self.answer(self.generator)
        self.folder = Path(shutil.copytree(bundle, folder / "bundle"))
        self.manifest = (self.folder / MANIFEST_FILE).read_bytes()
        self.files: dict[str, Any] = json.loads(self.manifest)["files"]
        self.session = folder / _SAVED
        with Session(self.generator) as session:
            session.append(_TEXT)
            session.generate(max_new_tokens=4)
            session.save(self.session)
        self.saved = self.session.read_bytes()
        self.continued = self.go_on()

    def outcome(self, seed: int) -> Outcome:
        """Of the case that a seed stands for; the same each time."""
        return KINDS[kind_of(seed)].run(self, Random(seed))

    def answer(self, generator: Generator) -> Ids:
        """Greedy ids, and a look at all else that files decide."""
        with suppress(GptrtError):  # most have no chat template
            generator.chat_prompt([{"role": "user", "content": "Hello."}])
        found = generator.complete(_TEXT, max_new_tokens=4)
        generator.tokenizer.decode(found.ids)
        if generator.decoder.context > self.generator.decoder.context:  # than there really is
            generator.complete([1] * (self.generator.decoder.context + 1), max_new_tokens=2)
        return found.ids

    def go_on(self) -> Ids:
        """What the session file is continued with."""
        with Session.load(self.generator, self.session) as session:
            found = session.complete(max_new_tokens=4)
            session.rewind(len(session) // 2)
            session.append([1, 2])
            return found.ids

    def reopened(self, name: str, data: bytes, *, rehash: bool = False) -> Outcome:
        """With one file of the bundle replaced."""
        path = self.folder / name
        before = path.read_bytes() if path.exists() else None
        try:
            _put(path, data)
            if rehash:
                entry = describe_file(path)
                files = {**self.files, name: {"size": entry.size, "sha256": entry.sha256}}
                _put(self.folder / MANIFEST_FILE, _manifest(self, files=files))
            return _judged(self.ids, lambda: self.answer(open_generator(self.folder)))
        finally:
            path.unlink()
            if before is not None:
                _put(path, before)
            _put(self.folder / MANIFEST_FILE, self.manifest)

    def loaded(self, data: bytes) -> Outcome:
        """With the session file replaced."""
        _put(self.session, data)
        return _judged(self.continued, self.go_on)


def _manifest(bench: Bench, **changes: Any) -> bytes:
    return json.dumps({**json.loads(bench.manifest), **changes}).encode()


def _put(path: Path, data: bytes) -> None:
    """As a new file: the old one may be mapped into memory."""
    draft = path.with_name(f"{path.name}.part")
    draft.write_bytes(data)
    draft.replace(path)


def _judged(wanted: Ids, run: Callable[[], Ids]) -> Outcome:
    before = set(threading.enumerate())
    outcome = _result(wanted, run)
    running = set(threading.enumerate()) - before
    for thread in running:
        thread.join()  # or it would see the files of the next case
    if running and outcome.result != "untyped":
        names = ", ".join(sorted({type(thread).__name__ for thread in running}))
        return Outcome("running", f"{names} after it was {outcome.result}")
    return outcome


def _result(wanted: Ids, run: Callable[[], Ids]) -> Outcome:
    try:
        found = run()
    except GptrtError as e:
        return _printed(e)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as e:  # a panic in Rust is no Exception
        return Outcome("untyped", _where(e))
    return Outcome("same" if found == wanted else "other")


def _printed(error: GptrtError) -> Outcome:
    """An error that cannot be written into a log is of little use."""
    try:
        str(error).encode()
    except UnicodeEncodeError as e:
        return Outcome("untyped", f"UnicodeEncodeError in what {_where(error)}: {e}")
    return Outcome("refused")


def _where(error: BaseException) -> str:
    """The exception, and the function of gptrt out of which it came."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if Path(f.filename).parent.name == "gptrt"]
    place = f"{Path(ours[-1].filename).name}:{ours[-1].name}" if ours else "no file of gptrt"
    return f"{type(error).__name__} in {place}: {ascii(str(error))[:200]}"


# --- how files are damaged ----------------------------------------------------------------------


@dataclass(frozen=True)
class Kind:
    """One way to damage. Beside being refused, of all results only the `harmless` may be."""

    run: Callable[[Bench, Random], Outcome]
    harmless: tuple[str, ...]


def _damaged_manifest(bench: Bench, rng: Random) -> Outcome:
    """It is what hashes are read from, so no hash covers it."""
    way = rng.random()
    if way < 0.25:
        return bench.reopened(MANIFEST_FILE, _consistently_wrong(bench, rng))
    if way < 0.35:
        return bench.reopened(MANIFEST_FILE, _misnamed(bench, rng))
    return bench.reopened(MANIFEST_FILE, damaged_json(rng, bench.manifest))


def _damaged_tokenizer(bench: Bench, rng: Random) -> Outcome:
    """Half of them are of another make: nothing is wrong with their JSON."""
    data = (bench.folder / TOKENIZER_FILE).read_bytes()
    data = _remade(rng, data) if rng.random() < 0.5 else damaged_json(rng, data)
    return bench.reopened(TOKENIZER_FILE, data, rehash=True)


def _damaged_settings(bench: Bench, rng: Random) -> Outcome:
    if rng.random() < 0.1:
        template = rng.choice((b"\xff\xfe", b"{% if", b"{{ 1 / 0 }}", b"\0", b""))
        return bench.reopened(TEMPLATE_FILE, template, rehash=True)
    names = (CONFIG_FILE, GENERATION_CONFIG_FILE, TOKENIZER_CONFIG_FILE)
    name = rng.choice([name for name in names if name in bench.files])
    data = (bench.folder / name).read_bytes()
    if name == TOKENIZER_CONFIG_FILE and rng.random() < 0.5:
        named = [{"name": rng.choice(("default", _odd(rng))), "template": "{{ messages[0] }}"}]
        found = rng.choice((named, "{{ messages[0]['content'] }}", "{% if", "{{ 1 / 0 }}"))
        data = _spelled(rng, json.dumps({**json.loads(data), "chat_template": found}))
        return bench.reopened(name, data, rehash=True)
    return bench.reopened(name, damaged_json(rng, data), rehash=True)


def _unhashed(bench: Bench, rng: Random) -> Outcome:
    """Any file that a hash covers, the graph and its weights most of all."""
    graph = [name for name in (GRAPH_FILE, GRAPH_DATA_FILE) if name in bench.files]
    name = rng.choice(graph if rng.random() < 0.7 else list(bench.files))
    return bench.reopened(name, damaged_bytes(rng, (bench.folder / name).read_bytes()))


def _rehashed(bench: Bench, rng: Random) -> Outcome:
    """Half of the flips are at the ends of the file, where the structure is, not the weights."""
    data = bytearray((bench.folder / GRAPH_FILE).read_bytes())
    end = min(len(data), 1 << 14)
    part = rng.choice((range(len(data)), range(end), range(len(data) - end, len(data))))
    for _ in range(rng.choice((1, 1, 1, 2, 8))):
        data[rng.choice(part)] ^= 1 << rng.randrange(8)
    return bench.reopened(GRAPH_FILE, bytes(data), rehash=True)


def _damaged_session(bench: Bench, rng: Random) -> Outcome:
    return bench.loaded(damaged_bytes(rng, bench.saved))


def _sealed_session(bench: Bench, rng: Random) -> Outcome:
    """Its digest computed again, so that all that is behind it gets to see the damage."""
    start, end = len(_MAGIC) + 8, len(bench.saved) - _DIGEST
    size = int.from_bytes(bench.saved[len(_MAGIC) : start], "little")
    header, values = bench.saved[start : start + size], bench.saved[start + size : end]
    part = rng.random()
    if part < 0.6:
        header = damaged_json(rng, header)
    elif part < 0.8:
        values = damaged_bytes(rng, values)
    length = (
        len(header) if part < 0.9 else rng.choice((0, 1, size + 1, end, 1 << 40, (1 << 64) - 1))
    )
    body = b"".join((_MAGIC, length.to_bytes(8, "little"), header, values))
    if part >= 0.95:
        body = damaged_bytes(rng, body)
    return bench.loaded(body + hashlib.sha256(body).digest())


_REHASHED_GRAPH = "graph, its hash agreeing"
# Where a hash agrees, other contents are other contents: that ids are others is no fault then.
KINDS: dict[str, Kind] = {
    "manifest": Kind(_damaged_manifest, ("same",)),
    "tokenizer, its hash agreeing": Kind(_damaged_tokenizer, ("same", "other")),
    "settings, their hash agreeing": Kind(_damaged_settings, ("same", "other")),
    "any file, its hash kept": Kind(_unhashed, ()),
    _REHASHED_GRAPH: Kind(_rehashed, ("same", "other")),
    "session": Kind(_damaged_session, ()),
    "session, its digest agreeing": Kind(_sealed_session, ("same", "other")),
}


def kind_of(seed: int) -> str:
    return list(KINDS)[seed % len(KINDS)]


def damaged_bytes(rng: Random, data: bytes) -> bytes:
    """Other bytes than they were: bits flipped, cut off, put in, or overwritten."""
    at, size = rng.randrange(len(data) + 1), 1 + rng.randrange(64)
    way = rng.randrange(5)
    if way == 0:
        return data[: rng.randrange(len(data))]
    if way == 1:
        return data[:at] + rng.randbytes(size) + data[at:]
    if way == 2:
        at = rng.randrange(len(data))
        return data[:at] + data[at + size :]
    result = bytearray(data)
    for place in rng.sample(range(8 * len(data)), min(8 * len(data), rng.choice((1, 1, 3, 40)))):
        result[place // 8] ^= 1 << place % 8
    return bytes(result)


# Of numbers, names and shapes those that are wrong somewhere. What JSON cannot say, or what Python
# would not write, has a name here that `_spelled` replaces.
_RAW = ("@nan", "@infinity", "@digits", "@lists", "@objects", "@open", "@bytes")
_ODD: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 1 << 31, 1 << 63, 10**18, 10**400, 0.5, -0.0, 1e308, -1e308),
    *("", "x", "0", "\0", "\ud800", "\n", "é👍", "a" * 300, "a" * 5000, "../x", "/etc/passwd"),
    *([], {}, [[]], [None], [0], [-1], ["x"], [[0, 1]], {"": {}}, {"x": [1]}, *_RAW),
)


def damaged_json(rng: Random, data: bytes) -> bytes:
    """A few values changed, whatever their place; or the text itself."""
    if rng.random() < 0.2:
        return damaged_bytes(rng, data)
    holder: list[Any] = [json.loads(data)]
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        _change(rng, holder)
    return _spelled(rng, json.dumps(holder[0]))


def _change(rng: Random, holder: list[Any]) -> None:
    """One value, in place: more often one of the outer ones, of which there are fewer."""
    parent: Any = holder
    key: Any = 0
    deeper = 0.97
    while isinstance(inner := parent[key], dict | list) and inner and rng.random() < deeper:
        parent, deeper = inner, 0.75
        key = rng.choice(list(inner)) if isinstance(inner, dict) else rng.randrange(len(inner))
    way = rng.random()
    if way < 0.5 or parent is holder:
        parent[key] = _odd(rng)
    elif way < 0.7:
        parent[key] = _near(rng, parent[key])
    elif way < 0.8:
        del parent[key]
    elif isinstance(parent, dict):
        parent[rng.choice(("x", "", "a" * 300, f"{key}2", "\ud800", "..", "\0"))] = parent[key]
    else:
        parent.append(parent[key] if way < 0.9 else _odd(rng))


def _odd(rng: Random) -> Any:
    """A value of its own: what is put in twice must not hold itself."""
    value = rng.choice(_ODD)
    return json.loads(json.dumps(value)) if isinstance(value, dict | list) else value


def _near(rng: Random, value: Any) -> Any:
    """A value of the same type that is not far off."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float) and abs(value) < 1e300:
        return rng.choice((value + 1, value - 1, 2 * value, -value, value / 2, value * 1000))
    if isinstance(value, str) and value:
        at = rng.randrange(len(value))
        return rng.choice((value[:at], value[:at] + "0" + value[at + 1 :], value + value))
    return [value]


def _spelled(rng: Random, text: str) -> bytes:
    """With what is no JSON, or too much of it. Nesting is as deep as it just may be, or is not."""
    deep = sys.getrecursionlimit() - rng.randrange(40)
    meant = {
        "@nan": "NaN",
        "@infinity": "1e999",
        "@digits": "1" * 5000,
        "@lists": "[" * deep + "]" * deep,
        "@objects": '{"x":' * deep + "1" + "}" * deep,
        "@open": "[" * 100_000,
        "@bytes": '"\udcff"',
    }
    for name, spelling in meant.items():
        text = text.replace(f'"{name}"', spelling)
    return text.encode("utf-8", "surrogateescape")


# Parts of other tokenizers, for where they do not belong; `_FILLINGS` are for what begins with @.
_PARTS: dict[str, tuple[dict[str, Any], ...]] = {
    "normalizer": (
        {"type": "NFKC"},
        {"type": "Prepend", "prepend": "@text"},
        {"type": "Replace", "pattern": {"String": "@text"}, "content": "@text"},
        {"type": "Replace", "pattern": {"Regex": "@regex"}, "content": "@text"},
        {"type": "Precompiled", "precompiled_charsmap": "@base64"},
        {"type": "Sequence", "normalizers": []},
    ),
    "pre_tokenizer": (
        {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True},
        {"type": "Split", "pattern": {"Regex": "@regex"}, "behavior": "Isolated", "invert": True},
        {"type": "Digits", "individual_digits": True},
        {"type": "Sequence", "pretokenizers": [{"type": "Whitespace"}]},
    ),
    "decoder": (
        {"type": "WordPiece", "prefix": "@text", "cleanup": True},
        {"type": "BPEDecoder", "suffix": "@text"},
        {"type": "Strip", "content": "e", "start": "@number", "stop": "@number"},
        {"type": "CTC", "pad_token": "@text", "word_delimiter_token": "@text", "cleanup": True},
        {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
    ),
    "post_processor": (
        {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        {"type": "BertProcessing", "sep": ["@text", "@number"], "cls": ["@text", "@number"]},
        {
            "type": "TemplateProcessing",
            "single": [
                {"SpecialToken": {"id": "x", "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}},
            ],
            "pair": [],
            "special_tokens": {"x": {"id": "x", "ids": ["@number"], "tokens": ["@text"]}},
        },
    ),
    "truncation": (
        {
            "direction": "Right",
            "max_length": "@number",
            "strategy": "LongestFirst",
            "stride": "@number",
        },
    ),
    "padding": (
        {
            "strategy": {"Fixed": "@number"},
            "direction": "Left",
            "pad_to_multiple_of": "@number",
            "pad_id": "@number",
            "pad_type_id": 0,
            "pad_token": "@text",
        },
    ),
    "model": (
        {"type": "BPE", "vocab": {"e": "@number", "t": 1}, "merges": [], "unk_token": "@text"},
        {"type": "WordLevel", "vocab": {"e": "@number"}, "unk_token": "@text"},
        {"type": "Unigram", "vocab": [["e", -1.0], ["t", "@number"]], "unk_id": "@number"},
        {
            "type": "WordPiece",
            "vocab": {"e": "@number"},
            "unk_token": "@text",
            "continuing_subword_prefix": "@text",
            "max_input_chars_per_word": "@number",
        },
    ),
}
_FILLINGS: dict[str, tuple[Any, ...]] = {
    "@number": (0, 1, 2, 300, 1 << 20, (1 << 32) - 1),
    "@text": ("", "x", "e", "▁", "<|endoftext|>", "é👍", "a" * 300),
    "@regex": ("", "e", "(", ".*", "(?=e)", "(e*)*$", "\\p{L}+|\\s"),
    "@base64": ("", "AAAA", "/////w==", "QAAAAP////8AAAAA"),
}


def _remade(rng: Random, data: bytes) -> bytes:
    """A tokenizer with a part of another, an option turned, or ids dealt anew."""
    whole = json.loads(data)
    way = rng.random()
    if way < 0.6:
        name = rng.choice(list(_PARTS))
        whole[name] = _filled(rng, rng.choice(_PARTS[name]))
    elif way < 0.75:
        added = {"content": _filled(rng, "@text"), "id": _filled(rng, "@number")}
        for option in ("special", "normalized", "lstrip", "rstrip", "single_word"):
            added[option] = rng.random() < 0.5
        whole["added_tokens"] = [*whole["added_tokens"], added]
    elif way < 0.9:
        flags = ("byte_fallback", "ignore_merges", "fuse_unk", "dropout", "end_of_word_suffix")
        whole["model"][rng.choice(flags)] = rng.choice((True, False, None, 1.0, 0.0, "x", ""))
    else:
        vocab = whole["model"].get("vocab", {})
        factor, more = rng.choice(((1, 1), (-1, 0), (0, 0), (1 << 18, 0)))
        whole["model"]["vocab"] = {word: factor * n + more for word, n in vocab.items()}
    return json.dumps(whole).encode()


def _filled(rng: Random, part: Any) -> Any:
    """With values for what stands for one."""
    if isinstance(part, dict):
        return {key: _filled(rng, value) for key, value in part.items()}
    if isinstance(part, list):
        return [_filled(rng, value) for value in part]
    return rng.choice(_FILLINGS[part]) if part in list(_FILLINGS) else part


_PAIRS = {
    "n_positions": "max_length",
    "n_layer": "layers",
    "n_kv_head": "kv_heads",
    "head_dim": "head_dim",
}


def _consistently_wrong(bench: Bench, rng: Random) -> bytes:
    """A manifest in which nothing contradicts anything but the graph."""
    whole = json.loads(bench.manifest)
    model, cache = whole["model"], whole["cache"]
    sizes = {"vocab_size": model["vocab_size"], "n_positions": model["n_positions"]}
    if rng.random() < 0.2:
        model = {"architecture": "gpt2", "made_with": "another library", **sizes}
    else:
        name, size = rng.choice(list(_PAIRS.items()))
        model[name] = cache[size] = max(1, int(_near(rng, model[name])))
    return _manifest(bench, model=model, cache=cache, golden=[])


def _misnamed(bench: Bench, rng: Random) -> bytes:
    """A manifest with one more file, which is not there, or is no file, or cannot be."""
    odd = ("a" * 300, "\ud800", "a/b", "x", " ", "CON", "\n", "é", MANIFEST_FILE, "a" * 5000)
    entry = {**rng.choice(list(bench.files.values())), "size": rng.choice((0, 1, 1 << 40))}
    return _manifest(bench, files={**bench.files, rng.choice(odd): entry})


# --- the report ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Report:
    """Everything that was run; None what was not."""

    date: str
    machine: str
    versions: dict[str, str]
    bundle: str
    generations: Growth | None
    opens: Growth | None
    cancels: Storm | None
    fuzz: Fuzz | None

    @property
    def failed(self) -> bool:
        grown = [one.leaks for one in (self.generations, self.opens) if one]
        stormy = self.cancels is not None and self.cancels.failed
        return any(grown) or stormy or bool(self.fuzz and self.fuzz.failures)

    def table(self) -> str:
        """In Markdown."""
        versions = ", ".join(f"{name} {number}" for name, number in self.versions.items())
        head = f"{self.bundle}, {self.date}, {self.machine}; {versions}"
        rows = [("what", "how often", "found", ""), ("---", "---", "---", "---"), *self._rows()]
        return "\n".join((head, "", *(f"| {' | '.join(row)} |" for row in rows)))

    def _rows(self) -> Iterator[tuple[str, str, str, str]]:
        if self.generations:
            yield _growth_row("generations", self.generations)
        if self.opens:
            yield _growth_row("opened and closed", self.opens)
        if self.cancels:
            yield _storm_row(self.cancels)
        if self.fuzz:
            yield from _fuzz_rows(self.fuzz)


def _growth_row(what: str, growth: Growth) -> tuple[str, str, str, str]:
    sizes = [size / 1e6 for _, size in growth.samples]
    found = (
        f"{growth.slope:+.1f} ± {growth.error:.1f} bytes each: {growth.grown / 1e6:+.2f} MB over "
        f"the second half, its floor {growth.floor / 1e6:+.2f} MB; {min(sizes):.1f} to "
        f"{max(sizes):.1f} MB"
    )
    times = f"{growth.times:,} in {growth.seconds:.0f} s"
    return what, times, found, "LEAKS" if growth.leaks else "no growth"


def _storm_row(storm: Storm) -> tuple[str, str, str, str]:
    found = (
        f"{storm.ended} ended, {storm.finished} had finished, {storm.lost} lost, {storm.hung} hung,"
        f" {storm.raised} raised, {storm.left} left over; median {storm.median_ms:.1f} ms, worst "
        f"{storm.worst_ms:.1f} ms; {'same' if storm.usable else 'OTHER'} ids after"
    )
    times = f"{storm.calls:,} in {storm.seconds:.0f} s"
    return "cancelled", times, found, "FAILED" if storm.failed else "none lost"


def _fuzz_rows(fuzz: Fuzz) -> Iterator[tuple[str, str, str, str]]:
    for kind, results in fuzz.results.items():
        found = ", ".join(f"{number} {result}" for result, number in sorted(results.items()))
        bad = sum(one.times for one in fuzz.failures if one.kind == kind)
        verdict = f"{bad} FAILED" if bad else "ok"
        yield f"damaged: {kind}", f"{sum(results.values()):,}", found, verdict
    for one in fuzz.findings:
        verdict = "native" if one.native else "FAILED"
        found = f"{one.outcome.result} {one.outcome.what}"[:160].replace("|", "/")
        yield f"finding: {one.kind}", f"{one.times}, first of seed {one.seed}", found, verdict


def _versions() -> dict[str, str]:
    found = {"gptrt": __version__, "Python": platform.python_version()}
    found |= {"onnxruntime": import_onnxruntime().__version__}
    return found | {name: version(name) for name in ("numpy", "tokenizers")}


def one_case(bundle: Path, seed: int) -> None:
    """A finding again, where it can be looked at: a crash is one of this process."""
    click.echo(f"{kind_of(seed)}:")
    with tempfile.TemporaryDirectory() as folder:
        outcome = Bench(bundle, Path(folder)).outcome(seed)
    click.echo(f"{outcome.result} {outcome.what}")


def _times(name: str, default: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    return click.option(
        f"--{name}", default=default, type=click.IntRange(0), show_default=True, help="How many."
    )


@click.command()
@click.argument("bundle", required=False, type=click.Path(path_type=Path))
@_times("generations", 10_000)
@_times("opens", 1000)
@_times("cancels", 1000)
@_times("fuzz", 2000)
@click.option("--json", "file", type=click.Path(path_type=Path), help="Write all figures here.")
@click.option("--case", type=int, help="Only the damaged file of this seed, in this process.")
def main(
    bundle: Path | None,
    generations: int,
    opens: int,
    cancels: int,
    fuzz: int,
    file: Path | None,
    case: int | None,
) -> None:
    """Many calls, openings, cancellations and damaged files of BUNDLE, or of the embedded one."""
    bundle = embedded_bundle() if bundle is None else bundle
    if case is not None:
        one_case(bundle, case)
        return
    opened = open_generator(bundle)
    report = Report(
        date=str(date.today()),
        machine=f"{platform.platform()}, {os.cpu_count()} cores",
        versions=_versions(),
        bundle=bundle.name,
        generations=generate_often(opened, generations) if generations else None,
        opens=open_often(bundle, opens) if opens else None,
        cancels=cancel_often(opened, cancels) if cancels else None,
        fuzz=damage_often(bundle, fuzz) if fuzz else None,
    )
    click.echo(report.table())
    if file is not None:
        file.write_text(json.dumps(asdict(report), indent=1) + "\n")
    sys.exit(1 if report.failed else 0)


if __name__ == "__main__":
    main()
