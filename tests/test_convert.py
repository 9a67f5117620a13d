"""Conversion: the graph is the model, the bundle is whole or not there, wrong input is refused."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx_ir as ir
import pytest
import torch
from numpy.typing import NDArray
from tokenizers.processors import TemplateProcessing

from export import kv_cache
from export import verify as measuring
from export.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from export.cli import main as gptrt_export
from export.data import open_ids, save_ids
from export.graph import build_graph
from export.kv_cache import calibrate_cache
from export.model import GPT
from export.nbits import SCALES_SUFFIX
from export.options import ConvertOptions
from export.pipeline import check_fidelity, convert, verify
from export.reopen import load_bundle
from export.runs import Run, open_run
from export.texts import TextFiles, choose_texts
from export.tokenization import TokenizerConfig, train_tokenizer
from gptrt.decoder import Decoder
from gptrt.errors import CheckpointError, DataError, FidelityError, OptionError, TargetError
from gptrt.format import Fidelity, Quantization, open_bundle, read_manifest
from gptrt.tokenizer import Tokenizer

from .conftest import GPT2_SHAPE, LLAMA_SHAPE, assert_refused, run_cli, scrambled, story
from .processes import start, wait_until

ROOT = Path(__file__).parents[1]
SHAPES = {
    "gpt2": GPT2_SHAPE,
    "gpt2-erf-untied": replace(GPT2_SHAPE, activation="gelu_erf", tied=False),
    "llama-grouped-heads": LLAMA_SHAPE,
    "llama-untied": replace(LLAMA_SHAPE, tied=False, rope_theta=5e5),
    "rotary-layernorm": replace(GPT2_SHAPE, positions="rotary", bias=False),
}
# Of vocabularies this large the first eighth is stored apart from the rest.
LARGE_VOCABULARIES = {
    "gpt2-large-vocabulary": replace(GPT2_SHAPE, vocab_size=1100),
    "llama-untied-large-vocabulary": replace(LLAMA_SHAPE, vocab_size=1100, tied=False),
}


def open_decoder(
    model: GPT, save_model: Callable[[GPT], Path], text: Path, tmp_path: Path, **options: object
) -> Decoder:
    out = tmp_path / "bundle"
    settings = ConvertOptions(verify_text=text, allow_loss=True, **options)  # type: ignore[arg-type]
    convert(save_model(model), out, settings)
    return Decoder(open_bundle(out), device="cpu", threads=1)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_fp32_graph_gives_pytorchs_logits_whole_in_chunks_and_in_single_steps(
    shape: str, save_model: Callable[[GPT], Path], text_file: Path, tmp_path: Path
) -> None:
    model = scrambled(SHAPES[shape])
    decoder = open_decoder(model, save_model, text_file, tmp_path, mode="none")
    ids = np.random.default_rng(0).integers(0, 300, (1, 48))
    with torch.no_grad():
        wanted = model(torch.from_numpy(ids)).numpy()
    for chunks in ([48], [20, 28], [5] + [1] * 43, [1] * 3 + [30] + [1] * 15):
        cache, found, start = decoder.new_cache(48), [], 0
        for size in chunks:
            found.append(decoder.run(ids[:, start : start + size], cache, keep=0).copy())
            start += size
        np.testing.assert_allclose(np.concatenate(found, axis=1), wanted, atol=1e-4)


def test_a_graph_has_a_node_for_each_thing_that_the_model_does_under_its_modules_name() -> None:
    model = scrambled(GPT2_SHAPE)
    nodes = [node.name for node in build_graph(model).graph]
    assert len(nodes) == len(set(nodes))
    assert (
        nodes.count("model.h.1.mlp.c_fc/MatMul")
        == nodes.count("model.ln_f/LayerNormalization")
        == 1
    )
    model.h[1].mlp = torch.nn.Sequential(torch.nn.ELU())
    with pytest.raises(TypeError, match="elu"):
        build_graph(model)


@pytest.mark.parametrize("shape", SHAPES)
def test_an_int8_cache_gives_nearly_pytorchs_logits_however_the_text_is_cut(
    shape: str, save_model: Callable[[GPT], Path], text_file: Path, tmp_path: Path
) -> None:
    model = scrambled(SHAPES[shape])
    options = {"mode": "none", "kv_cache": "int8", "window": 48}
    decoder = open_decoder(model, save_model, text_file, tmp_path, **options)
    assert decoder.manifest.cache.dtype == "int8"
    assert decoder.manifest.fidelity is not None and decoder.manifest.fidelity.window == 48
    card = (tmp_path / "bundle" / "README.md").read_text()
    assert "KV cache: int8" in card and "in windows of 48" in card
    tokenizer = Tokenizer.open(open_bundle(tmp_path / "bundle"))
    whole = np.array(tokenizer.encode(text_file.read_text()), np.uint32)
    half = len(whole) // 2  # the rest of a short text
    (wanted_scales, *_) = calibrate_cache(model, whole[half:], 48)
    stored = ir.load(tmp_path / "bundle" / "model.onnx").graph.initializers["cache.0.key_scale"]
    assert stored.const_value is not None
    np.testing.assert_allclose(stored.const_value.numpy(), wanted_scales.key, rtol=1e-5)
    ids = np.array([tokenizer.encode(text_file.read_text()[100:400])[:48]])
    with torch.no_grad():
        wanted = model(torch.from_numpy(ids)).numpy()
    found = {}
    for chunks in ((48,), (20, 28), (5,) + (1,) * 43):
        cache, parts, start = decoder.new_cache(48), [], 0
        for size in chunks:
            parts.append(decoder.run(ids[:, start : start + size], cache, keep=0).copy())
            start += size
        found[chunks] = np.concatenate(parts, axis=1)
        error = np.linalg.norm(found[chunks] - wanted) / np.linalg.norm(wanted)
        assert error < 0.025, chunks
        np.testing.assert_allclose(found[chunks], found[(48,)], atol=1e-3)


def test_a_cache_is_calibrated_on_windows_as_long_as_asked_and_no_longer_than_its_text(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = scrambled(GPT2_SHAPE)
    with torch.no_grad():
        model.wpe.weight[16:] = float("nan")  # who reads further, has it in the scales
    ids = np.arange(300, dtype=np.uint32)
    found = [calibrate_cache(model, ids, 16)]
    monkeypatch.setattr(kv_cache, "CALIBRATION_TOKENS", 16)
    found.append(calibrate_cache(model, ids))
    for layer in (layer for layers in found for layer in layers):
        assert np.isfinite(layer.key).all() and np.isfinite(layer.value).all()


def test_going_back_in_the_cache_gives_what_a_fresh_cache_gives(
    save_model: Callable[[GPT], Path], text_file: Path, tmp_path: Path
) -> None:
    decoder = open_decoder(scrambled(LLAMA_SHAPE), save_model, text_file, tmp_path, mode="none")
    ids = np.arange(20)[None]
    cache, fresh = decoder.new_cache(32), decoder.new_cache(32)
    decoder.run(ids, cache)
    for token in (7, 8, 9):
        decoder.run(np.array([[token]]), cache)
    cache.go_to(20)
    decoder.run(ids, fresh)
    step = np.array([[42]])
    assert np.array_equal(decoder.run(step, cache), decoder.run(step, fresh))


def test_rows_of_a_batch_are_computed_as_if_alone(
    save_model: Callable[[GPT], Path], text_file: Path, tmp_path: Path
) -> None:
    decoder = open_decoder(scrambled(GPT2_SHAPE), save_model, text_file, tmp_path, mode="none")
    ids = np.random.default_rng(1).integers(0, 300, (3, 10))
    together = decoder.new_cache(12, batch=3)
    first = decoder.run(ids, together).copy()
    second = decoder.run(ids[:, :1], together).copy()
    for row in range(3):
        alone = decoder.new_cache(12)
        np.testing.assert_allclose(decoder.run(ids[row : row + 1], alone)[0], first[row], atol=1e-5)
        again = decoder.run(ids[row : row + 1, :1], alone)
        np.testing.assert_allclose(again[0], second[row], atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "mode", "method", "bound"),
    [
        *((shape, "int8", "nearest", 0.01) for shape in SHAPES),
        *((shape, "int4", "gptq", 0.25) for shape in SHAPES),  # it may move what text never uses
        ("gpt2", "int8", "gptq", 0.02),
        ("gpt2", "int8", "k-quant", 0.01),
        ("gpt2", "int4", "nearest", 0.125),
        ("llama-untied", "int4", "k-quant", 0.13),
        ("llama-untied", "int4", "hqq", 0.15),
        ("gpt2", "int2", "gptq", 0.95),
        ("gpt2-large-vocabulary", "int4", "gptq", 0.2),
        ("llama-untied-large-vocabulary", "int4", "hqq", 0.15),
    ],
)
def test_a_quantized_graph_computes_with_the_matrices_that_it_stores(
    shape: str,
    mode: str,
    method: str,
    bound: float,
    save_model: Callable[[GPT], Path],
    text_file: Path,
    tmp_path: Path,
) -> None:
    model = scrambled((SHAPES | LARGE_VOCABULARIES)[shape])
    decoder = open_decoder(
        model, save_model, text_file, tmp_path, mode=mode, method=method, block_size=32
    )
    reopened = load_bundle(tmp_path / "bundle")
    plain = reopened.plain().state
    for name, tensor in model.state_dict().items():
        error = (plain[name] - tensor).norm() / tensor.norm()
        assert error < bound, name
    vocabulary = model.config.vocab_size
    ids = np.append(np.random.default_rng(0).integers(0, vocabulary, 31), vocabulary - 1)[None]
    found = decoder.run(ids, decoder.new_cache(32), keep=0)
    with torch.no_grad():
        wanted = reopened.model().eval()(torch.from_numpy(ids)).numpy()
    # What is left is the rounding of activations to 8 bits.
    assert np.linalg.norm(found - wanted) / np.linalg.norm(wanted) < 0.05


@pytest.mark.parametrize(
    ("activations", "wanted"),
    [("fp32", {576: {128}, 2304: {256}}), ("fp16", {576: {64}, 2304: {128}})],
)
def test_rows_of_a_wide_model_are_cut_as_its_device_is_fastest_with(
    activations: str,
    wanted: dict[int, set[int]],
    save_model: Callable[[GPT], Path],
    text_file: Path,
    tmp_path: Path,
) -> None:
    wide = replace(GPT2_SHAPE, n_layer=1, n_head=9, n_kv_head=9, n_embd=576, head_dim=64)
    model = scrambled(replace(wide, n_inner=2304))
    options = {"mode": "int4", "method": "nearest", "activations": activations}
    decoder = open_decoder(model, save_model, text_file, tmp_path, **options)
    found: dict[int, set[int]] = {}
    for node in ir.load(tmp_path / "bundle" / "model.onnx").graph:
        if node.op_type == "MatMulNBits" and node.attributes["bits"].as_int() == 4:
            columns, size = (node.attributes[key].as_int() for key in ("K", "block_size"))
            found.setdefault(columns, set()).add(size)
    assert found == wanted
    ids = np.random.default_rng(0).integers(0, 300, 32)[None]
    logits = decoder.run(ids, decoder.new_cache(32), keep=0)
    with torch.no_grad():
        reference = load_bundle(tmp_path / "bundle").model().eval()(torch.from_numpy(ids)).numpy()
    assert np.linalg.norm(logits - reference) / np.linalg.norm(reference) < 0.05


def test_a_tied_matrix_is_stored_once_and_every_matrix_is_quantized(
    save_model: Callable[[GPT], Path], text_file: Path, tmp_path: Path
) -> None:
    model = scrambled(GPT2_SHAPE)
    open_decoder(model, save_model, text_file, tmp_path, mode="int8", block_size=64)
    matrices = sum(p.numel() for p in model.parameters() if p.ndim == 2)
    rest = 4 * sum(p.numel() for p in model.parameters() if p.ndim == 1)
    size = read_manifest(tmp_path / "bundle").weights_bytes
    assert matrices < size - rest < matrices * 1.04 + 50_000  # scales, and the graph itself
    initializers = ir.load(tmp_path / "bundle" / "model.onnx").graph.initializers
    scales = [value for name, value in initializers.items() if name.endswith(SCALES_SUFFIX)]
    assert scales and all(value.dtype == ir.DataType.FLOAT16 for value in scales)


def test_a_bundle_whose_files_have_two_names_on_disk_can_be_taught(
    bundle: Path, copied: Path
) -> None:
    for file in bundle.iterdir():
        (copied / file.name).unlink(missing_ok=True)
        (copied / file.name).hardlink_to(file)
    found, wanted = load_bundle(copied).state, load_bundle(bundle).state
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_the_bundle_says_what_it_is_and_where_it_comes_from(bundle: Path, run: Run) -> None:
    manifest = read_manifest(bundle)
    assert manifest.model == run.config.model
    assert manifest.lineage["steps"] == "60"
    assert manifest.lineage["data"] == "story.txt"
    fidelity = manifest.fidelity
    assert fidelity is not None
    assert 0.99 < fidelity.perplexity_ratio < 1.005
    assert fidelity.top1 > 0.95
    assert fidelity.kl < 0.01
    card = (bundle / "README.md").read_text()
    assert f"{fidelity.perplexity_ratio:.4f} ± {fidelity.ratio_error:.4f}" in card
    assert {p.name for p in bundle.iterdir()} == {*manifest.files, "gptrt.json"}


def test_the_error_of_the_ratio_falls_with_the_text_that_it_is_measured_on(
    bundle: Path, run: Run, text_file: Path
) -> None:
    errors, ratios = [], []
    for tokens in (640, 16 * 640):
        _, found = verify(bundle, run.path, text_file, tokens=tokens)
        assert found.tokens == tokens
        assert found.ratio_error is not None
        errors.append(found.ratio_error)
        ratios.append(found.perplexity_ratio)
    assert errors[1] == pytest.approx(errors[0] / 4, rel=0.5)
    assert ratios[0] == pytest.approx(ratios[1], abs=4 * errors[0])


def test_an_existing_bundle_is_measured_as_it_was_when_it_was_made(
    bundle: Path,
    run: Run,
    text_file: Path,
    edit_manifest: Callable[[Callable[[dict[str, Any]], object]], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert verify(bundle, run.path)[1] == read_manifest(bundle).fidelity
    _, found = verify(bundle, run.path, text_file, tokens=1000, window=16)
    assert (found.window, found.tokens) == (16, 992)
    older = edit_manifest(lambda manifest: manifest["fidelity"].pop("window"))
    assert verify(older, run.path, text_file, tokens=1000)[1].window == 64
    monkeypatch.setattr(measuring, "_WINDOW_BYTES", 4 * 300 * 24)
    assert verify(older, run.path, text_file, tokens=1000)[1].window == 24


def test_a_run_is_judged_by_text_from_all_over_what_it_has_held_out(
    bundle: Path, run: Run, tmp_path: Path
) -> None:
    known = np.array(open_ids(run.valid_ids))[:1200]
    strange = np.random.default_rng(0).permutation(known)
    copied = tmp_path / "run"
    shutil.copytree(run.path, copied)

    def perplexity(*parts: NDArray[np.uint32]) -> float:
        save_ids(np.concatenate(parts), open_run(copied).valid_ids)
        return verify(bundle, copied, tokens=640)[1].perplexity

    lowest, highest = perplexity(known, known), perplexity(strange, strange)
    for mixed in (perplexity(known, strange), perplexity(strange, known)):
        assert 1.1 * lowest < mixed < highest / 1.1


@pytest.mark.parametrize(
    ("options", "ratio", "passes"),
    [
        (ConvertOptions(), 1.009, True),
        (ConvertOptions(), 1.011, False),
        (ConvertOptions(target_ratio=1.05), 1.03, True),
        (ConvertOptions(target_ratio=1.001), 1.009, False),
        (ConvertOptions(target_ratio=1.001, max_perplexity_ratio=1.02), 1.009, True),
        (ConvertOptions(), float("nan"), False),
    ],
)
def test_the_limit_is_what_was_asked_for_or_the_budget_or_that_of_the_mode(
    options: ConvertOptions, ratio: float, passes: bool
) -> None:
    figures = {"tokens": 1000, "perplexity": 9.0, "perplexity_reference": 9.0, "kl": 0.0}
    fidelity = Fidelity("text", **figures, perplexity_ratio=ratio, top1=1.0)  # type: ignore[arg-type]
    stored = Quantization("int4", "gptq", 4, 4, 32, 4.5)
    with nullcontext() if passes else pytest.raises(FidelityError):
        check_fidelity(fidelity, stored, options.limit)


def test_a_bundle_above_the_limit_fails_and_leaves_nothing(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    with pytest.raises(FidelityError, match="at most 0\\.5"):
        convert(run.path, out, ConvertOptions("int4", method="nearest", max_perplexity_ratio=0.5))
    assert list(tmp_path.iterdir()) == []
    convert(run.path, out, ConvertOptions("int4", method="nearest", allow_loss=True))
    assert open_bundle(out).manifest.quantization.mode == "int4"


@pytest.mark.parametrize(
    ("value", "mode", "error"),
    [(3e38, "none", FidelityError), (3e38, "int4", FidelityError)]
    + [(value, "int4", CheckpointError) for value in (float("nan"), float("-inf"))],
)
def test_a_model_that_computes_no_numbers_fails(
    value: float,
    mode: Literal["none", "int4"],
    error: type[Exception],
    save_model: Callable[[GPT], Path],
    text_file: Path,
    tmp_path: Path,
) -> None:
    model = scrambled(GPT2_SHAPE)
    with torch.no_grad():
        model.ln_f.weight[0] = value
    with pytest.raises(error, match=r"ln_f\.weight holds|numbers|ratio"):
        convert(save_model(model), tmp_path / "b", ConvertOptions(mode, verify_text=text_file))
    assert not (tmp_path / "b").exists()


def test_without_pytorch_the_command_says_what_to_install() -> None:
    code = """
