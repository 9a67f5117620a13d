"""What must never differ: ways of computing the same thing, for any prompt and any options."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import gptrt
import gptrt.reading
from gptrt.generator import Generator
from gptrt.results import Generation
from gptrt.session import Session

VOCAB, CONTEXT = 300, 64

checked = settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

prompts = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=24)
sampled = st.fixed_dictionaries(
    {"temperature": st.sampled_from([0.7, 1.0, 1.5]), "seed": st.integers(0, 9)},
    optional={
        "top_k": st.integers(1, 50),
        "top_p": st.sampled_from([0.5, 0.9]),
        "min_p": st.sampled_from([0.02, 0.2]),
        "typical_p": st.sampled_from([0.3, 0.9]),
    },
)
greedy: st.SearchStrategy[dict[str, Any]] = st.just({})
options = st.builds(
    lambda chosen, filters, length: {**chosen, **filters, "max_new_tokens": length},
    st.one_of(greedy, sampled),
    st.fixed_dictionaries(
        {},
        optional={
            "repetition_penalty": st.sampled_from([0.8, 1.3]),
            "no_repeat_ngram_size": st.integers(1, 4),
            "min_new_tokens": st.just(1),
            "logit_bias": st.dictionaries(st.integers(0, VOCAB - 1), st.floats(-5, 5), max_size=3),
        },
    ),
    st.integers(1, 12),
)


@pytest.fixture(scope="module")
def generator(bundle: Path) -> Generator:
    """Quantized, so that the last bit of a sum decides a rounding and with it an id."""
    return Generator(bundle, device="cpu", threads=1)


@pytest.fixture(scope="module")
def fresh(generator: Generator) -> Generator:
    """The same, remembering nothing."""
    return Generator.from_parts(generator.decoder, generator.tokenizer, reuse="none")


@pytest.fixture(scope="module")
def floats(exact: Path) -> Generator:
    """The same model unquantized."""
    return Generator(exact, device="cpu", threads=1, reuse="none")


def same(a: Generation, b: Generation) -> None:
    assert (a.ids, a.text, a.finish_reason) == (b.ids, b.text, b.finish_reason)


@checked
@given(st.lists(st.tuples(prompts, options), min_size=1, max_size=6), st.integers(1, 4))
def test_a_batch_gives_what_each_prompt_gives_alone(
    generator: Generator,
    fresh: Generator,
    asked: list[tuple[list[int], dict[str, Any]]],
    batch_size: int,
) -> None:
    configs = [gptrt.GenerationConfig.from_options(**{"seed": 0} | each) for _, each in asked]
    together = generator.complete_batch(
        [prompt for prompt, _ in asked], config=configs, batch_size=batch_size
    )
    for (prompt, _), config, found in zip(asked, configs, together, strict=True):
        same(found, fresh.complete(prompt, config=config))


@checked
@given(prompts, sampled, st.integers(2, 5))
def test_several_sequences_of_a_prompt_are_those_that_their_numbers_give(
    generator: Generator, prompt: list[int], chance: dict[str, Any], count: int
) -> None:
    asked = chance | {"max_new_tokens": 6}
    several = generator.complete_batch([prompt], num_return_sequences=count, **asked)
    fewer = generator.complete_batch([prompt], num_return_sequences=count - 1, **asked)
    same(several[0], generator.complete(prompt, **asked))
    for a, b in zip(several, fewer, strict=False):
        same(a, b)


@checked
@given(prompts, options)
def test_a_stream_is_the_whole(
    generator: Generator, prompt: list[int], chosen: dict[str, Any]
) -> None:
    chosen = {"seed": 0} | chosen
    whole = generator.complete(prompt, **chosen)
    stream = generator.stream(prompt, **chosen)
    assert "".join(stream) == whole.text
    same(stream.result, whole)
    assert tuple(generator.tokens(prompt, **chosen)) == whole.ids


@checked
@given(prompts, prompts, options)
def test_what_was_read_before_changes_nothing(
    generator: Generator,
    fresh: Generator,
    first: list[int],
    more: list[int],
    chosen: dict[str, Any],
) -> None:
    chosen = {"seed": 0} | chosen
    before = generator.complete(first, **chosen)
    prompt = [*first, *before.ids, *more][: CONTEXT - 13]
    same(generator.complete(prompt, **chosen), fresh.complete(prompt, **chosen))


@checked
@given(st.lists(prompts, min_size=1, max_size=3), st.integers(0, 80), options)
def test_a_session_rewound_anywhere_goes_on_as_one_made_anew(
    generator: Generator,
    fresh: Generator,
    parts: list[list[int]],
    length: int,
    chosen: dict[str, Any],
) -> None:
    chosen = {"seed": 0} | chosen
    session = Session(generator)
    for part in parts:
        if len(session) + len(part) < CONTEXT - 13:
            session.append(part)
            session.generate(**chosen)
    session.rewind(max(1, min(length, len(session), CONTEXT - 13)))
    wanted = fresh.complete(session.ids, **chosen)
    with session.fork() as other:
        same(other.complete(**chosen), wanted)
    same(session.complete(**chosen), wanted)
    session.close()


@checked
@given(prompts, options, st.integers(1, 8))
def test_saved_and_loaded_is_as_if_never_left(
    generator: Generator,
    tmp_path: Path,
    prompt: list[int],
    chosen: dict[str, Any],
    more: int,
) -> None:
    chosen = {"seed": 0} | chosen
    session = Session(generator)
    session.append(prompt)
    session.generate(max_new_tokens=more)
    session.save(tmp_path / "session")
    loaded = Session.load(generator, tmp_path / "session")
    assert loaded.ids == session.ids
    same(loaded.complete(**chosen), session.complete(**chosen))
    loaded.close()
    session.close()


@checked
@given(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=50), st.sampled_from([4, 6, 16]))
def test_a_prompt_in_parts_is_the_prompt(fresh: Generator, prompt: list[int], longest: int) -> None:
    whole = fresh.complete(prompt, max_new_tokens=8, top_logprobs=5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gptrt.reading, "LONGEST_PASS", longest)
        parts = fresh.complete(prompt, max_new_tokens=8, top_logprobs=5)
    assert parts == whole  # to the last bit of every log probability


@checked
@given(prompts, options, st.integers(1, 12))
def test_guessing_changes_nothing(
    floats: Generator, prompt: list[int], chosen: dict[str, Any], guesses: int
) -> None:
    chosen = {"seed": 0} | chosen
    text = (prompt * 4)[:40]  # so that there is something to look up
    plain = floats.complete(text, **chosen)
    same(floats.complete(text, prompt_lookup_num_tokens=guesses, **chosen), plain)


@checked
@given(prompts, options, st.integers(1, 12))
def test_a_draft_model_changes_nothing(
    floats: Generator, generator: Generator, prompt: list[int], chosen: dict[str, Any], guesses: int
) -> None:
    chosen = {"seed": 0} | chosen
    drafted = Generator.from_parts(
        floats.decoder, floats.tokenizer, draft=generator.decoder, reuse="none"
    )
    found = drafted.complete(prompt, num_assistant_tokens=guesses, **chosen)
    same(found, floats.complete(prompt, **chosen))


@checked
@given(prompts)
def test_sliding_goes_on_as_from_the_last_half(fresh: Generator, prompt: list[int]) -> None:
    long = fresh.complete(prompt, max_new_tokens=100, context_overflow="slide", min_new_tokens=100)
    assert len(long.ids) == 100
    everything = [*prompt, *long.ids]
    tail = everything[CONTEXT + 1 - CONTEXT // 2 : CONTEXT + 1]
    after = fresh.complete(tail, max_new_tokens=20, min_new_tokens=20)
    assert after.ids == tuple(everything[CONTEXT + 1 : CONTEXT + 21])
