"""Every native family: transformers' own model, imported, saved, exported and quantized."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from export.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from export.families import FAMILIES
from export.options import ConvertOptions
from export.pipeline import convert
from export.reopen import load_bundle
from export.tokenization import TokenizerConfig, train_tokenizer
from gptrt.decoder import Decoder
from gptrt.errors import CheckpointError
from gptrt.format import open_bundle
from gptrt.generator import Generator

from .conftest import story

transformers = pytest.importorskip("transformers", reason="the reference implementation")

_LLAMA: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
}
_UNEVEN = _LLAMA | {"head_dim": 20, "tie_word_embeddings": False}
_NEOX: dict[str, Any] = {
    key: value for key, value in _LLAMA.items() if key not in ("num_key_value_heads", "head_dim")
}
_LONG = {"factor": 4.0, "original_max_position_embeddings": 32}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": (
        "gpt2",
        {"vocab_size": 300, "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 128},
    ),
    "gpt2-uneven": (
        "gpt2",
        {
            "vocab_size": 300,
            "n_embd": 60,
            "n_layer": 2,
            "n_head": 3,
            "n_positions": 128,
            "activation_function": "gelu",
            "tie_word_embeddings": False,
        },
    ),
    "opt": ("opt", _NEOX | {"ffn_dim": 96, "word_embed_proj_dim": 64}),
    "opt-uneven": (
        "opt",
        _NEOX
        | {"hidden_size": 60, "word_embed_proj_dim": 60, "ffn_dim": 100}
        | {"num_attention_heads": 3, "activation_function": "gelu", "tie_word_embeddings": False},
    ),
    "gpt_neox": ("gpt_neox", _NEOX | {"tie_word_embeddings": False}),
    "gpt_neox-uneven": (
        "gpt_neox",
        _NEOX
        | {"hidden_size": 60, "num_attention_heads": 3, "use_parallel_residual": False}
        | {"rope_parameters": {"rope_theta": 5e3, "partial_rotary_factor": 0.5}},
    ),
    "gpt_neox-no-bias": ("gpt_neox", _NEOX | {"attention_bias": False, "rotary_pct": 1.0}),
    "llama": ("llama", _LLAMA),
    "llama-uneven": ("llama", _UNEVEN | {"attention_bias": True, "mlp_bias": True}),
    "llama-linear": ("llama", _LLAMA | {"rope_scaling": {"type": "linear", "factor": 4.0}}),
    "llama-dynamic": ("llama", _LLAMA | {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}),
    "llama-llama3": (
        "llama",
        _LLAMA
        | {"rope_theta": 5e5}
        | {
            "rope_scaling": {
                "rope_type": "llama3",
                **_LONG,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
            }
        },
    ),
    "llama-yarn": ("llama", _LLAMA | {"rope_scaling": {"rope_type": "yarn", **_LONG}}),
    "llama-longrope": (
        "llama",
        _LLAMA
        | {
            "rope_scaling": {
                "rope_type": "longrope",
                "original_max_position_embeddings": 96,
                "short_factor": [1.0 + 0.1 * i for i in range(8)],
                "long_factor": [2.0 + 0.1 * i for i in range(8)],
            }
        },
    ),
    "llama-wide": (
        "llama",
        _LLAMA | {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64},
    ),
    "mistral": ("mistral", _LLAMA | {"sliding_window": 12}),
    "mistral-uneven": ("mistral", _UNEVEN | {"sliding_window": None}),
    "qwen2": ("qwen2", _LLAMA),
    "qwen2-windows": (
        "qwen2",
        {k: v for k, v in _UNEVEN.items() if k != "head_dim"}
        | {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1},
    ),
    "qwen3": ("qwen3", _LLAMA),
    "qwen3-uneven": ("qwen3", _UNEVEN | {"attention_bias": True}),
    "smollm3": ("smollm3", _LLAMA | {"no_rope_layer_interval": 2, "pad_token_id": None}),
    "smollm3-uneven": (
        "smollm3",
        _UNEVEN
        | {"pad_token_id": None}
        | {"no_rope_layers": [0, 1, 1], "use_sliding_window": True, "sliding_window": 7},
    ),
}
IDS = np.random.default_rng(1).integers(3, 300, (2, 40))


def reference(name: str) -> Any:
    """transformers' model of a config, none of its parameters zero or one."""
    model_type, options = CONFIGS[name]
    config = transformers.AutoConfig.for_model(model_type, **options)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            center = 1.0 if "norm" in key and key.endswith("weight") else 0.0
            parameter.normal_(center, 0.1)
    return model


# Frequencies are one table to the graph, wherever they come from: one scaling stands for all.
_SAME_GRAPH = {"llama-linear", "llama-dynamic", "llama-llama3", "llama-longrope", "llama-wide"}


@pytest.fixture(params=CONFIGS)
def imported(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Any, Checkpoint, Path]:
    """transformers' model, what we make of its folder, and that folder with a tokenizer."""
    theirs = reference(request.param)
    theirs.save_pretrained(tmp_path / "theirs")
    tokenizer = train_tokenizer(TokenizerConfig("bpe", 300), [story()])
    tokenizer.save(str(tmp_path / "theirs" / "tokenizer.json"))
    return theirs, load_checkpoint(tmp_path / "theirs"), tmp_path / "theirs"


def logits_of(model: Any, ids: Any) -> Any:
    with torch.no_grad():
        found = model(torch.as_tensor(ids))
    return getattr(found, "logits", found).numpy()