import sys
sys.modules["torch"] = None
from export.cli import main
main(["convert", "nothing", "--out", "nowhere"])
"""
    command = [sys.executable, "-c", code]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 2
    assert "pip install 'gptrt[cpu,export]'" in ended.stderr
    assert len(ended.stderr.splitlines()) == 1


def test_a_bundle_can_be_fine_tuned(bundle: Path, text_file: Path, tmp_path: Path) -> None:
    arguments = ("train", "--from", bundle, "--data", text_file, "--out", tmp_path / "run")
    sizes = ("--set", "seq_len=32", "--set", "eval_every=2")
    done = run_cli(gptrt_export, *arguments, *sizes, "--max-steps", 4)
    assert done.exit_code == 0, done.output
    assert load_checkpoint(tmp_path / "run").lineage["base_data"] == "story.txt"
    assert open_run(tmp_path / "run").config.train.max_steps == 4
    log = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    assert json.loads(log[0])["step"] == 0  # what it started from was judged first


def test_json_output_has_the_agreed_keys(bundle: Path, run: Run, text_file: Path) -> None:
    keys = {"bundle", "quantize", "bytes", "perplexity", "perplexity_reference"}
    keys |= {"perplexity_ratio", "ratio_error", "kl", "top1", "greedy", "bits_per_weight"}
    checked = run_cli(
        gptrt_export, "verify", bundle, "--against", run.path, "--text", text_file, "--json"
    )
    assert checked.exit_code == 0, checked.output
    assert set(json.loads(checked.stdout)) == keys


def test_kill_9_during_conversion_leaves_no_bundle(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    for seen in (".bundle.*.partial", ".bundle.*.partial/model.onnx"):
        process = start("convert", run.path, "--out", out, errors=tmp_path / "errors")
        wait_until(process, lambda seen=seen: list(tmp_path.glob(seen)))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert not out.exists()
    convert(run.path, out, ConvertOptions(method="nearest", allow_loss=True))
    assert open_bundle(out)


# --- wrong input --------------------------------------------------------------------------------


def test_an_existing_bundle_is_kept_unless_force_says_otherwise(
    run: Run, copied: Path, tmp_path: Path
) -> None:
    before = (copied / "gptrt.json").read_bytes()
    arguments = ("convert", run.path, "--out", copied, "--allow-loss", "--method", "nearest")
    assert_refused(run_cli(gptrt_export, *arguments), "--force")
    assert (copied / "gptrt.json").read_bytes() == before
    link = tmp_path / "current"
    link.symlink_to(copied)
    result = run_cli(gptrt_export, *arguments[:3], link, *arguments[4:], "--force")
    assert result.exit_code == 0, result.output
    assert open_bundle(copied).manifest.quantization.mode == "int4"
    assert link.is_symlink() and set(tmp_path.iterdir()) == {link, copied}
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "file").write_text("mine")
    assert_refused(run_cli(gptrt_export, *arguments[:3], mine, "--force"), "another --out")
    assert (mine / "file").read_text() == "mine"


def test_what_comes_to_stand_in_the_way_of_a_bundle_is_kept(run: Run, tmp_path: Path) -> None:
    mine = tmp_path / "bundle" / "thesis.txt"

    def step(_line: str) -> None:
        mine.parent.mkdir(exist_ok=True)
        mine.write_text("mine")

    with pytest.raises(TargetError, match="bundle"):
        convert(run.path, mine.parent, ConvertOptions("int8", force=True), step)
    assert mine.read_text() == "mine"
    assert list(tmp_path.iterdir()) == [mine.parent]


def test_wrong_input_to_convert_is_refused_before_any_work(
    run: Run, save_model: Callable[[GPT], Path], tmp_path: Path
) -> None:
    out = tmp_path / "folders" / "that are not there" / "bundle"
    source = save_model(scrambled(GPT2_SHAPE))
    short = tmp_path / "short.txt"
    short.write_text("a")
    for error, path, options in (
        (CheckpointError, tmp_path / "nothing", {}),
        (DataError, source, {}),
        (DataError, source, {"verify_text": tmp_path / "nothing.txt"}),
        (DataError, source, {"verify_text": short}),
        (OptionError, run.path, {"block_size": 100}),
        (OptionError, run.path, {"mode": "fp16", "kv_cache": "int8"}),
        (OptionError, run.path, {"activations": "fp16", "kv_cache": "int8"}),
        (OptionError, run.path, {"mode": "fp16", "activations": "fp32"}),
    ):
        with pytest.raises(error):
            convert(path, out, ConvertOptions(**options))
        assert {path.name for path in tmp_path.iterdir()} == {"short.txt"}


def test_text_that_the_tokenizer_does_not_know_is_refused(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(TokenizerConfig("char"), [story()])
    config = replace(GPT2_SHAPE, vocab_size=tokenizer.get_vocab_size())
    checkpoint = Checkpoint(config, scrambled(config).state_dict(), tokenizer, {})
    save_checkpoint(checkpoint, tmp_path / "model")
    text = tmp_path / "text.txt"
    text.write_text(story(50) + "Ünseen", encoding="utf-8")
    arguments = ("convert", tmp_path / "model", "--out", tmp_path / "b", "--verify-text", text)
    assert_refused(run_cli(gptrt_export, *arguments), "text that the tokenizer knows", "text.txt")


def test_a_text_read_in_pieces_begins_once(
    text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = train_tokenizer(TokenizerConfig("bpe", 300), [story()])
    plain = tokenizer.encode(text_file.read_text()).ids
    tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|>:0 $A:0", pair=None, special_tokens=[("<|endoftext|>", 0)]
    )
    monkeypatch.setattr("export.data._PIECE", 97)
    texts = choose_texts(tmp_path, tokenizer, TextFiles(text_file, verify_tokens=len(plain)))
    assert texts.verify.tolist() == [0, *plain]


def test_wrong_input_to_verify_is_refused(
    bundle: Path, run: Run, save_model: Callable[[GPT], Path], text_file: Path
) -> None:
    small = save_model(scrambled(replace(GPT2_SHAPE, n_layer=1)))
    for word, source, *options in (
        ("--window from 2 to 64", run.path, "--window", 65),
        ("--max-perplexity-ratio", run.path, "--max-perplexity-ratio", "nan"),
        ("verify: --text", save_model(scrambled(GPT2_SHAPE))),
        ("n_layer 1, not 2", small, "--text", text_file),
    ):
        result = run_cli(gptrt_export, "verify", bundle, "--against", source, *options)
        assert_refused(result, word)


def test_output_that_cannot_be_written_is_refused(run: Run, tmp_path: Path) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("")
    assert_refused(run_cli(gptrt_export, "convert", run.path, "--out", blocker / "b"), "write")
    assert list(tmp_path.iterdir()) == [blocker]
