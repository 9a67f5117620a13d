"""GGUF files: the model and the vocabulary that they hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, trainers

from export.checkpoint import load_checkpoint
from export.cli import main as gptrt_export
from export.tokenization import TokenizerConfig, train_tokenizer
from gptrt.errors import CheckpointError
from gptrt.generator import Generator

from .conftest import assert_refused, run_cli, story
from .test_families import CONFIGS, IDS, logits_of, reference

gguf = pytest.importorskip("gguf", reason="what reads such files")
transformers = pytest.importorskip("transformers", reason="the reference implementation")

from .gguf_files import Kind, byte_level_vocabulary, sentencepiece_vocabulary, write_gguf  # noqa: E402

BPE = train_tokenizer(TokenizerConfig("bpe", 300), [story()])
VOCABULARY = byte_level_vocabulary(BPE)
TEXT = "The dog's 2024 walks,  \n\n and   it's 12345 o'clock: \u00e9\u4e16\u754c!\t"


@pytest.mark.parametrize(
    "name",
    [
        *("gpt2", "gpt2-uneven", "gpt_neox", "gpt_neox-uneven", "llama", "llama-uneven"),
        *("llama-linear", "llama-yarn", "qwen2", "qwen3-uneven", "smollm3"),
    ],
)
def test_a_file_is_the_model_that_it_was_made_from(name: str, tmp_path: Path) -> None:
    theirs = reference(name)
    if theirs.config.model_type == "smollm3":  # the file has no place for another interval
        theirs.config.no_rope_layers = [1] * theirs.config.num_hidden_layers
        theirs = transformers.AutoModelForCausalLM.from_config(theirs.config).eval()
    write_gguf(theirs, tmp_path / "model.gguf", VOCABULARY)
    assert_same(theirs, tmp_path)  # the folder of a file stands for it


def test_factors_of_frequencies_are_those_of_llama_3(tmp_path: Path) -> None:
    theirs = reference("llama-llama3")
    plain = 5e5 ** -(torch.arange(0, 16, 2) / 16)
    factors = (plain / theirs.model.rotary_emb.inv_freq).numpy()
    theirs.config.rope_parameters = {"rope_type": "default", "rope_theta": 5e5}
    file = write_gguf(theirs, tmp_path / "m.gguf", VOCABULARY, factors=factors)
    assert_same(theirs, file)


# What a weight of 0.1 may lose, about half a step of the coarsest block.
@pytest.mark.parametrize(
    ("kind", "loss"),
    [(Kind.F16, 1e-3), (Kind.BF16, 5e-3), (Kind.Q8_0, 5e-3), (Kind.Q4_0, 0.1)],
)
def test_a_quantized_file_is_the_model_but_for_its_rounding(
    kind: Kind, loss: float, tmp_path: Path
) -> None:
    theirs = reference("llama")
    exact = load_checkpoint(write_gguf(theirs, tmp_path / "exact.gguf", VOCABULARY))
    rounded = load_checkpoint(write_gguf(theirs, tmp_path / "rounded.gguf", VOCABULARY, kind))
    for name, weight in exact.state.items():
        np.testing.assert_allclose(rounded.state[name], weight, atol=loss)


def assert_same(theirs: Any, file: Path) -> None:
    found = load_checkpoint(file).model().eval()
    np.testing.assert_allclose(logits_of(found, IDS), logits_of(theirs, IDS), atol=1e-4)


@pytest.mark.parametrize("pre", ["gpt-2", "llama-bpe", "qwen2", "smollm"])
def test_a_byte_level_vocabulary_cuts_a_text_as_transformers_does(pre: str, tmp_path: Path) -> None:
    model_type = "qwen2" if pre == "qwen2" else "llama"
    file = write_gguf(reference(model_type), tmp_path / "m.gguf", VOCABULARY | {"pre": pre})
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file=file.name)
    ours = load_checkpoint(file).tokenizer
    assert ours is not None
    assert ours.encode(TEXT).ids == theirs(TEXT)["input_ids"]
    assert ours.decode(ours.encode(TEXT).ids) == TEXT


@pytest.mark.parametrize(
    ("name", "kind", "pre"),
    [
        ("gpt2", Kind.F32, "gpt-2"),
        ("gpt_neox", Kind.F32, "olmo"),
        ("llama", Kind.F32, "llama-bpe"),
        ("llama-yarn", Kind.F32, "smollm"),
        ("qwen2", Kind.F32, "qwen2"),
        ("qwen3", Kind.F32, "qwen2"),
        ("llama-wide", Kind.F16, "gpt-2"),
        ("llama-wide", Kind.Q4_K, "gpt-2"),
        ("llama-wide", Kind.Q6_K, "gpt-2"),
    ],
)
def test_a_file_is_to_us_what_it_is_to_llama_cpp(
    name: str, kind: Kind, pre: str, tmp_path: Path
) -> None:
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama.cpp itself is not installed")
    file = write_gguf(reference(name), tmp_path / "m.gguf", VOCABULARY | {"pre": pre}, kind)
    theirs = llama_cpp.Llama(str(file), n_ctx=64, logits_all=True, verbose=False)
    ours = load_checkpoint(file)
    ids = IDS[0]
    theirs.eval(ids.tolist())
    # They keep keys and values in fp16, and with matrices of integers they round inputs as well.
    loss = {Kind.F32: 0.01, Kind.F16: 0.03}.get(kind, 0.2)
    wanted = np.array(theirs.scores[: len(ids)])
    np.testing.assert_allclose(logits_of(ours.model().eval(), ids[None])[0], wanted, atol=loss)
    assert ours.tokenizer is not None
    assert ours.tokenizer.encode(TEXT).ids == theirs.tokenize(TEXT.encode(), add_bos=False)


@pytest.fixture(scope="module")
def pieces() -> Tokenizer:
    """A BPE as SentencePiece trains it: spaces are marks at the beginning of a word."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    trainer = trainers.BpeTrainer(vocab_size=400, show_progress=False)
    tokenizer.train_from_iterator([story()], trainer)
    return tokenizer


