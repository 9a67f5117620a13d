"""What a run has measured: every single value, kept as JSON; medians are taken when it is shown."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

RESULTS_FILE = "results.json"
BANDWIDTH = "bandwidth"  # of the machine, in GB/s: a measure that no runtime has
DECODE_PROMPT, DECODE_NEW = 32, 128  # ids of what decoding is measured by
DECODE_CONTEXT = DECODE_PROMPT + DECODE_NEW / 2  # on the mean
CURVE_NEW = 32  # ids by which a point of the other curves is


@dataclass(frozen=True)
class Sample:
    """One value. `measure` at `x`, by the runtime `who`, on the model `shape`, in a round.

    decode, context, batch: tokens/s at so many new tokens, at a context length, at a batch size;
    prefill: tokens/s of a prompt of `x`; cold, load: seconds; memory: 10**6 bytes;
    perplexity: over `x` tokens; bandwidth: GB/s.
    """

    shape: str
    who: str
    measure: str
    x: int
    round: int
    value: float


@dataclass(frozen=True)
class Entry:
    """What is known of a runtime on a shape beside its samples: the bytes of its files, and of what
    its cache keeps of a position."""

    shape: str
    who: str
    bits: int
    bytes: int
    settings: dict[str, Any]
    cache_bytes: int = 0

    def read(self, context: float = DECODE_CONTEXT, rows: int = 1) -> float:
        """Bytes that a step reads: all weights, and each row's cache at a context."""
        return self.bytes + rows * context * self.cache_bytes


@dataclass(frozen=True)
class Results:
    """A whole run. `skipped` says by name what was left out, and why."""

    date: str
    machine: str
    threads: int
    versions: dict[str, dict[str, str]]  # by peer and package
    skipped: list[str]
    parameters: dict[str, int]  # of each shape
    entries: list[Entry]
    samples: list[Sample]

    def values(self, shape: str, who: str, measure: str, x: int | None = None) -> list[float]:
        return [
            s.value
            for s in self.samples
            if (s.shape, s.who, s.measure) == (shape, who, measure) and x in (None, s.x)
        ]

    def by_round(self, shape: str, who: str, measure: str) -> dict[int, float]:
        wanted = (shape, who, measure)
        return {s.round: s.value for s in self.samples if (s.shape, s.who, s.measure) == wanted}

    def points(self, shape: str, who: str, measure: str) -> list[int]:
        """Where a measure was taken."""
        wanted = (shape, who, measure)
        return sorted({s.x for s in self.samples if (s.shape, s.who, s.measure) == wanted})

    def shapes(self, measure: str) -> list[str]:
        """Those on which a measure was taken, in order."""
        return list(dict.fromkeys(s.shape for s in self.samples if s.measure == measure))

    @property
    def tables(self) -> list[str]:
        """Those that everything was measured on, and not only the curve of sizes."""
        return self.shapes("load") or self.shapes("decode")

    def entries_of(self, shape: str, measure: str) -> Iterator[Entry]:
        measured = {s.who for s in self.samples if (s.shape, s.measure) == (shape, measure)}
        return (e for e in self.entries if e.shape == shape and e.who in measured)

    def bandwidth(self, shape: str) -> float:
        """GB/s, the median while the shape was measured: what a shared machine has changes."""
        return median(self.values(shape, "machine", BANDWIDTH))

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")


def load(paths: list[Path]) -> Results:
    """Runs that one machine made in parts, as one, with the date of the first: the rounds of each
    come after those of the parts before it. Raises ValueError for several machines."""
    parts = [json.loads(path.read_text()) for path in paths]
    if len({(part["machine"], part["threads"]) for part in parts}) > 1:
        raise ValueError("runs of several machines or numbers of threads: draw them apart")
    before = 0
    for part in parts:
        for sample in part["samples"]:
            sample["round"] += before
        before = 1 + max((sample["round"] for sample in part["samples"]), default=before - 1)
    entries = [Entry(**e) for part in parts for e in part["entries"]]
    whole = parts[0] | {
        "versions": {k: v for part in parts for k, v in part["versions"].items()},
        "parameters": {k: v for part in parts for k, v in part["parameters"].items()},
        "skipped": list(dict.fromkeys(line for part in parts for line in part["skipped"])),
        "entries": list({(e.shape, e.who): e for e in entries}.values()),
        "samples": [Sample(**s) for part in parts for s in part["samples"]],
    }
    return Results(**whole)
