"""Architectures that another library builds: through our rounding, our gate and our runtime."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch

from export import via
from export.cli import main as gptrt_export
from export.model import GPT
from export.pipeline import verify
from export.reopen import load_bundle
from export.runs import Run
from export.tokenization import TokenizerConfig, train_tokenizer
from gptrt.cli import main as gptrt
from gptrt.errors import CheckpointError
from gptrt.format import open_bundle, read_manifest
from gptrt.generator import Generator
from gptrt.opening import open_decoder

from .conftest import LLAMA_SHAPE, assert_refused, run_cli, scrambled, story

transformers = pytest.importorskip("transformers", reason="the reference implementation")

_LLAMA = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
_OLD = {"vocab_size": 300, "n_embd": 128, "n_layer": 2, "n_head": 4, "n_positions": 128}
CONFIGS: dict[str, dict[str, Any]] = {
    "gemma2": _LLAMA | {"head_dim": 16, "sliding_window": 128},
    "gemma2-windows": _LLAMA | {"head_dim": 16, "sliding_window": 24},
    "phi3": _LLAMA | {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    "gptj": _OLD | {"rotary_dim": 16},
    "bloom": {"vocab_size": 300, "hidden_size": 64, "n_layer": 2, "n_head": 4, "seq_length": 128},
    "olmo2": _LLAMA | {"pad_token_id": 0},
    "granite": _LLAMA,
    "falcon": {
        "vocab_size": 300,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "new_decoder_architecture": True,
        "num_kv_heads": 2,
        "max_position_embeddings": 128,
    },
    "falcon-new": {
        "vocab_size": 300,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
        "new_decoder_architecture": True,
        "num_kv_heads": 2,
    },
    "gpt_neo": {
        "vocab_size": 300,
        "hidden_size": 64,
        "num_layers": 2,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 1]],
        "window_size": 24,
        "max_position_embeddings": 128,
    },
    "codegen": _OLD | {"rotary_dim": 16},
    "stablelm": _LLAMA,
}
# Why the gate refuses, or the library, what comes out of it.
REFUSED: dict[str, dict[str, str]] = {
    "mobius": {
        "gemma2-windows": "perplexity ratio",
        "gptj": "perplexity ratio",
        "codegen": "perplexity ratio",
        "falcon": "that mobius-onnx",
        "falcon-new": "that mobius-onnx",
    },
    "optimum": {"falcon": "that optimum-onnx", "falcon-new": "that optimum-onnx"},
}


def folder_of(architecture: str, folder: Path) -> Path:
    """A small model with random weights, none of them zero or one, and a tokenizer."""
    torch.manual_seed(0)
    model_type = architecture.partition("-")[0]
    config = transformers.AutoConfig.for_model(model_type, **CONFIGS[architecture])
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            centre = float("norm" in name and name.endswith("weight") and model_type != "gemma2")
            parameter.normal_(centre, 0.1)
    model.save_pretrained(folder)
    train_tokenizer(TokenizerConfig("bpe", 300), [story()]).save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(params=[(v, a) for v in via.VIAS for a in CONFIGS], ids="-".join)
def made(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, str, Path]:
    library, architecture = request.param
    module = {"mobius": "mobius", "optimum": "optimum.exporters.onnx"}[library]
    if find_spec(module.split(".")[0]) is None or find_spec(module) is None:
        pytest.skip(f"{library} is not installed")
    return library, architecture, folder_of(architecture, tmp_path / architecture)


@pytest.mark.filterwarnings("ignore")
def test_an_architecture_that_is_not_native_becomes_a_bundle_that_is_the_model(
    made: tuple[str, str, Path], text_file: Path, tmp_path: Path
) -> None:
    library, architecture, source = made
    common = ("--via", library, "--verify-text", text_file, "--window", 64)
    out = tmp_path / "exact"
    result = run_cli(gptrt_export, "convert", source, "--out", out, "--quantize", "none", *common)
    if reason := REFUSED[library].get(architecture):
        assert result.exit_code in (1, 2), result.output
        assert reason in result.stderr
        assert not out.exists()
        return
    assert result.exit_code == 0, result.output
    decoder = open_decoder(open_bundle(out), device="cpu", threads=1)
    ids = np.random.default_rng(1).integers(3, 300, (2, 40))
    cache = decoder.new_cache(40, batch=2)
    found = [decoder.run(ids[:, :30], cache, keep=0)]
    found += [decoder.run(ids[:, n : n + 1], cache) for n in range(30, 40)]
    reference = via.reference_of(source)
    with torch.no_grad():
        wanted = reference(torch.from_numpy(ids)).numpy()
    np.testing.assert_allclose(np.concatenate(found, axis=1), wanted, atol=1e-4)
    assert run_cli(gptrt, "verify", out).exit_code == 0
    for mode, kl in (("int8", 0.02), ("int4", 0.3)):
        out = tmp_path / mode
        result = run_cli(
            gptrt_export, "convert", source, "--out", out, "--quantize", mode, *common,
            "--allow-loss",
        )  # fmt: skip
        assert result.exit_code == 0, result.output
        manifest = read_manifest(out)
        assert manifest.fidelity is not None
        assert manifest.fidelity.kl < kl
        assert manifest.quantization.bits_per_weight < 12
        with Generator(out, device="cpu") as generator:
            assert len(list(generator.tokens([5, 6, 7], max_new_tokens=8))) == 8


# --- without either library: a graph of ours stands for theirs -----------------------------------


@pytest.fixture
def theirs(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose graph "mobius" builds: that of a model of ours, by another name."""
    from export.checkpoint import load_checkpoint, save_checkpoint
    from export.graph import build_graph

    checkpoint = load_checkpoint(run.path)
    save_checkpoint(checkpoint, tmp_path / "theirs")
    model = checkpoint.model().eval()

    monkeypatch.setitem(via._BUILDERS, "mobius", lambda source: build_graph(model))  # noqa: ARG005
    monkeypatch.setattr(via, "version", lambda package: "0")  # noqa: ARG005
    config = tmp_path / "theirs" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"model_type": "gpt2"}))
    return tmp_path / "theirs"


