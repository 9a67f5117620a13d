"""Promise: thousands of calls, and thousands of openings and closings, leave memory as it was.

The resident memory of this process is sampled while something is repeated. The first half of the
samples is warm-up; to the second a line is fitted. A leak is growth by that line that is large,
beyond the noise, and true of the least of the samples too.
"""

from __future__ import annotations

import ctypes
import gc
import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gptrt.generator import Generator
from gptrt.huge_pages import IN_USE, gather

from .workload import Workload, open_generator

_SAMPLES = 100
_LEAST = 1_000_000  # bytes over half of a run: less is no leak worth the name

Sample = tuple[int, int]  # how often it had been done, and the bytes then


@dataclass(frozen=True)
class Growth:
    """Memory while something was done `times` times.

    `slope` is in bytes for each time, `error` its standard error. `floor` is by how much the least
    of the last quarter is above the least of the quarter before: single samples are half a megabyte
    too high by chance, which moves lines but not the least of many.
    """

    times: int
    seconds: float
    samples: tuple[Sample, ...]
    slope: float
    error: float
    floor: int

    @property
    def grown(self) -> float:
        """Bytes over the second half, by the line."""
        return self.slope * self.times / 2

    @property
    def leaks(self) -> bool:
        """A leak raises the floor by half of what it raises the line; a quarter is enough here."""
        large = self.grown >= _LEAST and self.slope > 2 * self.error
        return large and self.floor > self.grown / 4


def generate_often(generator: Generator, times: int, *, samples: int = _SAMPLES) -> Growth:
    """Calls of every sort, once the model is in use and its weights have moved to huge pages: those
    fill gaps, which is growth and no leak."""
    for _ in range(IN_USE):
        generator.generate([1], max_new_tokens=2)
    gather(rest=0.0)
    return measure_growth(times, Workload(generator).run_one, samples=samples)


def open_often(bundle: Path, times: int, *, samples: int = _SAMPLES) -> Growth:
    """The bundle opened, used for two ids, and closed."""

    def run_one() -> None:
        with open_generator(bundle) as generator:
            generator.generate([1], max_new_tokens=2)

    return measure_growth(times, run_one, samples=samples)


def measure_growth(times: int, run_one: Callable[[], object], *, samples: int) -> Growth:
    """The memory of this process while something is run so many times."""
    began, every = time.perf_counter(), max(1, times // samples)
    found: list[Sample] = []
    for number in range(1, times + 1):
        run_one()
        if number % every == 0:
            found.append((number, _resident_bytes()))
    seconds, late = time.perf_counter() - began, found[len(found) // 2 :]
    return Growth(times, seconds, tuple(found), *_slope(late), _floor(late))


def _resident_bytes() -> int:
    """Bytes of this process that are in memory, once all went that nobody holds.

    Garbage in cycles waits for the collector, and glibc keeps freed memory for later, in pieces
    that depend on what came when. Both come and go and are no leak, but would drown a small one.
    """
    gc.collect()
    with suppress(OSError, AttributeError):  # another libc
        ctypes.CDLL(None).malloc_trim(0)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def _slope(samples: Sequence[Sample]) -> tuple[float, float]:
    """Of the least-squares line, and its standard error."""
    if len(samples) < 3:
        return 0.0, 0.0
    times, sizes = np.array(samples, np.float64).T
    line, covariance = np.polyfit(times, sizes, 1, cov=True)
    return float(line[0]), float(np.sqrt(covariance[0, 0]))


def _floor(samples: Sequence[Sample]) -> int:
    """By how much the least of the second half is above the least of the first."""
    sizes, half = [size for _, size in samples], len(samples) // 2
    return min(sizes[half:]) - min(sizes[:half]) if half else 0
