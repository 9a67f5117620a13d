"""Generation over a fake model: stopping, streaming, sampling, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gptrt.reading
from gptrt.config import GenerationConfig
from gptrt.errors import BundleError, GptrtError, OptionError, PromptError
from gptrt.generator import Generator
from gptrt.sampling import Logits
from gptrt.scoring import perplexity
from tests.fakes import EOS, VOCAB, FakeDecoder, by_heart, byte_tokenizer, noise

PROMPT = "Say: "


def saying(text: str, context: int = 64) -> Generator:
    """A generator that continues PROMPT with `text` and the end."""
    decoder = FakeDecoder(by_heart([*(PROMPT + text).encode()]), context=context)
    return Generator.from_parts(decoder, byte_tokenizer())


def babbling(context: int = 64) -> Generator:
    return Generator.from_parts(FakeDecoder(noise, context=context), byte_tokenizer())


# --- one text, three ways -----------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"temperature": 1.3, "seed": 5, "top_p": 0.9}])
def test_ids_pieces_and_text_agree(options: dict[str, Any]) -> None:
    generator = babbling()
    result = generator.complete("x", max_new_tokens=20, **options)
    assert generator.generate("x", max_new_tokens=20, **options) == result.text
    assert "".join(generator.stream("x", max_new_tokens=20, **options)) == result.text
    assert tuple(generator.tokens("x", max_new_tokens=20, **options)) == result.ids


def test_the_prompt_is_read_once_and_then_one_id_at_a_time() -> None:
    decoder = FakeDecoder(noise)
    generator = Generator.from_parts(decoder, byte_tokenizer())
    generator.generate("12345", max_new_tokens=4)
    assert decoder.passes == [5, 1, 1, 1]


def test_a_long_prompt_is_read_in_several_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = babbling().generate("1234567", max_new_tokens=4)
    monkeypatch.setattr(gptrt.reading, "LONGEST_PASS", 4)
    decoder = FakeDecoder(noise)
    parts = Generator.from_parts(decoder, byte_tokenizer())
    assert parts.generate("1234567", max_new_tokens=4) == whole
    assert decoder.passes == [4, 3, 1, 1, 1]


def test_ids_are_as_good_as_text() -> None:
    assert saying("yes").generate(np.array([*PROMPT.encode()])) == "yes"


def test_streamed_pieces_are_whole_characters() -> None:
    assert list(saying("é👍.").stream(PROMPT)) == ["é", "👍", "."]


# --- ending -------------------------------------------------------------------------------------


def test_the_end_of_text_stops_and_is_no_part_of_the_result() -> None:
    result = saying("yes").complete(PROMPT)
    assert (result.text, result.finish_reason, result.stop_string) == ("yes", "stop", None)
    assert result.ids == tuple(b"yes")
    assert result.prompt_ids == tuple(PROMPT.encode())


def test_max_new_tokens_is_exact() -> None:
    result = saying("yesterday").complete(PROMPT, max_new_tokens=3)
    assert (result.text, result.finish_reason) == ("yes", "length")


def test_a_full_context_ends_with_length() -> None:
    result = saying("yesterday", context=len(PROMPT) + 4).complete(PROMPT)
    assert (result.text, result.finish_reason) == ("yest", "length")


def test_half_a_character_at_the_limit_is_marked() -> None:
    assert saying("a👍").generate(PROMPT, max_new_tokens=2) == "a\N{REPLACEMENT CHARACTER}"


def test_a_stop_string_ends_the_text_before_itself() -> None:
    result = saying("one END two").complete(PROMPT, stop_strings=["END", "two"])
    assert (result.text, result.finish_reason, result.stop_string) == ("one ", "stop", "END")


def test_streaming_never_leaks_half_a_stop_string() -> None:
    assert "".join(saying("a EN").stream(PROMPT, stop_strings="END")) == "a EN"
    streamed = list(saying("a EN, END").stream(PROMPT, stop_strings="END"))
    assert "".join(streamed) == "a EN, "
    assert streamed[:3] == ["a", " ", "EN,"]


def test_a_stop_string_at_the_limit_counts_as_stop() -> None:
    result = saying("no END").complete(PROMPT, max_new_tokens=6, stop_strings="END")
    assert (result.text, result.finish_reason) == ("no ", "stop")


def test_min_new_tokens_puts_off_the_end() -> None:
    result = saying("yes").complete(PROMPT, min_new_tokens=5, max_new_tokens=9)
    assert len(result.ids) == 5
    assert result.finish_reason == "stop"


def test_max_time_ends_after_the_id_that_reached_it(monkeypatch: pytest.MonkeyPatch) -> None:
    now, knows = [100.0], by_heart([*(PROMPT + "yesterday").encode()])

    def slowly(seen: list[int]) -> Logits:
        now[0] += 1.0
        return knows(seen)

    monkeypatch.setattr("gptrt.decoding.time.monotonic", lambda: now[0])
    generator = Generator.from_parts(FakeDecoder(slowly), byte_tokenizer())
    result = generator.complete(PROMPT, max_time=2.5)
    assert (result.text, result.finish_reason) == ("yes", "time")


def test_without_an_end_id_only_the_limit_ends() -> None:
    decoder = FakeDecoder(by_heart([*PROMPT.encode()]))
    generator = Generator.from_parts(decoder, byte_tokenizer().endless())
    assert list(generator.tokens(PROMPT, max_new_tokens=3)) == [EOS, EOS, EOS]


# --- chance -------------------------------------------------------------------------------------


def test_a_seed_gives_the_same_however_calls_are_interleaved() -> None:
    generator = babbling()
    alone = [list(generator.tokens("x", max_new_tokens=9, seed=s, top_k=50)) for s in (1, 2)]
    streams = [generator.tokens("x", max_new_tokens=9, seed=s, top_k=50) for s in (1, 2)]
    assert [list(ids) for ids in zip(*zip(*streams, strict=True), strict=True)] == alone
    assert alone[0] != alone[1]


def test_top_k_of_one_is_greedy() -> None:
    generator = babbling()
    assert generator.generate("x", top_k=1, seed=1) == generator.generate("x")


def test_a_repeated_ngram_is_avoided() -> None:
    ids = list(babbling().tokens("x", max_new_tokens=40, no_repeat_ngram_size=1))
    assert len(set(ids)) == len(ids)


# --- life ---------------------------------------------------------------------------------------


def test_a_stream_that_is_closed_early_leaves_the_generator_usable() -> None:
    generator = saying("yes")
    stream = generator.stream(PROMPT)
    assert next(stream) == "y"
    stream.close()
    assert generator.generate(PROMPT) == "yes"


def test_a_closed_generator_says_so() -> None:
    with saying("yes") as generator:
        stream = generator.stream(PROMPT)
        assert next(stream) == "y"
    assert "".join(stream) == "es"
    with pytest.raises(GptrtError, match="closed"):
        generator.generate(PROMPT)


# --- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", ["", []])
def test_an_empty_prompt_is_refused(prompt: Any) -> None:
    with pytest.raises(PromptError, match="one token"):
        saying("yes").generate(prompt)


@pytest.mark.parametrize("prompt", [[VOCAB], [-1], [1.5], [[1, 2]], ["a"], b"abc"])
def test_what_are_no_ids_of_the_model_is_refused(prompt: Any) -> None:
    with pytest.raises(PromptError):
        saying("yes").generate(prompt)


def test_a_prompt_that_leaves_no_room_is_refused_with_both_lengths() -> None:
    assert len(babbling(context=8).complete("1234567").ids) == 1
    with pytest.raises(PromptError, match=r"at most 7 tokens.*found 8 tokens"):
        babbling(context=8).generate("12345678")


def test_refusals_come_before_the_first_step() -> None:
    for call in (saying("yes").stream, saying("yes").tokens):
        with pytest.raises(OptionError, match="num_beams"):
            call(PROMPT, num_beams=2)


def test_a_config_serves_for_options_but_not_beside_them() -> None:
    generator, config = saying("yes"), GenerationConfig(max_new_tokens=2)
    assert generator.generate(PROMPT, config=config) == "ye"
    with pytest.raises(OptionError, match="both"):
        generator.generate(PROMPT, config=config, seed=1)
    wrong: list[Any] = [{"max_new_tokens": 5}, "x", 5, [{"max_new_tokens": 5}]]
    for each in wrong:
        with pytest.raises(OptionError, match="a GenerationConfig"):
            generator.complete_batch([PROMPT], config=each)


@pytest.mark.parametrize("option", [{"stop_strings": "e"}, {"logprobs": True}, {"top_logprobs": 2}])
def test_ids_cannot_honour_what_is_of_texts_and_say_so(option: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=next(iter(option))):
        saying("yes").tokens(PROMPT, **option)


def test_a_text_is_not_taken_for_a_list_of_its_characters() -> None:
    generator: Any = saying("yes")
    calls = [
        lambda: generator.generate_batch(PROMPT),
        lambda: generator.classify_batch(PROMPT, ["a", "b"]),
        lambda: generator.answer_batch(PROMPT),
        lambda: generator.score(PROMPT, " yes"),
        lambda: generator.embed(PROMPT),
    ]
    for call in calls:
        with pytest.raises(PromptError, match="a list of"):
            call()


def test_ends_beyond_the_vocabulary_are_refused() -> None:
    tokenizer = byte_tokenizer().ending_with([VOCAB])
    with pytest.raises(BundleError, match=f"found {VOCAB}"):
        Generator.from_parts(FakeDecoder(noise), tokenizer)


def test_room_for_more_than_memory_could_hold_is_no_matter() -> None:
    stream = babbling().stream("x", max_new_tokens=1 << 31, context_overflow="slide", top_k=3)
    assert len([next(stream) for _ in range(100)]) == 100
    stream.close()


def test_bad_words_beyond_the_vocabulary_are_refused() -> None:
    with pytest.raises(OptionError, match="bad_words_ids"):
        saying("yes").generate(PROMPT, bad_words_ids=[[VOCAB]])


# --- perplexity over the same seam --------------------------------------------------------------


def test_perplexity_predicts_every_id_but_the_first_exactly_once() -> None:
    """A model that knows the last id's successor gives every window the same likelihood."""
    decoder = FakeDecoder(lambda seen: np.eye(VOCAB, dtype=np.float32)[seen[-1] + 1] * 3)
    ids = list(range(50))
    wanted = np.log(1 + (VOCAB - 1) * np.exp(-3.0))
    for window, stride in ((None, None), (16, 16), (16, 5), (7, 1), (64, 64)):
        result = perplexity(decoder, ids, window=window, stride=stride)
        assert result.tokens == 49
        assert result.nll == pytest.approx(wanted, rel=1e-6)
        assert result.perplexity == pytest.approx(np.exp(wanted), rel=1e-6)


