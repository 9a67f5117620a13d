"""Checkpoints of others, whose right answers are known. They are not part of this project."""

from __future__ import annotations

import base64
import itertools
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers

from export.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from export.model import GPT
from export.options import ConvertOptions
from export.pipeline import convert
from export.reopen import load_bundle
from export.tokenization import from_gpt2_files
from gptrt.architecture import ModelConfig
from gptrt.config import GenerationConfig
from gptrt.decoder import Decoder
from gptrt.format import open_bundle
from gptrt.generator import Generator
from gptrt.opening import embedded_bundle

from .conftest import SHARED

GOLDEN = SHARED / "golden"
pytestmark = pytest.mark.skipif(
    not GOLDEN.is_dir(), reason="needs the golden checkpoints, which are not part of the project"
)


def numbers(size: int) -> Tokenizer:
    """A tokenizer for models that have none: an id is written as its number."""
    tokenizer = Tokenizer(models.WordLevel({str(i): i for i in range(size)}))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


def fp32_bundle(checkpoint: Checkpoint, folder: Path) -> Decoder:
    """The checkpoint's fp32 graph, opened by the runtime."""
    size = checkpoint.config.vocab_size
    source = Checkpoint(
        checkpoint.config, checkpoint.state, checkpoint.tokenizer or numbers(size), {}
    )
    save_checkpoint(source, folder / "source")
    text = folder / "text.txt"
    text.write_text(" ".join(str(i % size) for i in range(200)))
    convert(folder / "source", folder / "bundle", ConvertOptions("none", verify_text=text))
    return Decoder(open_bundle(folder / "bundle"), device="cpu")


def sort_checkpoint() -> Checkpoint:
    raw = json.loads((GOLDEN / "gpt-nano-sort" / "gpt-nano-sort-model.json").read_text())
    shape = raw.pop("config")
    config = ModelConfig(
        vocab_size=shape["vocab_size"],
        n_positions=shape["block_size"],
        n_layer=shape["n_layer"],
        n_head=shape["n_head"],
        n_kv_head=shape["n_head"],
        n_embd=shape["n_embd"],
        head_dim=shape["n_embd"] // shape["n_head"],
        n_inner=4 * shape["n_embd"],
        tied=False,
    )
    state = {k.removeprefix("transformer."): tensor(v) for k, v in raw.items()}
    names = GPT(config).state_dict()
    return Checkpoint(config, {k: v for k, v in state.items() if k in names}, None, {})


def tensor(value: dict[str, Any]) -> torch.Tensor:
    data = np.frombuffer(base64.b64decode(value["data"]), np.float32)
    return torch.from_numpy(data.reshape(value["shape"]).copy())


def checkpoints() -> dict[str, Any]:
    return {
        "story-7m": lambda: load_checkpoint(GOLDEN / "story-7m"),
        "gpt-nano-sort": sort_checkpoint,
        "tiny-random-gpt2": lambda: load_checkpoint(GOLDEN / "tiny-random-gpt2"),
        "the embedded default": lambda: load_bundle(embedded_bundle()),
    }


