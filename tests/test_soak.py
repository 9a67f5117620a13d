"""The soak, bounded: the same four parts, and that each of them sees what it looks for."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random
from typing import Any

import pytest

from benchmarks.soak import damage, fuzz, harness, kinds, memory, storm, workload
from gptrt.errors import BundleError, GptrtError
from gptrt.generator import Generator
from gptrt.opening import embedded_bundle
from gptrt.results import Generation
from gptrt.testing import FakeDecoder, byte_tokenizer
from tests.fakes import noise

ROOT = Path(__file__).parents[1]
MEMORY = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="Linux only")
MB = 1_000_000


@pytest.fixture(scope="module")
def generator() -> Generator:
    return workload.open_generator(embedded_bundle())


@pytest.fixture(scope="module", autouse=True)
def frozen() -> Iterator[None]:
    """The soak collects garbage often, and would look at everything that torch brings along."""
    gc.freeze()
    yield
    gc.unfreeze()


# --- memory -------------------------------------------------------------------------------------


@MEMORY
def test_calls_of_every_sort_leave_memory_as_it_was(generator: Generator) -> None:
    assert abs(memory.generate_often(generator, 100, samples=10).grown) < 16 * MB
    assert not generator.calls.listed


@MEMORY
def test_opening_and_closing_leaves_memory_as_it_was() -> None:
    assert abs(memory.open_often(embedded_bundle(), 12, samples=6).grown) < 16 * MB


@MEMORY
def test_a_leak_is_seen_and_called_one() -> None:
    kept: list[bytes] = []
    growth = memory.measure_growth(40, lambda: kept.append(os.urandom(MB)), samples=10)
    assert growth.leaks
    assert growth.slope == pytest.approx(MB, rel=0.2)
    assert growth.grown == pytest.approx(20 * MB, rel=0.2)


def test_noise_is_no_leak() -> None:
    assert memory.Growth(100_000, 1.0, (), 50.0, 1.0, MB).leaks
    assert not memory.Growth(100_000, 1.0, (), 50.0, 40.0, MB).leaks
    assert not memory.Growth(100_000, 1.0, (), 50.0, 1.0, 0).leaks
    assert not memory.Growth(100_000, 1.0, (), -50.0, 1.0, -MB).leaks
    assert not memory.Growth(1000, 1.0, (), 50.0, 1.0, MB).leaks  # 25 kB in all


# --- cancelling ---------------------------------------------------------------------------------


def test_no_cancellation_of_a_storm_is_lost(generator: Generator) -> None:
    found = storm.cancel_often(generator, 40)
    assert set(found.ends) <= {"ended", "finished"}
    assert sum(found.ends.values()) == found.calls == 40
    assert found.ends["ended"] >= 10
    assert found.left == 0 and found.usable
    assert not found.failed


class Deaf(Generator):
    """One that `cancellation` and `timeout` do not reach."""

    def complete(self, prompt: Any, **options: Any) -> Generation:
        heard = {"max_new_tokens", "context_overflow", "progress"}
        return super().complete(prompt, **{k: v for k, v in options.items() if k in heard})


class Stuck(Generator):
    """One that nothing reaches, until it is freed."""

    freed: threading.Event

    def complete(self, prompt: Any, **options: Any) -> Generation:
        if "cancellation" in options:
            self.freed.wait()
        return super().complete(prompt, **options)


class Broken(Generator):
    """One that does not end as it should."""

    def complete(self, prompt: Any, **options: Any) -> Generation:
        if "cancellation" in options:
            raise RuntimeError("cancelled")
        return super().complete(prompt, **options)


@pytest.mark.parametrize(("kind", "end"), [(Deaf, "lost"), (Stuck, "hung"), (Broken, "raised")])
def test_a_lost_cancellation_is_seen(
    kind: type[Generator], end: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storm, "LONG_CALLS", (storm._complete,))
    monkeypatch.setattr(Stuck, "freed", threading.Event(), raising=False)
    generator = kind.from_parts(FakeDecoder(noise), byte_tokenizer())
    found = storm.cancel_often(generator, 4, workers=1, patience=0.1)
    Stuck.freed.set()
    assert found.ends.get(end) and found.failed


# --- damaged files ------------------------------------------------------------------------------


def test_damaged_files_are_refused_or_change_nothing() -> None:
    found = fuzz.damage_often(embedded_bundle(), 56)
    assert found.failures == []
    assert set(found.results) == set(kinds.KINDS)
    assert {sum(results.values()) for results in found.results.values()} == {8}
    for unseen in ("any file, its hash kept", "session"):
        assert set(found.results[unseen]) == {"refused"}


def test_a_seed_always_stands_for_the_same_damage() -> None:
    data = json.dumps({"a": [1, 2, {"b": "text"}], "c": None}).encode()
    for damaged in (damage.damaged_json, damage.damaged_bytes):
        versions = [[damaged(Random(seed), data) for seed in range(50)] for _ in range(2)]
        assert versions[0] == versions[1]
        assert len(set(versions[0])) > 20
    assert all(damage.damaged_bytes(Random(seed), data) != data for seed in range(200))


def misbehaving(pipe: Connection, seeds: Sequence[int]) -> None:
    """A child that is killed by 1, waits for ever at 2, and is well otherwise."""
    pipe.send(True)
    for seed in seeds:
        if seed == 1:
            os._exit(3)
        if seed == 2:
            time.sleep(600)
        pipe.send(harness.Outcome("refused"))


def test_a_case_that_kills_or_holds_up_its_process_is_told_and_the_next_one_runs() -> None:
    found = list(fuzz.outcomes(misbehaving, (0, 1, 2, 3), seconds=0.5))
    assert [seed for seed, _ in found] == [0, 1, 2, 3]
    assert [one.result for _, one in found] == ["refused", "crashed", "hung", "refused"]


def raising(error: BaseException) -> Callable[[], harness.Ids]:
    def run() -> harness.Ids:
        raise error

    return run


class Unprintable(GptrtError):
    def __str__(self) -> str:
        return "\ud800"


def test_what_is_no_error_of_gptrts_is_a_finding() -> None:
    ours = BundleError("this", found="that", do="nothing")
    assert harness.judged((1,), raising(ours)).result == "refused"
    unprintable = Unprintable("this", found="that", do="nothing")
    for error in (ValueError("x"), RecursionError(), MemoryError(), BaseException(), unprintable):
        outcome = harness.judged((1,), raising(error))
        assert outcome.result == "untyped"
        assert type(error).__name__ in outcome.what
    assert harness.judged((1,), lambda: (1,)).result == "same"
    assert harness.judged((1,), lambda: (2,)).result == "other"


def test_other_ids_are_a_finding_only_where_no_hash_agrees() -> None:
    names = list(kinds.KINDS)
    found = [(seed, harness.Outcome("other")) for seed in range(2 * len(names))]
    assert [(one.kind, one.seed, one.times) for one in fuzz.findings(found)] == [
        (kind, seed, 2) for seed, kind in enumerate(names) if "agreeing" not in kind
    ]


# --- the command --------------------------------------------------------------------------------


@MEMORY
def test_the_command_prints_a_table_and_writes_all_figures(tmp_path: Path) -> None:
    few = ("--generations", "5", "--opens", "0", "--cancels", "4", "--fuzz", "0")
    file = tmp_path / "soak.json"
    command = [sys.executable, "-m", "benchmarks.soak", *few, "--json", str(file)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "| generations | 5 in " in done.stdout
    assert "0 lost, 0 hung" in done.stdout
    figures = json.loads(file.read_text())
    assert figures["cancels"]["calls"] == 4
    assert figures["opens"] is None and figures["fuzz"] is None
