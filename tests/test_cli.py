"""The command `gptrt`: what it prints, what it ends with, and what it refuses."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from numpy.typing import NDArray

from export.cli import main as gptrt_export
from export.data import VALID_IDS, open_ids
from export.runs import DATA_FOLDER, Run
from gptrt.cli import main as gptrt
from gptrt.config import GenerationConfig
from gptrt.decoder import Decoder
from gptrt.engine import import_onnxruntime
from gptrt.format import open_bundle, read_manifest
from gptrt.generator import Generator
from gptrt.tokenizer import Tokenizer

from .conftest import SLOW_GPTRT, assert_refused, run_cli, story

PROMPT = "The old king said"
GPTRT = [sys.executable, "-W", "error", "-c", "from gptrt.cli import main; main()"]


def printed(*arguments: object) -> str:
    result = run_cli(gptrt, *arguments)
    assert (result.exit_code, result.stderr) == (0, ""), (result.output, result.exception)
    return result.stdout


def printed_json(*arguments: object) -> Any:
    return json.loads(printed(*arguments, "--json"))


def fed(data: bytes, *arguments: object) -> Result:
    """The command with `data` on its standard input."""
    return CliRunner().invoke(gptrt, [str(argument) for argument in arguments], input=data)


def assert_bad_usage(result: Result, *words: str) -> None:
    """A command line that cannot be understood: status 2 and one line, nothing printed."""
    assert (result.exit_code, result.stdout) == (2, "")
    (line,) = result.stderr.splitlines()
    assert line.startswith("gptrt: error: ")
    assert all(word in line for word in words), line


# --- generate -----------------------------------------------------------------------------------


def test_generate_prints_the_text_and_ends_the_line(bundle: Path) -> None:
    text = Generator(bundle).generate(PROMPT, max_new_tokens=20)
    assert text
    assert printed("generate", bundle, PROMPT, "--max-new-tokens", 20) == text + "\n"


def test_generate_json_is_one_object_and_nothing_else_on_standard_output(bundle: Path) -> None:
    command = [*GPTRT, "generate", str(bundle), PROMPT, "--max-new-tokens", "9", "--json"]
    done = subprocess.run(command, capture_output=True, check=True, text=True)
    assert done.stdout.endswith("}\n")
    found = json.loads(done.stdout)
    wanted = Generator(bundle).complete(PROMPT, max_new_tokens=9)
    assert found == {
        "text": wanted.text,
        "prompt_ids": list(wanted.prompt_ids),
        "ids": list(wanted.ids),
        "finish_reason": "length",
    }


def test_the_same_seed_gives_the_same_text_and_another_seed_another(bundle: Path) -> None:
    def drawn(seed: int) -> str:
        return printed("generate", bundle, PROMPT, "--temperature", 1.5, "--seed", seed)

    assert drawn(7) == drawn(7) != drawn(8)


def test_a_dash_reads_the_prompt_from_standard_input(bundle: Path) -> None:
    result = fed(PROMPT.encode(), "generate", bundle, "-", "--max-new-tokens", 20)
    assert result.exit_code == 0
    assert result.stdout == printed("generate", bundle, PROMPT, "--max-new-tokens", 20)


def test_a_stop_string_ends_the_text_before_itself(bundle: Path) -> None:
    whole = printed("generate", bundle, PROMPT).removesuffix("\n")
    first, second = whole[10:13], whole[6:8]
    shown = printed("generate", bundle, PROMPT, "--stop", first, "--stop", second)
    assert shown == whole[: min(whole.index(first), whole.index(second))] + "\n"
    assert printed_json("generate", bundle, PROMPT, "--stop", first)["finish_reason"] == "stop"


def test_every_option_of_sampling_reaches_the_sampler(bundle: Path) -> None:
    options: dict[str, Any] = {
        "max_new_tokens": 24,
        "min_new_tokens": 3,
        "temperature": 1.7,
        "top_k": 40,
        "top_p": 0.9,
        "min_p": 0.01,
        "repetition_penalty": 1.2,
        "no_repeat_ngram_size": 2,
        "max_time": 1000.0,
        "seed": 3,
    }
    arguments = [word for k, v in options.items() for word in ("--" + k.replace("_", "-"), v)]
    wanted = Generator(bundle).complete(PROMPT, **options)
    assert printed_json("generate", bundle, PROMPT, *arguments)["ids"] == list(wanted.ids)


# --- signals and pipes --------------------------------------------------------------------------


def test_ctrl_c_ends_a_stream_with_130_and_without_a_traceback(bundle: Path) -> None:
    command = [*GPTRT[:-1], SLOW_GPTRT, "generate", str(bundle), PROMPT]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        first = process.stdout.read(1)  # so the text is streamed: more than 2 s of it are to come
        process.send_signal(signal.SIGINT)
        rest, complaint = process.stdout.read(), process.stderr.read()
    assert process.returncode == 130
    assert complaint.strip() == b""
    whole = printed("generate", bundle, PROMPT)
    assert whole.startswith((first + rest).decode().removesuffix("\n"))
    assert len(first + rest) < len(whole)


@pytest.mark.parametrize(
    "arguments",
    [["generate", "{}", PROMPT], ["generate", "{}", PROMPT, "--json"], ["info", "{}"], ["--help"]],
)
def test_a_reader_that_has_gone_ends_the_command_quietly(
    bundle: Path, arguments: list[str]
) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [*GPTRT, *(a.format(bundle) for a in arguments)]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.parametrize("stream", ["<", ">"])
def test_a_closed_stream_is_said_in_one_line(stream: str) -> None:
    command = f"{shlex.join(GPTRT)} generate - {stream}&-"
    done = subprocess.run(["sh", "-c", command], stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "closed" in line


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, a full disk")
def test_output_that_cannot_be_written_is_said_in_one_line(bundle: Path) -> None:
    with Path("/dev/full").open("w") as full:
        command = [*GPTRT, "generate", str(bundle), PROMPT]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "standard output; found No space left" in line


# --- bench --------------------------------------------------------------------------------------


def test_bench_json_has_the_agreed_keys_and_positive_figures(bundle: Path) -> None:
    found = printed_json("bench", bundle, "--prompt-tokens", 8, "--new-tokens", 8, "--threads", 1)
    assert list(found) == [
        "load_s",
        "prefill_tok_s",
        "decode_tok_s",
        "ttft_s",
        "loop_overhead_us",
        "peak_rss_mb",
        "weights_bytes",
    ]
    assert all(value > 0 for value in found.values()), found
    assert found["weights_bytes"] == sum(p.stat().st_size for p in bundle.glob("model.onnx*"))


def test_bench_without_json_shows_the_same_figures_to_people(bundle: Path) -> None:
    lines = printed("bench", bundle, "--prompt-tokens", 8, "--new-tokens", 8).splitlines()
    shown = dict(line.split() for line in lines)
    assert float(shown["decode_tok_s"]) > 0
    assert len(shown) == 7


@pytest.mark.parametrize("sizes", [(0, 8), (8, 1), (60, 5), (-1, 4), (10**18, 4)])
def test_bench_refuses_sizes_that_do_not_fit_the_context(
    bundle: Path, sizes: tuple[int, int]
) -> None:
    asked = ("--prompt-tokens", sizes[0], "--new-tokens", sizes[1])
    assert_refused(run_cli(gptrt, "bench", bundle, *asked), "at most 64 together")


# --- perplexity ---------------------------------------------------------------------------------


def nll_by_hand(bundle: Path, ids: list[int], windows: list[tuple[int, int, int]]) -> float:
    """The mean over windows (begin, first predicted, end), straight from the definition."""
    decoder = Decoder(open_bundle(bundle), device="cpu")
    values: list[float] = []
    for begin, first, end in windows:
        logits = decoder.run([ids[begin : end - 1]], decoder.new_cache(64), keep=0)
        rows: NDArray[np.float64] = logits[0].astype(np.float64)
        for position in range(first, end):
            row = rows[position - 1 - begin]
            values.append(float(np.log(np.exp(row).sum()) - row[ids[position]]))
    return float(np.mean(values))


def test_perplexity_is_the_one_computed_by_hand_from_logits(bundle: Path, tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("the silent queen is none of seven birds; " * 8)
    ids = Tokenizer.open(open_bundle(bundle)).encode(file.read_text())
    count = len(ids)
    assert count > 130  # so that there are three windows at least
    # Windows of 64 inputs side by side; the last one reaches back, so that it is full as well.
    side_by_side = [(i, i + 1, i + 65) for i in range(0, count - 65, 64)]
    side_by_side.append((count - 65, side_by_side[-1][2], count))
    one_by_one = [(max(0, i - 64), i, i + 1) for i in range(1, count)]
    for options, windows in (((), side_by_side), (("--stride", 1), one_by_one)):
        found = printed_json("perplexity", bundle, file, *options)
        assert list(found) == ["perplexity", "nll", "tokens"]
        assert found["tokens"] == count - 1
        assert found["nll"] == pytest.approx(nll_by_hand(bundle, ids, windows), rel=1e-4)
        assert found["perplexity"] == pytest.approx(np.exp(found["nll"]), rel=1e-9)


def test_perplexity_is_the_figure_that_the_exporter_wrote_into_the_manifest(
    bundle: Path, run: Run, tmp_path: Path
) -> None:
    promised = read_manifest(bundle).fidelity
    assert promised is not None
    tokenizer = Tokenizer.open(open_bundle(bundle))
    ids = open_ids(run.path / DATA_FOLDER / VALID_IDS)[: promised.tokens + 1].tolist()
    file = tmp_path / "held-out.txt"
    file.write_text(tokenizer.decode(ids))
    assert tokenizer.encode(file.read_text()) == ids
    found = printed_json("perplexity", bundle, file)
    assert found["tokens"] == promised.tokens
    assert found["perplexity"] == pytest.approx(promised.perplexity, rel=1e-3)


def test_perplexity_and_the_exporters_verify_agree_on_any_text(
    bundle: Path, run: Run, tmp_path: Path
) -> None:
    encode = Tokenizer.open(open_bundle(bundle)).encode
    words = story(30)[5:].split(" ")
    texts = (" ".join(words[:n]) for n in range(200, len(words)))
    file = tmp_path / "text.txt"
    file.write_text(next(t for t in texts if len(encode(t)) % 64 == 1))  # whole windows only
    asked = ("verify", bundle, "--against", run.path, "--text", file, "--json")
    wanted = json.loads(run_cli(gptrt_export, *asked).stdout)["perplexity"]
    assert printed_json("perplexity", bundle, file)["perplexity"] == pytest.approx(wanted, rel=1e-3)


# --- verify, info, doctor -----------------------------------------------------------------------


def test_verify_counts_what_it_checked(bundle: Path) -> None:
    manifest = read_manifest(bundle)
    assert printed_json("verify", bundle) == {
        "bundle": str(bundle),
        "files": len(manifest.files),
        "prompts": len(manifest.golden),
        "ids": sum(len(golden.ids) for golden in manifest.golden),
    }
    assert any(golden.ids for golden in manifest.golden)
    assert str(bundle) in printed("verify", bundle)


def test_info_says_what_a_bundle_is_and_where_it_comes_from(bundle: Path) -> None:
    found = printed_json("info", bundle)
    assert found["model"]["n_embd"] == 64
    assert found["quantization"]["mode"] == "int8"
    assert found["fidelity"]["text"] == "the run's held-out text"
    assert found["lineage"]["data"] == "story.txt"
    assert found["weights_bytes"] == sum(p.stat().st_size for p in bundle.glob("model.onnx*"))
    shown = printed("info", bundle)
    assert all(shown.count(f"\n{key}") == 1 for key in ("model", "quantization", "lineage"))


def test_doctor_finds_all_that_gptrt_needs() -> None:
    found = printed_json("doctor")
    needed = ("python", "numpy", "tokenizers", "click", "onnxruntime", "providers", "threads")
    assert {found[what]["level"] for what in needed} == {"ok"}
    assert "CPUExecutionProvider" in found["providers"]["found"]
    assert "onnxruntime" in printed("doctor")


def test_doctor_says_what_it_finds_also_of_a_bundle_that_does_not_run(copied: Path) -> None:
    (copied / "model.onnx").write_bytes(b"damaged")
    result = run_cli(gptrt, "doctor", copied, "--json")
    found = json.loads(result.stdout)
    assert result.exit_code == 1 and found["python"]["level"] == "ok"
    assert found["bundle"]["level"] == "missing" and "model.onnx" in found["bundle"]["found"]


# --- wrong input --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--temperature", "-1"], ("temperature=-1",)),
        (["--temperature", "nan"], ("temperature=nan",)),
        (["--top-p", "2"], ("top_p=2",)),
        (["--top-k", "-3"], ("top_k=-3",)),
        (["--max-new-tokens", "0"], ("max_new_tokens=0",)),
        (["--seed", str(1 << 64)], (f"seed={1 << 64}",)),
        (["--stop", ""], ("stop_strings",)),
        (["--temperature", "-1", "--top-p", "2"], ("temperature=-1", "top_p=2")),
        (["--threads", "0"], ("1 to 1024 threads", "found 0")),
    ],
)
def test_an_option_out_of_range_is_refused_with_its_range(
    bundle: Path, arguments: list[str], words: tuple[str, ...]
) -> None:
    assert_refused(run_cli(gptrt, "generate", bundle, PROMPT, *arguments), *words)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ("Missing command", "--help")),
        (["sing"], ("'sing'", "--help")),
        (["generate"], ("[BUNDLE] PROMPT", "--help")),
        (["generate", "{}", "two", "words"], ("[BUNDLE] PROMPT", "3 words", "quote the prompt")),
        (["generate", "{}", "x", "--num-beam-groups", "2"], ("--num-beam-groups", "--help")),
        (["generate", "{}", "x", "--top-k", "many"], ("--top-k", "'many'", "--help")),
        (["generate", "{}", "x", "--device", "tpu"], ("'tpu'", "'cuda'", "--help")),
        (["perplexity"], ("FILE", "--help")),
        (["perplexity", "{}", "a.txt", "b.txt"], ("[BUNDLE] FILE", "3 paths")),
        (["bench", "{}", "--threads", "1.5"], ("--threads", "'1.5'", "--help")),
    ],
)
def test_a_command_line_that_makes_no_sense_is_refused_with_the_way_to_help(
    bundle: Path, arguments: list[str], words: tuple[str, ...]
) -> None:
    assert_bad_usage(run_cli(gptrt, *(a.format(bundle) for a in arguments)), *words)


def test_help_tells_the_defaults_of_the_library() -> None:
    shown = " ".join(run_cli(gptrt, "generate", "--help").stdout.split())
    assert f"default: {GenerationConfig().max_new_tokens}." in shown


def test_a_bundle_alone_is_no_prompt(bundle: Path) -> None:
    result = run_cli(gptrt, "generate", bundle)
    assert result.exit_code == 2
    assert f"Wanted a prompt after the bundle {bundle}" in result.stderr
    for words in ("once " * 2000, "nul\0"):
        assert run_cli(gptrt, "generate", words, "--max-new-tokens", 1).exit_code in (0, 2)


def test_an_empty_prompt_is_refused(bundle: Path) -> None:
    assert_refused(run_cli(gptrt, "generate", bundle, ""), "one token or more", "give some text")
    assert_refused(fed(b"", "generate", bundle, "-"), "one token or more", "give some text")


def test_a_prompt_beyond_the_context_is_refused_with_both_lengths(bundle: Path) -> None:
    ids = Tokenizer.open(open_bundle(bundle)).encode(story(9))
    result = run_cli(gptrt, "generate", bundle, story(9))
    assert_refused(result, "at most 63 tokens", f"found {len(ids)} tokens", "shorten the prompt")
    assert result.stdout == ""


def test_text_that_is_not_utf_8_is_refused(bundle: Path, tmp_path: Path) -> None:
    file = tmp_path / "latin-1.txt"
    file.write_bytes("déjà vu".encode("latin-1"))
    assert_refused(run_cli(gptrt, "perplexity", bundle, file), "UTF-8 text in", "latin-1.txt")
    result = fed(file.read_bytes(), "generate", bundle, "-")
    assert_refused(result, "UTF-8 text in standard input")


@pytest.mark.parametrize("prompt", [b"d\xe9j\xe0 vu", b"\xff"])
def test_a_prompt_that_is_not_utf_8_is_refused(bundle: Path, prompt: bytes) -> None:
    command = [os.fsencode(word) for word in (*GPTRT, "generate", str(bundle))]
    done = subprocess.run([*command, prompt], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert "wanted text" in line


def test_text_that_cannot_be_scored_is_refused(bundle: Path, tmp_path: Path) -> None:
    empty, short = tmp_path / "empty.txt", tmp_path / "short.txt"
    empty.write_text("")
    short.write_text("a")
    nothing = run_cli(gptrt, "perplexity", bundle, tmp_path / "nothing.txt")
    assert_refused(nothing, "nothing.txt", "No such file", "check the path")
    assert_refused(run_cli(gptrt, "perplexity", bundle, tmp_path), "Is a directory")
    assert_refused(run_cli(gptrt, "perplexity", bundle, empty), "two tokens", "found 0 tokens")
    assert_refused(run_cli(gptrt, "perplexity", bundle, short), "two tokens", "found 1 tokens")


@pytest.mark.parametrize("stride", [0, -1, 65])
def test_a_stride_that_does_not_fit_the_window_is_refused(
    bundle: Path, text_file: Path, stride: int
) -> None:
    result = run_cli(gptrt, "perplexity", bundle, text_file, "--stride", stride)
    assert_refused(result, "1 <= stride <= window <= 64", f"found stride {stride}")


@pytest.mark.parametrize("command", ["generate", "bench", "verify", "perplexity"])
def test_cuda_where_there_is_none_is_refused_with_what_to_install(
    bundle: Path, text_file: Path, command: str
) -> None:
    if "CUDAExecutionProvider" in import_onnxruntime().get_available_providers():
        pytest.skip("onnxruntime has CUDA here")
    rest = {"generate": [PROMPT], "perplexity": [str(text_file)]}.get(command, [])
    result = run_cli(gptrt, command, bundle, *rest, "--device", "cuda")
    assert_refused(result, "CUDA provider", "pip install 'gptrt[cuda]'")