def test_perplexity_gives_each_id_the_context_that_the_stride_leaves() -> None:
    def certain_after_four(seen: list[int]) -> Any:
        return np.eye(VOCAB, dtype=np.float32)[seen[-1] + 1] * (50 if len(seen) >= 4 else 0)

    result = perplexity(FakeDecoder(certain_after_four), range(21), window=5, stride=2)
    assert result.nll * 20 == pytest.approx(3 * np.log(VOCAB), rel=1e-6)


@pytest.mark.parametrize(("window", "stride"), [(65, None), (8, 9), (8, 0)])
def test_perplexity_refuses_windows_that_do_not_fit(window: int, stride: int | None) -> None:
    with pytest.raises(OptionError):
        perplexity(FakeDecoder(noise), range(9), window=window, stride=stride)


@pytest.mark.parametrize("ids", [[], [1], [1, VOCAB]])
def test_perplexity_refuses_what_has_nothing_to_predict(ids: list[int]) -> None:
    with pytest.raises(GptrtError, match="two tokens"):
        perplexity(FakeDecoder(noise), ids)


def test_no_prompts_give_no_results_and_no_texts_no_embeddings(bundle: Path) -> None:
    with Generator(bundle, device="cpu") as generator:
        assert generator.complete_batch([]) == generator.generate_batch([]) == []
        with pytest.raises(PromptError, match="one text"):
            generator.embed([])


def test_a_processor_may_change_the_logits_that_it_is_given(bundle: Path) -> None:
    def ban_the_best(_: Any, logits: Any) -> Any:
        logits[logits.argmax()] = -np.inf
        return logits

    with Generator(bundle, device="cpu") as generator:
        options = {"max_new_tokens": 1, "top_logprobs": 2}
        plain = generator.complete("a", **options)
        second = generator.complete("a", logits_processor=ban_the_best, **options)
    assert second.top_logprobs == plain.top_logprobs  # those of the model
    assert plain.top_logprobs is not None and second.ids == (plain.top_logprobs[0][1][0],)
