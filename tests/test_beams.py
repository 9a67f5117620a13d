"""Beam search: the same sequences as transformers, on the same weights."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from export.checkpoint import load_checkpoint, save_checkpoint
from export.runs import Run
from gptrt.config import GenerationConfig
from gptrt.errors import FidelityError, OptionError
from gptrt.generator import Generator
from gptrt.interrupt import Cancellation
from gptrt.testing import EOS, VOCAB, FakeDecoder, byte_tokenizer
from tests.fakes import noise

transformers = pytest.importorskip("transformers", reason="the reference implementation")

PROMPTS = ([5, 250, 17, 3], [40, 41], [7] * 9)


@pytest.fixture(scope="module")
def pair(run: Run, exact: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Generator, Any]:
    """A model in fp32, as a bundle and as transformers opens its checkpoint."""
    theirs = tmp_path_factory.mktemp("beams") / "theirs"
    save_checkpoint(load_checkpoint(run.path).alone(), theirs)
    reference = transformers.AutoModelForCausalLM.from_pretrained(theirs).eval()
    return Generator(exact, device="cpu", threads=1), reference


def by_transformers(
    model: Any, prompt: list[int], eos: list[int], **options: Any
) -> tuple[list[list[int]], list[float]]:
    ids = torch.tensor([prompt])
    with torch.no_grad():
        found = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            eos_token_id=eos or None,
            pad_token_id=VOCAB,
            output_scores=True,
            return_dict_in_generate=True,
            **options,
        )
    rows = [row[len(prompt) :].tolist() for row in found.sequences]
    ended = [list(itertools.takewhile(lambda t: t not in (*eos, VOCAB), row)) for row in rows]
    return ended, found.sequences_scores.tolist()


@pytest.mark.parametrize("ends", [(), (0,), (12, 290), tuple(range(0, 300, 7))])
@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 2},
        {"num_beams": 4, "num_return_sequences": 4},
        {"num_beams": 4, "length_penalty": 2.0, "early_stopping": True},
        {"num_beams": 3, "length_penalty": -1.0, "early_stopping": "never"},
        {"num_beams": 5, "length_penalty": 0.0, "early_stopping": "never"},
        {"num_beams": 3, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
        {"num_beams": 4, "min_new_tokens": 6, "num_return_sequences": 2},
    ],
)
def test_beams_are_those_of_transformers(
    pair: tuple[Generator, Any], options: dict[str, Any], ends: tuple[int, ...]
) -> None:
    ours, reference = pair
    generator = Generator.from_parts(ours.decoder, ours.tokenizer.ending_with(ends))
    for prompt in PROMPTS:
        wanted, scores = by_transformers(
            reference, prompt, list(ends), max_new_tokens=12, **options
        )
        found = generator.complete_batch([prompt], max_new_tokens=12, **options)
        assert [list(result.ids) for result in found] == wanted
        np.testing.assert_allclose([result.score for result in found], scores, atol=1e-4)


def test_one_beam_is_greedy(pair: tuple[Generator, Any]) -> None:
    generator, _ = pair
    for prompt in PROMPTS:
        found = generator.complete(prompt, num_beams=1, max_new_tokens=10)
        assert found.ids == generator.complete(prompt, max_new_tokens=10).ids
        assert found.score is None


def test_a_beam_finds_what_greedy_misses() -> None:
    """After "x" "a" is likelier than "b", but after "b" the next is certain."""

    def predict(seen: list[int]) -> Any:
        logits = np.full(VOCAB, -20, np.float32)
        if seen[-1] == ord("b"):
            logits[ord("!")] = 0
        elif seen[-1] == ord("x"):
            logits[[ord("a"), ord("b")]] = np.log([0.6, 0.4])
        elif seen[-1] == ord("!"):
            logits[EOS] = 0
        else:
            logits[:100] = 0
        return logits

    generator = Generator.from_parts(FakeDecoder(predict), byte_tokenizer())
    assert generator.generate("x", max_new_tokens=3).startswith("a")
    best, *others = generator.complete_batch(["x"], num_beams=3, num_return_sequences=2)
    assert (best.text, best.finish_reason) == ("b!", "stop")
    assert others[0].score is not None and best.score is not None
    assert others[0].score <= best.score


def test_prompts_with_beams_and_without_go_in_one_call(pair: tuple[Generator, Any]) -> None:
    generator, _ = pair
    configs = [
        GenerationConfig(max_new_tokens=8, num_beams=3, num_return_sequences=2),
        GenerationConfig(
            max_new_tokens=8,
        ),
        GenerationConfig(max_new_tokens=8, temperature=0.9, seed=1, num_return_sequences=3),
    ]
    found = generator.complete_batch(PROMPTS, config=configs)
    assert [result.score is None for result in found] == [False, False, True, True, True, True]
    alone = generator.complete(PROMPTS[1], config=configs[1])
    assert found[2].ids == alone.ids


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.5},
        {"do_sample": True},
        {"stop_strings": "x"},
        {"prompt_lookup_num_tokens": 3},
        {"num_return_sequences": 3},
    ],
)
def test_what_a_search_cannot_honour_is_refused(
    pair: tuple[Generator, Any], options: dict[str, Any]
) -> None:
    with pytest.raises(OptionError, match="num_beams"):
        pair[0].complete_batch(["x"], num_beams=2, **options)


def test_a_search_has_no_stream(pair: tuple[Generator, Any]) -> None:
    with pytest.raises(OptionError, match="known at its end"):
        pair[0].stream("x", num_beams=2)


def test_a_cancelled_search_gives_what_it_has(pair: tuple[Generator, Any]) -> None:
    stop = Cancellation()
    stop.cancel()
    (found,) = pair[0].complete_batch([PROMPTS[0]], num_beams=3, cancellation=stop)
    assert (found.ids, found.finish_reason) == ((), "cancelled")


def searching(predict: Any, **options: Any) -> list[Any]:
    generator = Generator.from_parts(FakeDecoder(predict), byte_tokenizer())
    return generator.complete_batch(["x"], **options)


def test_a_search_that_ran_out_of_time_says_so_and_gives_what_it_has() -> None:
    found = searching(noise, num_beams=3, num_return_sequences=3, max_time=1e-9)
    assert [(len(one.ids), one.finish_reason) for one in found] == [(1, "time")] * 3
    stop = Cancellation()
    stop.cancel()
    found = searching(noise, num_beams=3, num_return_sequences=3, cancellation=stop)
    assert [(one.ids, one.score) for one in found][1:] == [((), -math.inf)] * 2


@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_a_search_among_nothing_is_refused(value: float) -> None:
    with pytest.raises(FidelityError):
        searching(lambda _: np.full(VOCAB, value, np.float32), num_beams=2)


def test_a_search_never_finds_what_was_banned() -> None:
    """Where fewer ids are left than there are beams."""

    def predict(seen: list[int]) -> Any:
        logits = np.full(VOCAB, -np.inf, np.float32)
        logits[[ord("a"), EOS] if len(seen) > 1 else [ord("a")]] = 0
        return logits

    found = searching(predict, num_beams=4, num_return_sequences=4, max_new_tokens=2)
    assert [one.text for one in found] == ["aa", "a", "", ""]
    assert [one.score == -math.inf for one in found] == [False, False, True, True]


def test_beams_need_a_row_each_and_no_more(bundle: Path) -> None:
    generator = Generator(bundle, threads=1, memory_limit=1 << 30)
    calls = generator.calls
    generator.complete("The king", num_beams=3, max_new_tokens=4)
    assert calls.shelf.lent == 0