@pytest.mark.parametrize("name", checkpoints())
def test_pytorch_and_the_fp32_graph_agree_in_logits_and_in_200_greedy_ids(
    name: str, tmp_path: Path
) -> None:
    checkpoint = checkpoints()[name]()
    model, decoder = checkpoint.model().eval(), fp32_bundle(checkpoint, tmp_path)
    vocabulary, context = checkpoint.config.vocab_size, checkpoint.config.n_positions
    prompt = np.random.default_rng(3).integers(0, vocabulary, (1, min(32, context // 2)))
    with torch.no_grad():
        wanted = model(torch.from_numpy(prompt)).numpy()
    half = prompt.shape[1] // 2
    cache = decoder.new_cache(context)
    found = [
        decoder.run(part, cache, keep=0).copy() for part in (prompt[:, :half], prompt[:, half:])
    ]
    np.testing.assert_allclose(np.concatenate(found, axis=1), wanted, atol=1e-4)

    ids, rows = prompt[0].tolist(), [found[-1][0, -1]]
    while len(ids) < min(context, prompt.shape[1] + 200):
        ids.append(int(rows[-1].argmax()))
        if len(ids) < context:
            rows.append(decoder.run(np.array([[ids[-1]]]), cache)[0, -1].copy())
    with torch.no_grad():
        whole = model(torch.tensor([ids]))[0, prompt.shape[1] - 1 :].numpy()
    np.testing.assert_allclose(np.stack(rows), whole[: len(rows)], atol=1e-4)
    assert whole[:-1].argmax(-1).tolist() == ids[prompt.shape[1] :]


def test_gpt_nano_sort_computes_the_published_logits_and_sorts_everything(tmp_path: Path) -> None:
    path = GOLDEN / "gpt-nano-sort" / "gpt-nano-sort-t0-partials.json"
    partials = json.loads(path.read_text())
    checkpoint = sort_checkpoint()
    decoder = fp32_bundle(checkpoint, tmp_path)
    ids = tensor(partials["idx"]).long()
    wanted = tensor(partials["lm_head"])
    model = checkpoint.model().eval()
    with torch.no_grad():
        torch.testing.assert_close(model(ids), wanted, atol=1e-5, rtol=0)
    found = decoder.run(ids.numpy(), decoder.new_cache(11, batch=len(ids)), keep=0)
    np.testing.assert_allclose(found, wanted.numpy(), atol=1e-4)

    rows = np.array(list(itertools.product(range(3), repeat=6)))  # [729, 6]
    cache = decoder.new_cache(11, batch=len(rows))
    answer = [decoder.run(rows, cache)[:, -1].argmax(-1)]
    while cache.length < 11:
        answer.append(decoder.run(answer[-1][:, None], cache)[:, -1].argmax(-1))
    assert np.array_equal(np.stack(answer, axis=1), np.sort(rows, axis=1))


def adder_checkpoint() -> Checkpoint:
    """minGPT's adder of 2-digit numbers: their digits, then the last, ..., first of the sum."""
    return replace(load_checkpoint(GOLDEN / "mingpt-adder" / "model.pt"), tokenizer=numbers(10))


def sums() -> np.ndarray[Any, np.dtype[np.int64]]:
    """All of them: [10000, 7]."""
    rows = [
        [*divmod(a, 10), *divmod(b, 10), (a + b) % 10, (a + b) // 10 % 10, (a + b) // 100]
        for a, b in itertools.product(range(100), repeat=2)
    ]
    return np.array(rows)


@pytest.mark.parametrize(("mode", "right"), [("int8", 10_000), ("int4", 9_990)])
def test_the_quantized_adder_still_adds(mode: str, right: int, tmp_path: Path) -> None:
    save_checkpoint(adder_checkpoint(), tmp_path / "source")
    shuffled = np.random.default_rng(0).permutation(sums())
    # Six digits a line: what the model reads. The first lines are judged, the rest calibrates.
    text = tmp_path / "text.txt"
    text.write_text("\n".join(" ".join(map(str, row[:6])) for row in shuffled))
    options: dict[str, Any] = {"mode": mode, "verify_text": text, "allow_loss": True}
    options["verify_tokens"] = 5999  # so that the rest begins where a line does
    convert(tmp_path / "source", tmp_path / "bundle", ConvertOptions(**options))
    decoder = Decoder(open_bundle(tmp_path / "bundle"), device="cpu")
    wanted = sums()
    cache = decoder.new_cache(6, batch=len(wanted))
    step = np.ascontiguousarray(wanted[:, :4])
    answers = []
    for _ in range(3):
        step = decoder.run(step, cache)[:, -1].argmax(-1)[:, None]
        answers.append(step)
    assert (np.concatenate(answers, axis=1) == wanted[:, 4:]).all(axis=1).sum() >= right


@pytest.fixture(scope="module")
def tiny_random_gpt2(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Generator]:
    folder = tmp_path_factory.mktemp("tiny-random-gpt2")
    fp32_bundle(load_checkpoint(GOLDEN / "tiny-random-gpt2"), folder)
    with Generator(folder / "bundle", device="cpu") as generator:
        yield generator


@pytest.mark.parametrize(("search", "beams"), [("greedy", 1), ("beam", 4)])
def test_tiny_random_gpt2_gives_the_ids_that_onnxruntime_genai_expects(
    tiny_random_gpt2: Generator, search: str, beams: int
) -> None:
    """One prompt at a time, and all in a batch."""
    expected = json.loads((GOLDEN / "tiny-random-gpt2" / "expected.json").read_text())[search]
    prompts, wanted = expected["input_ids"], expected["output_ids"]
    new = expected["max_length"] - len(prompts[0])
    config = GenerationConfig(max_new_tokens=new, num_beams=beams)
    alone = [tiny_random_gpt2.complete(prompt, config=config) for prompt in prompts]
    together = tiny_random_gpt2.complete_batch(prompts, config=config)
    for results in (alone, together):
        ids = [[*prompt, *result.ids] for prompt, result in zip(prompts, results, strict=True)]
        assert ids == wanted


def test_gpt2s_own_files_make_a_tokenizer_that_passes_every_known_case() -> None:
    folder = SHARED / "gpt2-tokenizer"
    tokenizer = from_gpt2_files(folder / "encoder.json", folder / "vocab.bpe")
    raw = (folder / "cases.inp").read_bytes().decode("utf-8")
    texts = raw.split("\n__ggml_vocab_test__\n")
    lines = (folder / "cases.out").read_text().split("\n")
    wanted = [[int(i) for i in line.split()] for line in lines]
    assert len(texts) == len(wanted) == 47
    assert [tokenizer.encode(text).ids for text in texts] == wanted


def test_gpt2s_tokenizer_agrees_with_transformers_on_books_and_on_russian() -> None:
    transformers = pytest.importorskip("transformers", reason="the reference implementation")
    folder = SHARED / "gpt2-tokenizer"
    files = {"vocab": str(folder / "encoder.json"), "merges": str(folder / "vocab.bpe")}
    theirs = transformers.GPT2Tokenizer(**files)
    ours = from_gpt2_files(folder / "encoder.json", folder / "vocab.bpe")
    books = sorted((SHARED / "books").glob("*.txt"))
    for paths, size in ((books, 1_000_000), ([SHARED / "tatoeba" / "en-ru.tsv"], 500_000)):
        text = "".join(path.read_text(encoding="utf-8") for path in paths[:8])[:size]
        assert len(text) == size
        ids = ours.encode(text).ids
        assert ids == theirs(text, verbose=False)["input_ids"]
        assert ours.decode(ids) == text