@pytest.mark.parametrize("prefix", [True, False])
def test_a_sentencepiece_vocabulary_cuts_a_text_as_it_was_trained(
    prefix: bool, pieces: Tokenizer, tmp_path: Path
) -> None:
    vocabulary = sentencepiece_vocabulary(pieces, add_space_prefix=prefix)
    shape = CONFIGS["llama"][1] | {"vocab_size": len(vocabulary["tokens"])}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape))
    file = write_gguf(model, tmp_path / "m.gguf", vocabulary)
    tokenizer = load_checkpoint(file).tokenizer
    assert tokenizer is not None
    text = story()[:300] if prefix else " " + story()[:300]
    cut = pieces.encode(story()[:300]).ids
    assert tokenizer.encode(text).ids == [1, *(i + 259 for i in cut)]
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    unseen = tokenizer.encode(TEXT)
    assert tokenizer.decode(unseen.ids) == TEXT
    if prefix:  # transformers takes every vocabulary for one with it
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file=file.name)
        assert theirs(TEXT)["input_ids"] == unseen.ids


def test_a_file_converts_to_a_bundle_that_speaks(text_file: Path, tmp_path: Path) -> None:
    file = write_gguf(reference("llama"), tmp_path / "tiny.gguf", VOCABULARY)
    out = tmp_path / "bundle"
    result = run_cli(
        gptrt_export, "convert", file, "--out", out, "--quantize", "int8",
        "--verify-text", text_file, "--max-perplexity-ratio", "2",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    with Generator(out, device="cpu") as generator:
        assert generator.tokenizer.eos_token_ids == (0,)
        assert len(list(generator.tokens([5, 6], max_new_tokens=4))) == 4


def test_a_tokenizer_beside_a_file_stands_for_a_vocabulary_that_we_cannot_read(
    tmp_path: Path,
) -> None:
    vocabulary = VOCABULARY | {"pre": "deepseek-llm", "eos_token_id": 7}
    file = write_gguf(reference("llama"), tmp_path / "m.gguf", vocabulary)
    BPE.save(str(tmp_path / "tokenizer.json"))
    found = load_checkpoint(file)
    assert found.tokenizer is not None
    assert found.tokenizer.encode(TEXT).ids == BPE.encode(TEXT).ids
    assert found.special.eos == (7,)


def damaged(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:400])


