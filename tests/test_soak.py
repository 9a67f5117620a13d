"""The soak, bounded: the same four parts on a tiny bundle, and that they see what they look for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random
from typing import Any

import pytest

from benchmarks import soak
from gptrt.generator import Generator
from gptrt.results import Generation
from gptrt.testing import FakeDecoder, byte_tokenizer
from tests.fakes import noise

ROOT = Path(__file__).parents[1]
MEMORY = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="Linux only")
MB = 1_000_000


@pytest.fixture(scope="module")
def generator(bundle: Path) -> Generator:
    return soak.open_generator(bundle)


# --- memory -------------------------------------------------------------------------------------


@MEMORY
def test_calls_of_every_sort_leave_memory_as_it_was(generator: Generator) -> None:
    assert abs(soak.generate_often(generator, 150, samples=10).grown) < 16 * MB
    assert not generator.calls.listed


@MEMORY
def test_opening_and_closing_leaves_memory_as_it_was(bundle: Path) -> None:
    assert abs(soak.open_often(bundle, 20, samples=10).grown) < 16 * MB


@MEMORY
def test_a_leak_is_seen_and_called_one() -> None:
    kept: list[bytes] = []
    growth = soak.watched(40, lambda _: kept.append(os.urandom(MB)), samples=10)
    assert growth.leaks
    assert growth.slope == pytest.approx(MB, rel=0.2)
    assert growth.grown == pytest.approx(20 * MB, rel=0.2)


def test_noise_is_no_leak() -> None:
    assert soak.Growth(100_000, 1.0, (), 50.0, 1.0, MB).leaks
    assert not soak.Growth(100_000, 1.0, (), 50.0, 40.0, MB).leaks
    assert not soak.Growth(100_000, 1.0, (), 50.0, 1.0, 0).leaks
    assert not soak.Growth(100_000, 1.0, (), -50.0, 1.0, -MB).leaks
    assert not soak.Growth(1000, 1.0, (), 50.0, 1.0, MB).leaks  # 25 kB in all


# --- cancelling ---------------------------------------------------------------------------------


def test_no_cancellation_of_a_storm_is_lost(generator: Generator) -> None:
    storm = soak.cancel_often(generator, 40)
    assert (storm.lost, storm.hung, storm.raised, storm.left) == (0, 0, 0, 0)
    assert storm.ended + storm.finished == storm.calls == 40
    assert storm.ended >= 10
    assert storm.usable
    assert not storm.failed


class Deaf(Generator):
    """One that `cancellation` and `timeout` do not reach."""

    def complete(self, prompt: Any, **options: Any) -> Generation:
        heard = {"max_new_tokens", "context_overflow", "progress"}
        return super().complete(prompt, **{k: v for k, v in options.items() if k in heard})


def test_a_lost_cancellation_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(soak, "_LONG_CALLS", (soak._complete,))
    deaf = Deaf.from_parts(FakeDecoder(noise), byte_tokenizer())
    storm = soak.cancel_often(deaf, 4, workers=1, patience=0.2)
    assert storm.lost and storm.failed


# --- damaged files ------------------------------------------------------------------------------


def test_damaged_files_are_refused_or_change_nothing(bundle: Path) -> None:
    fuzz = soak.damage_often(bundle, 154)
    assert fuzz.failures == []
    assert set(fuzz.results) == set(soak.KINDS)
    assert {sum(results.values()) for results in fuzz.results.values()} == {22}
    for unseen in ("any file, its hash kept", "session"):
        assert set(fuzz.results[unseen]) <= {"refused", "running"}


def test_a_seed_always_stands_for_the_same_damage() -> None:
    data = json.dumps({"a": [1, 2, {"b": "text"}], "c": None}).encode()
    for damage in (soak.damaged_json, soak.damaged_bytes):
        versions = [[damage(Random(seed), data) for seed in range(50)] for _ in range(2)]
        assert versions[0] == versions[1]
        assert len(set(versions[0])) > 20
    assert all(soak.damaged_bytes(Random(seed), data) != data for seed in range(200))


def misbehaving(pipe: Connection) -> None:
    """A child that is killed by 1, waits for ever at 2, and is well otherwise."""
    pipe.send(True)
    while True:
        number = pipe.recv()
        if number == 1:
            os._exit(3)
        if number == 2:
            time.sleep(600)
        pipe.send(soak.Outcome("refused"))


def test_a_case_that_kills_or_holds_up_its_process_is_told_and_the_next_one_runs() -> None:
    with soak.Child(misbehaving, seconds=1.0) as child:
        found = [child.ask(number).result for number in (0, 1, 0, 2, 0)]
    assert found == ["refused", "crashed", "refused", "hung", "refused"]


def raising(error: BaseException) -> Callable[[], soak.Ids]:
    def run() -> soak.Ids:
        raise error

    return run


def test_what_is_no_error_of_gptrts_is_a_finding() -> None:
    from gptrt.errors import BundleError

    ours = BundleError("this", found="that", do="nothing")
    assert soak._judged((1,), raising(ours)).result == "refused"
    for error in (ValueError("x"), RecursionError(), MemoryError(), BaseException()):
        outcome = soak._judged((1,), raising(error))
        assert outcome.result == "untyped"
        assert outcome.what.startswith(type(error).__name__)
    assert soak._judged((1,), lambda: (1,)).result == "same"
    assert soak._judged((1,), lambda: (2,)).result == "other"


def test_other_ids_are_a_finding_only_where_no_hash_agrees() -> None:
    kinds = list(soak.KINDS)
    found = [(seed, soak.Outcome("other")) for seed in range(2 * len(kinds))]
    findings = soak._findings(found)
    assert [(one.kind, one.seed, one.times) for one in findings] == [
        (kind, seed, 2) for seed, kind in enumerate(kinds) if "agreeing" not in kind
    ]


# --- the command --------------------------------------------------------------------------------


@MEMORY
def test_the_command_prints_a_table_and_writes_all_figures(bundle: Path, tmp_path: Path) -> None:
    few = ("--generations", "5", "--opens", "0", "--cancels", "4", "--fuzz", "0")
    file = tmp_path / "soak.json"
    command = [sys.executable, "-m", "benchmarks.soak", str(bundle), *few, "--json", str(file)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "| generations | 5 in " in done.stdout
    assert "0 lost, 0 hung" in done.stdout
    figures = json.loads(file.read_text())
    assert figures["cancels"]["calls"] == 4
    assert figures["opens"] is None and figures["fuzz"] is None
