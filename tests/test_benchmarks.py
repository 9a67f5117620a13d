"""The benchmark, on a tiny shape: what it writes, never how fast anything was."""

from __future__ import annotations

import json
from contextlib import chdir
from pathlib import Path

import pytest
from click.testing import Result

from benchmarks.__main__ import main
from export.checkpoint import resolve_checkpoint
from export.runs import Run

from .conftest import run_cli

ROOT = Path(__file__).parents[1]
PNG = b"\x89PNG\r\n"


def benchmarks(*arguments: object) -> Result:
    with chdir(ROOT):  # where the processes that it starts find it
        return run_cli(main, *arguments)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("benchmarks") / "results"
    shapes = ("--shapes", "nano-char", "--sizes", "nano-char")
    kinds = ("--only", "gptrt int4,gptrt int4 with int8 head")
    done = benchmarks("run", *kinds, *shapes, "--rounds", 2, "--threads", 1, "--out", folder)
    assert done.exit_code == 0, done.stderr
    return folder


def test_every_value_of_every_round_is_kept(out: Path) -> None:
    results = json.loads((out / "results.json").read_text())
    assert {e["who"] for e in results["entries"]} == {"gptrt int4", "gptrt int4 with int8 head"}
    assert all(e["bytes"] > 0 and e["settings"]["quantize"] for e in results["entries"])
    samples = results["samples"]
    assert {s["round"] for s in samples} == {0, 1}
    assert {s["measure"] for s in samples} == {
        *("decode", "prefill", "cold", "load", "memory", "bandwidth", "context", "batch"),
    }
    assert all(s["value"] > 0 for s in samples)
    assert results["parameters"]["nano-char"] > 500_000
    assert "onnxruntime" in results["versions"]["gptrt"]


def test_the_report_has_a_table_and_the_settings(out: Path) -> None:
    report = (out / "results.md").read_text()
    assert "| gptrt int4 |" in report
    assert "share of limit" in report
    assert "GB/s" in report
    assert "- gptrt int4 with int8 head: quantize int4, head-bits 8" in report


def test_the_pictures_are_pictures_and_can_be_drawn_again(out: Path, tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- speeds -->\nyesterday\n<!-- /speeds -->\nafter\n")
    done = benchmarks("draw", out, out, "--out", tmp_path, "--readme", readme)
    assert done.exit_code == 0, done.stderr
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith("after\n")
    assert "| gptrt int4 |" in text and "yesterday" not in text
    for folder in (out, tmp_path):
        for name in ("bars.png", "curves.png"):
            assert (folder / name).read_bytes().startswith(PNG)


def test_parts_of_a_run_are_drawn_together_by_the_rounds_that_they_share(tmp_path: Path) -> None:
    """And not as if one machine had made what two have."""
    from benchmarks.report import report
    from benchmarks.results import RESULTS_FILE, Entry, Results, Sample, load

    def part(name: str, machine: str, *others: str) -> Path:
        who = ["gptrt int4", *others]
        entries = [Entry("tiny", each, 4, 1000, {}) for each in who]
        speeds = [
            Sample("tiny", each, "decode", 128, n, 100.0 * (1 + n) / (1 + i))
            for n in range(2)
            for i, each in enumerate(who)
        ]
        memory = [Sample("tiny", "machine", "bandwidth", 0, n, 10.0) for n in range(2)]
        made = Results("today", machine, 1, {}, [], {"tiny": 1}, entries, speeds + memory)
        (tmp_path / name).mkdir()
        made.save(tmp_path / name / RESULTS_FILE)
        return tmp_path / name / RESULTS_FILE

    parts = [part("a", "one", "llama.cpp Q4_0"), part("b", "one", "other int4", "third int4")]
    together = load(parts)
    assert together.by_round("tiny", "gptrt int4", "decode").keys() == {0, 1, 2, 3}
    assert "2.00 llama.cpp Q4_0, 2.00 other int4, 3.00 third int4" in report(together)
    with pytest.raises(ValueError, match="draw them apart"):
        load([parts[0], part("c", "another")])


def test_the_share_of_the_memory_limit_counts_weights_and_cache() -> None:
    from benchmarks.report import report
    from benchmarks.results import Entry, Results, Sample

    entry = Entry("tiny", "gptrt int4", bits=4, bytes=4000, settings={}, cache_bytes=10)
    assert entry.read(context=100, rows=2) == 4000 + 2 * 100 * 10
    speed = Sample("tiny", entry.who, "decode", 128, 0, value=101.0)
    memory = Sample("tiny", "machine", "bandwidth", 0, 0, value=1e-3)  # 201.6 times 4,960 bytes
    results = Results("today", "one", 1, {}, [], {"tiny": 1}, [entry], [speed, memory])
    assert report(results).count(" 50% |") == 1


def test_a_peer_that_is_not_there_is_named_and_left_out(tmp_path: Path) -> None:
    from benchmarks.peers import Peer
    from benchmarks.processes import Environments

    absent = Peer("absent", "absent", ("no-such-distribution",), ())
    assert Environments(tmp_path).versions(absent) is None


def test_an_unknown_peer_or_measure_is_refused(tmp_path: Path) -> None:
    for wrong in (("--only", "nobody"), ("--measures", "colour")):
        done = benchmarks("run", *wrong, "--out", tmp_path)
        assert done.exit_code == 2
        assert "choose from" in done.stderr


def test_perplexity_predicts_as_many_tokens_as_were_asked_for(
    tmp_path: Path, run: Run, text_file: Path
) -> None:
    checkpoint = resolve_checkpoint(run.path)
    texts = ("--text", text_file, "--calibration-text", text_file)
    given = (*texts, "--window", 32, "--windows", 4, "--threads", 1)
    done = benchmarks("perplexity", checkpoint, *given, "--only", "gptrt int8", "--out", tmp_path)
    assert done.exit_code == 0, done.stderr
    samples = json.loads((tmp_path / "results.json").read_text())["samples"]
    assert {s["x"] for s in samples} == {4 * 32}
    assert all(1 < s["value"] < 300 for s in samples)


def test_the_importance_of_an_input_is_its_mean_square(
    tmp_path: Path, run: Run, text_file: Path
) -> None:
    import numpy as np

    from benchmarks.models import read_checkpoint
    from benchmarks.texts import write_importance

    checkpoint = read_checkpoint("tiny", resolve_checkpoint(run.path))
    with np.load(write_importance(checkpoint, text_file, 32, tmp_path)) as found:
        width, inner = run.config.model.n_embd, run.config.model.n_inner
        normed = found["blk.1.attn_qkv.weight"]  # by a norm that has hardly been trained
        assert normed.shape == found["blk.1.attn_output.weight"].shape == (width,)
        assert found["blk.1.ffn_down.weight"].shape == (inner,)
        assert 0.9 < normed.mean() < 1.1
        assert all((found[name] > 0).all() for name in found.files)