def renamed(file: Path) -> None:
    file.write_bytes(file.read_bytes().replace(b"blk.1.attn_k.", b"blk.1.attn_X."))


def unknown(file: Path) -> None:
    file.write_bytes(file.read_bytes().replace(b"llama", b"lorem"))


def cut_otherwise(file: Path) -> None:
    file.write_bytes(file.read_bytes().replace(b"gpt-2", b"gpt-9"))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (damaged, ["a GGUF file in", "tiny.gguf"]),
        (renamed, ["h.1.attn.c_attn.weight is missing", "blk.1.attn_X.weight is unknown"]),
        (unknown, ["an architecture of gpt2", "'lorem'"]),
        (cut_otherwise, ["words cut as gpt-2", "'gpt-9'", "tokenizer.json"]),
    ],
)
def test_a_file_that_is_not_whole_is_refused(
    spoil: Any, words: list[str], text_file: Path, tmp_path: Path
) -> None:
    file = write_gguf(reference("llama"), tmp_path / "tiny.gguf", VOCABULARY)
    spoil(file)
    out = tmp_path / "bundle"
    result = run_cli(gptrt_export, "convert", file, "--out", out, "--verify-text", text_file)
    assert_refused(result, *words)
    assert not out.exists()


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("llama.attention.head_count", [4, 4, 4], ["tiny.gguf", "list"]),
        ("llama.context_length", None, ["llama.context_length"]),
        ("llama.attention.layer_norm_rms_epsilon", None, ["llama.attention.layer_norm_rms"]),
        ("llama.rope.dimension_count", 8, ["llama.rope.dimension_count 16", "found 8"]),
        ("llama.rope.scaling.attn_factor", 2.0, ["llama.rope.scaling.attn_factor", "found 2.0"]),
        ("llama.rope.scaling.alpha", 2.0, ["llama.rope.scaling.alpha"]),
        ("tokenizer.ggml.token_type", 5, ["tiny.gguf", "'int'"]),
        ("tokenizer.ggml.bos_token_id", "x", ["tiny.gguf", "'str'"]),
    ],
)
def test_values_that_would_change_the_model_or_are_of_another_kind_are_refused(
    key: str, value: Any, words: list[str], tmp_path: Path
) -> None:
    file = write_gguf(reference("llama"), tmp_path / "tiny.gguf", VOCABULARY, **{key: value})
    assert_refused(run_cli(gptrt_export, "convert", file, "--out", tmp_path / "bundle"), *words)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("llama", {"llama.rope.scaling.attn_factor": 1.0, "llama.rope.scaling.finetuned": True}),
        ("llama", {"llama.rope.freq_base": None, "llama.attention.key_length": None}),
        ("llama-linear", {"llama.rope.scaling.type": None}),
        (
            "llama-linear",
            {"llama.rope.scaling.factor": None, "llama.rope.scale_linear": 4.0},
        ),
        ("llama-yarn", {"llama.rope.scaling.yarn_beta_fast": 32.0}),
    ],
)
def test_values_that_change_nothing_are_as_if_left_out(
    name: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    theirs = reference(name)
    assert_same(theirs, write_gguf(theirs, tmp_path / "m.gguf", VOCABULARY, **changes))


def test_what_a_file_does_not_say_is_as_llama_cpp_takes_it(tmp_path: Path) -> None:
    left_out = {"smollm3.rope.freq_base": None, "smollm3.attention.head_count_kv": None}
    theirs = reference("smollm3")
    theirs.config.num_key_value_heads = theirs.config.num_attention_heads
    theirs = transformers.AutoModelForCausalLM.from_config(theirs.config)
    config = load_checkpoint(write_gguf(theirs, tmp_path / "m.gguf", VOCABULARY, **left_out)).config
    assert (config.rope_theta, config.n_kv_head) == (1e4, 4)


def test_of_two_files_in_a_folder_neither_is_guessed(tmp_path: Path) -> None:
    for name in ("one.gguf", "two.gguf"):
        (tmp_path / name).touch()
    with pytest.raises(CheckpointError, match=r"one\.gguf, two\.gguf"):
        load_checkpoint(tmp_path)