@pytest.mark.parametrize(("mode", "bits"), [("none", 32.0), ("int4", 8.0)])
def test_a_graph_of_another_library_is_rounded_judged_and_run(
    mode: str,
    bits: float,
    theirs: Path,
    save_model: Callable[[GPT], Path],
    text_file: Path,
    tmp_path: Path,
) -> None:
    out = tmp_path / "bundle"
    (theirs / "chat_template.jinja").write_text("{{ messages[0].content }}")
    result = run_cli(
        gptrt_export, "convert", theirs, "--out", out, "--via", "mobius", "--quantize", mode,
        "--verify-text", text_file, "--max-perplexity-ratio", 1.05,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    manifest = read_manifest(out)
    assert "chat_template.jinja" in manifest.files
    assert manifest.model.vocab_size == 300
    assert manifest.quantization.bits_per_weight <= bits
    assert "mobius-onnx 0" in (out / "README.md").read_text()
    assert run_cli(gptrt, "verify", out).exit_code == 0
    assert verify(out, theirs, text_file)[1] == manifest.fidelity
    with pytest.raises(CheckpointError, match="architecture llama, not gpt2"):
        verify(out, save_model(scrambled(LLAMA_SHAPE)), text_file)
    with pytest.raises(CheckpointError, match="a graph built by mobius-onnx 0"):
        load_bundle(out)


def test_the_gate_holds_for_graphs_of_others(theirs: Path, text_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    result = run_cli(
        gptrt_export, "convert", theirs, "--out", out, "--via", "mobius", "--quantize", "int2",
        "--verify-text", text_file, "--max-perplexity-ratio", 0.9,
    )  # fmt: skip
    assert result.exit_code == 1
    assert "perplexity ratio" in result.stderr
    assert not out.exists()


def test_an_unknown_architecture_names_the_two_ways(text_file: Path, tmp_path: Path) -> None:
    source = folder_of("granite", tmp_path / "granite")
    out = tmp_path / "bundle"
    result = run_cli(gptrt_export, "convert", source, "--out", out, "--verify-text", text_file)
    assert_refused(result, "'granite'", "--via mobius", "--via optimum", "pip install")
    for word, *option in (
        ("--via", "--method", "gptq"),
        ("--via", "--kv-cache", "int8"),
        ("--via", "--quantize", "fp16"),
        ("--window", "--window", -5),
    ):
        result = run_cli(gptrt_export, "convert", source, "--out", out, "--via", "mobius", *option)
        assert_refused(result, word)
    for library in via.VIAS:
        if find_spec(library) is None:
            result = run_cli(
                gptrt_export, "convert", source, "--out", out, "--via", library,
                "--verify-text", text_file,
            )  # fmt: skip
            assert result.exit_code == 2
            assert f"pip install 'gptrt[{library}]'" in result.stderr
    assert not out.exists()


def test_a_context_that_nothing_tells_is_asked_for() -> None:
    with pytest.raises(CheckpointError, match="max_position_embeddings"):
        via.describe_model({"model_type": "bloom"}, ir.Graph([], [], nodes=[]), "mobius")
