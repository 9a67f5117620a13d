"""Everything that a soak has found, as one table in Markdown and as a verdict."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from .fuzz import Fuzz
from .memory import Growth
from .storm import Storm

Row = tuple[str, str, str, str]


@dataclass(frozen=True)
class Report:
    """None is what was not run."""

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
        grown = any(one.leaks for one in (self.generations, self.opens) if one)
        stormy = self.cancels is not None and self.cancels.failed
        return grown or stormy or bool(self.fuzz and self.fuzz.failures)

    def table(self) -> str:
        versions = ", ".join(f"{name} {number}" for name, number in self.versions.items())
        head = f"{self.bundle}, {self.date}, {self.machine}; {versions}"
        rows = [("what", "how often", "found", ""), ("---", "---", "---", "---"), *self._rows()]
        return "\n".join((head, "", *(f"| {' | '.join(row)} |" for row in rows)))

    def _rows(self) -> Iterator[Row]:
        if self.generations:
            yield _growth_row("generations", self.generations)
        if self.opens:
            yield _growth_row("opened and closed", self.opens)
        if self.cancels:
            yield _storm_row(self.cancels)
        if self.fuzz:
            yield from _fuzz_rows(self.fuzz)


def _growth_row(what: str, growth: Growth) -> Row:
    sizes = [size / 1e6 for _, size in growth.samples]
    found = (
        f"{growth.slope:+.1f} ± {growth.error:.1f} bytes each: {growth.grown / 1e6:+.2f} MB over "
        f"the second half, its floor {growth.floor / 1e6:+.2f} MB; {min(sizes):.1f} to "
        f"{max(sizes):.1f} MB"
    )
    times = f"{growth.times:,} in {growth.seconds:.0f} s"
    return what, times, found, "LEAKS" if growth.leaks else "no growth"


def _storm_row(storm: Storm) -> Row:
    said = {"finished": "had finished"}
    ends = ("ended", "finished", "lost", "hung", "raised")
    counts = ", ".join(f"{storm.ends.get(end, 0)} {said.get(end, end)}" for end in ends)
    found = (
        f"{counts}, {storm.left} left over; median {storm.median_ms:.1f} ms, worst "
        f"{storm.worst_ms:.1f} ms; {'same' if storm.usable else 'OTHER'} ids after"
    )
    times = f"{storm.calls:,} in {storm.seconds:.0f} s"
    return "cancelled", times, found, "FAILED" if storm.failed else "none lost"


def _fuzz_rows(fuzz: Fuzz) -> Iterator[Row]:
    for kind, results in fuzz.results.items():
        found = ", ".join(f"{number} {result}" for result, number in sorted(results.items()))
        bad = sum(one.times for one in fuzz.failures if one.kind == kind)
        verdict = f"{bad} FAILED" if bad else "ok"
        yield f"damaged: {kind}", f"{sum(results.values()):,}", found, verdict
    for one in fuzz.findings:
        verdict = "native" if one.native else "FAILED"
        found = f"{one.outcome.result} {one.outcome.what}"[:160].replace("|", "/")
        yield f"finding: {one.kind}", f"{one.times}, first of seed {one.seed}", found, verdict
