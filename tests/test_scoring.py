"""Scores, logits and embeddings against PyTorch."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from export.checkpoint import load_checkpoint
from export.model import GPT
from export.options import ConvertOptions
from export.pipeline import convert
from export.runs import Run
from gptrt.errors import BundleError, DataError, OptionError, PromptError
from gptrt.generator import Generator
from gptrt.testing import FakeDecoder, FakeGenerator, byte_tokenizer
from tests.fakes import noise

IDS = [5, 250, 17, 3, 99, 41, 7, 7, 120, 64, 2]


@pytest.fixture(scope="module")
def pair(run: Run, tmp_path_factory: pytest.TempPathFactory) -> tuple[Generator, GPT]:
    """An fp32 bundle that gives hidden states, and the model that it was made from."""
    path = tmp_path_factory.mktemp("scoring") / "bundle"
    convert(run.path, path, ConvertOptions("none", hidden_states=True))
    return Generator(path, device="cpu", threads=1), load_checkpoint(run.path).alone().frozen()


def log_probs(model: GPT, ids: list[int]) -> Any:
    return torch.log_softmax(model(torch.tensor([ids])), -1)[0].numpy()


def test_a_continuation_has_the_probability_that_pytorch_gives_it(
    pair: tuple[Generator, GPT], monkeypatch: pytest.MonkeyPatch
) -> None:
    generator, model = pair
    prompt, continuations = IDS[:4], [IDS[4:], [3], [9, 9]]
    for longest in (256, 4):
        monkeypatch.setattr("gptrt.reading.LONGEST_PASS", longest)
        for found, ids in zip(generator.score(prompt, continuations), continuations, strict=True):
            wanted = log_probs(model, [*prompt, *ids])[len(prompt) - 1 :]
            assert found.ids == tuple(ids)
            for step, (token, value) in enumerate(zip(ids, found.logprobs, strict=True)):
                assert value == pytest.approx(wanted[step, token], abs=1e-4)
            assert found.total == pytest.approx(sum(found.logprobs))
            assert found.mean == pytest.approx(found.total / len(ids))


def test_logits_are_those_of_pytorch_at_any_position(pair: tuple[Generator, GPT]) -> None:
    generator, model = pair
    with torch.no_grad():
        wanted = model(torch.tensor([IDS]))[0].numpy()
    np.testing.assert_allclose(generator.logits(IDS), wanted[-1:], atol=1e-4)
    found = generator.logits(IDS, [7, 0, 7, 10])
    np.testing.assert_allclose(found, wanted[[7, 0, 7, 10]], atol=1e-4)
    np.testing.assert_array_equal(generator.logits(IDS, np.array([7, 0])), found[:2])
    for positions in ([11], [-1], [], [1.0], 1):
        with pytest.raises(OptionError, match="positions from 0 to 10"):
            generator.logits(IDS, positions)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("ask", "error"),
    [
        (lambda g: g.perplexity([1, 2**64]), DataError),
        (lambda g: g.perplexity(np.array([1, 2**63], np.uint64)), DataError),
        (lambda g: g.perplexity(IDS, stride=2.5), OptionError),
        (lambda g: g.classify("A fine day", [1, 2, 3]), OptionError),
        (lambda g: g.classify("A fine day", ["good", "bad"], prompt=5), OptionError),
        (lambda g: asyncio.run(g.complete_async(IDS, cancellation=True)), OptionError),
    ],
)
def test_what_is_no_argument_is_told_as_every_fault_is(
    pair: tuple[Generator, GPT], ask: Callable[[Generator], object], error: type[Exception]
) -> None:
    with pytest.raises(error, match="wanted"):
        ask(pair[0])


@pytest.mark.parametrize("longest", [256, 4])
def test_embeddings_pool_the_last_hidden_states(
    pair: tuple[Generator, GPT], longest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator, model = pair
    monkeypatch.setattr("gptrt.reading.LONGEST_PASS", longest)
    with torch.no_grad():
        hidden = [model.hidden(torch.tensor([ids]))[0].numpy() for ids in (IDS, IDS[:3])]
    mean = generator.embed([IDS, IDS[:3]], normalize=False)
    np.testing.assert_allclose(mean, [each.mean(0) for each in hidden], atol=1e-4)
    last = generator.embed([IDS], pooling="last")
    wanted = hidden[0][-1] / np.linalg.norm(hidden[0][-1])
    np.testing.assert_allclose(last, [wanted], atol=1e-4)


def test_a_bundle_without_hidden_states_says_how_to_get_them(bundle: Path) -> None:
    with pytest.raises(BundleError, match="--hidden-states"):
        Generator(bundle, threads=1).embed(["The king"])
    with pytest.raises(BundleError, match="--hidden-states"):
        FakeGenerator({}).embed(["x"])
    with pytest.raises(OptionError, match='pooling "mean" or "last"'):
        FakeGenerator({}).embed(["x"], pooling="max")  # type: ignore[arg-type]


def test_a_prompt_is_read_once_for_all_its_continuations() -> None:
    decoder = FakeDecoder(noise, context=256)
    generator = Generator.from_parts(decoder, byte_tokenizer())
    generator.score("a long prompt that is read once", ["yes", "no"])
    assert decoder.passes[0] == 33
    assert sum(decoder.passes[1:]) < 6


def test_what_does_not_fit_is_refused(pair: tuple[Generator, GPT]) -> None:
    generator, _ = pair
    with pytest.raises(PromptError, match="at most 4 tokens"):
        generator.score([1] * 60, [[1] * 5])
    with pytest.raises(PromptError, match="at most 64 tokens"):
        generator.logits([1] * 65)
    with pytest.raises(PromptError, match="ids from 0 to 299"):
        generator.score([1], [[300]])
    with pytest.raises(PromptError, match="one token or more"):
        generator.score("", ["x"])


def test_perplexity_is_that_of_the_function(pair: tuple[Generator, GPT]) -> None:
    generator, model = pair
    wanted = -log_probs(model, IDS)[np.arange(10), IDS[1:]].mean()
    assert generator.perplexity(IDS).nll == pytest.approx(wanted, abs=1e-4)


def test_a_prompt_is_read_once_for_all_continuations_whatever_is_kept() -> None:
    decoder = FakeDecoder(noise, context=256)
    generator = Generator.from_parts(decoder, byte_tokenizer(), reuse="none")
    generator.score("0123456789", ["a", "b", "c"])
    assert decoder.passes == [10, 2, 2]
    assert generator.score("0123456789", []) == []