def test_an_imported_checkpoint_gives_transformers_logits_and_saves_back(
    imported: tuple[Any, Checkpoint, Path], tmp_path: Path
) -> None:
    theirs, checkpoint, _ = imported
    wanted = logits_of(theirs, IDS)
    np.testing.assert_allclose(logits_of(checkpoint.model().eval(), IDS), wanted, atol=1e-4)
    save_checkpoint(checkpoint, tmp_path / "back")
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back").eval()
    np.testing.assert_allclose(logits_of(back, IDS), wanted, atol=1e-4)
    assert load_checkpoint(tmp_path / "back").config == checkpoint.config


@pytest.mark.parametrize("imported", [n for n in CONFIGS if n not in _SAME_GRAPH], indirect=True)
def test_an_exported_family_gives_transformers_logits_and_greedy_ids(
    imported: tuple[Any, Checkpoint, Path], text_file: Path, tmp_path: Path
) -> None:
    theirs, _, folder = imported
    options = ConvertOptions("none", verify_text=text_file, verify_tokens=256, allow_loss=True)
    convert(folder, tmp_path / "bundle", options)
    decoder = Decoder(open_bundle(tmp_path / "bundle"), device="cpu", threads=1)
    cache = decoder.new_cache(40, batch=2)
    found = [decoder.run(IDS[:, :30], cache, keep=0).copy()]
    found += [decoder.run(IDS[:, n : n + 1], cache).copy() for n in range(30, 40)]
    wanted = logits_of(theirs, IDS)
    np.testing.assert_allclose(np.concatenate(found, axis=1), wanted, atol=1e-4)
    prompt = IDS[0, :8].tolist()
    with Generator(tmp_path / "bundle", device="cpu") as generator:
        endless = Generator.from_parts(generator.decoder, generator.tokenizer.endless())
        new = list(endless.tokens(prompt, max_new_tokens=64))
    likeliest = logits_of(theirs, [prompt + new[:-1]])[0].argmax(-1)
    assert new == likeliest[len(prompt) - 1 :].tolist()


@pytest.mark.parametrize("mode", ["int8", "int4"])
@pytest.mark.parametrize("name", ["opt", "gpt_neox", "mistral", "qwen2", "qwen3-uneven", "smollm3"])
def test_a_quantized_family_loads_and_generates(
    name: str, mode: str, text_file: Path, tmp_path: Path
) -> None:
    reference(name).save_pretrained(tmp_path / "theirs")
    tokenizer = train_tokenizer(TokenizerConfig("bpe", 300), [story()])
    tokenizer.save(str(tmp_path / "theirs" / "tokenizer.json"))
    texts = {"verify_text": text_file, "verify_tokens": 2048}
    options = ConvertOptions(mode, method="nearest", allow_loss=True, **texts)  # type: ignore[arg-type]
    manifest = convert(tmp_path / "theirs", tmp_path / "bundle", options)
    assert manifest.fidelity is not None
    assert manifest.fidelity.kl < {"int8": 0.01, "int4": 0.3}[mode]
    with Generator(tmp_path / "bundle", device="cpu") as generator:
        assert len(list(generator.tokens([5, 6, 7], max_new_tokens=8))) == 8


def test_every_family_has_a_shape_here() -> None:
    tested = {model_type for model_type, _ in CONFIGS.values()}
    assert {family.model_type for family in FAMILIES} == tested | {"gptrt"}


@pytest.mark.parametrize(
    ("name", "change", "word"),
    [
        ("opt", {"do_layer_norm_before": False}, "do_layer_norm_before"),
        ("gpt2", {"activation_function": "swish"}, "swish"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act"),
        ("llama", {"rope_scaling": {"rope_type": "spiral", "factor": 2.0}}, "spiral"),
    ],
)
def test_what_a_family_cannot_express_is_refused(
    name: str, change: dict[str, Any], word: str
) -> None:
    model_type, options = CONFIGS[name]
    family = next(family for family in FAMILIES if family.model_type == model_type)
    with pytest.raises(CheckpointError, match=word):
        family.from_json(options | change)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_shards_of_half_precision_load_as_the_fp32_model_that_they_are(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    reference("qwen2").to(dtype).save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    found = load_checkpoint(tmp_path)
    assert {tensor.dtype for tensor in found.state.values()} == {torch.float32}
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    wanted = logits_of(theirs.eval(), IDS)
    np.testing.assert_allclose(logits_of(found.model().eval(), IDS), wanted, atol=1e-4)


def test_the_ids_that_end_a_text_come_along(text_file: Path, tmp_path: Path) -> None:
    theirs = reference("llama")
    theirs.config.eos_token_id = 7
    theirs.generation_config.eos_token_id = [7, 9, 5000]  # it counts, and one is no token at all
    theirs.save_pretrained(tmp_path / "theirs")
    tokenizer = train_tokenizer(TokenizerConfig("bpe", 300), [story()])
    tokenizer.save(str(tmp_path / "theirs" / "tokenizer.json"))
    options = ConvertOptions("none", verify_text=text_file, verify_tokens=256, allow_loss=True)
    convert(tmp_path / "theirs", tmp_path / "bundle", options)
    with Generator(tmp_path / "bundle", device="cpu") as generator:
        assert generator.tokenizer.eos_token_ids == (7, 9)
    assert load_bundle(tmp_path / "bundle").special.eos == (7, 9)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("qwen2", {"num_hidden_layers": "three"}),
        ("smollm3", {"no_rope_layers": 1}),
        ("llama-yarn", {"max_position_embeddings": "long", "rope_scaling": {"type": "yarn"}}),
        ("llama", {"rope_scaling": [1, 2]}),
        ("gpt_neox", {"rope_parameters": {"partial_rotary_factor": "half"}}),
    ],
)
def test_a_value_of_the_wrong_kind_is_refused(
    name: str, change: dict[str, Any], tmp_path: Path
) -> None:
    model_type, options = CONFIGS[name]
    config = {"model_type": model_type} | options | change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"config\.json|rope_parameters"):
        load_checkpoint(tmp_path)
