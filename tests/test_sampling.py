"""Choosing ids: each function on arrays that fit on a line, and against transformers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from gptrt import sampling
from gptrt.config import GenerationConfig
from gptrt.errors import FidelityError, OptionError
from gptrt.sampler import Sampler, fresh_seed

GONE = -np.inf


def array(*values: float) -> NDArray[np.float32]:
    return np.array(values, np.float32)


def log(*probabilities: float) -> NDArray[np.float32]:
    return np.log(array(*probabilities))


def history(*ids: int) -> NDArray[np.int64]:
    return np.array(ids, np.int64)


def kept(logits: NDArray[np.float32]) -> list[int]:
    return np.flatnonzero(logits > GONE).tolist()


def test_greedy_takes_the_lowest_id_of_equals() -> None:
    assert sampling.greedy(array(1, 3, 3, 2)) == 1


@pytest.mark.parametrize("logits", [array(1, np.nan, 2), array(GONE, GONE), array(1, np.inf)])
def test_logits_without_a_finite_maximum_are_refused(logits: NDArray[np.float32]) -> None:
    with pytest.raises(FidelityError):
        sampling.greedy(logits)
    with pytest.raises(FidelityError):
        sampling.sample(logits, 7)


def test_temperature_divides() -> None:
    assert sampling.apply_temperature(array(2, -4), 2).tolist() == [1, -2]


def test_top_k_keeps_k_and_what_ties_with_the_last() -> None:
    assert kept(sampling.top_k(array(1, 4, 2, 3), 2)) == [1, 3]
    assert kept(sampling.top_k(array(1, 4, 3, 3), 2)) == [1, 2, 3]
    assert kept(sampling.top_k(array(1, 4), 9)) == [0, 1]


def test_top_p_keeps_the_fewest_that_reach_p() -> None:
    logits = log(0.1, 0.5, 0.25, 0.15)
    assert kept(sampling.top_p(logits, 0.7)) == [1, 2]
    assert kept(sampling.top_p(logits, 0.8)) == [1, 2, 3]
    assert kept(sampling.top_p(logits, 1e-9)) == [1]


def test_min_p_is_relative_to_the_most_likely() -> None:
    assert kept(sampling.min_p(log(0.1, 0.5, 0.24, 0.16), 0.4)) == [1, 2]
    assert kept(sampling.min_p(log(0.1, 0.9), 0.0)) == [0, 1]


def test_typical_p_can_drop_the_most_likely() -> None:
    logits = log(0.36, 0.16, 0.16, 0.16, 0.16)
    assert kept(sampling.typical_p(logits, 0.5)) == [1, 2, 3, 4]


def test_no_function_hides_that_there_is_no_number() -> None:
    """What is banned altogether, or is NaN, is so behind it."""
    nothing = np.full(4, -np.inf, np.float32)
    broken = np.array([0, np.nan, 1, 2], np.float32)
    for logits in (nothing, broken):
        for warp in (sampling.typical_p, sampling.top_p, sampling.min_p):
            with pytest.raises(FidelityError), np.errstate(invalid="ignore"):
                sampling.sample(warp(logits, 0.5), 1)


def test_repetition_penalty_pushes_down_on_both_sides_of_zero() -> None:
    logits = array(2, -2, 2, -2)
    assert sampling.repetition_penalty(logits, history(0, 1, 0), 2.0).tolist() == [1, -4, 2, -2]


def test_no_ngram_is_completed_twice() -> None:
    logits = np.zeros(6, np.float32)
    seen = history(1, 2, 3, 1, 2, 4, 1, 2)
    assert kept(sampling.no_repeat_ngram(logits, seen, 3)) == [0, 1, 2, 5]
    assert kept(sampling.no_repeat_ngram(logits, seen, 1)) == [0, 5]
    assert kept(sampling.no_repeat_ngram(logits, history(1), 3)) == [0, 1, 2, 3, 4, 5]


def test_bad_words_lose_their_last_id_only_after_the_others() -> None:
    logits, words = np.zeros(5, np.float32), [(4,), (1, 2), (3, 1, 0)]
    assert kept(sampling.bad_words(logits, history(3, 1), words)) == [1, 3]
    assert kept(sampling.bad_words(logits, history(2), words)) == [0, 1, 2, 3]


def test_no_function_changes_its_input() -> None:
    logits = log(0.1, 0.5, 0.25, 0.15)
    before = logits.copy()
    sampling.apply_temperature(logits, 2)
    sampling.top_k(logits, 2)
    sampling.top_p(logits, 0.5)
    sampling.min_p(logits, 0.5)
    sampling.typical_p(logits, 0.5)
    sampling.repetition_penalty(logits, history(1), 2)
    sampling.ban(logits, [1])
    assert (logits == before).all()


def test_a_draw_changes_as_seldom_as_the_distribution_does() -> None:
    """The last bit of a logit, or an id that a filter takes away, moves no other border."""
    random = np.random.default_rng(0)
    logits = random.standard_normal(5_000).astype(np.float32)
    other = logits + 1e-4 * random.standard_normal(5_000).astype(np.float32)
    other[random.integers(5_000, size=5)] = GONE
    keys = [sampling.draw_key(3, 0, step) for step in range(1_000)]
    same = sum(sampling.sample(logits, key) == sampling.sample(other, key) for key in keys)
    assert same > 980


def test_sample_never_draws_what_was_removed() -> None:
    logits = array(GONE, 0, GONE, 0, GONE)
    assert {sampling.sample(logits, key) for key in range(50)} == {1, 3}


def test_a_draw_depends_on_seed_sequence_and_step_alone() -> None:
    keys = [(seed, row, step) for seed in (0, 1, 2**64 - 1) for row in (0, 1) for step in (0, 1)]
    numbers = [sampling.draw_key(*key) for key in keys]
    assert numbers == [sampling.draw_key(*key) for key in keys]
    assert len(set(numbers)) == len(numbers)


@pytest.mark.parametrize("over", ["steps", "ids"])
def test_numbers_are_uniform(over: str) -> None:
    if over == "ids":
        numbers = sampling.bits(sampling.draw_key(7, 0, 0), np.arange(20_000))
    else:
        keys = (sampling.draw_key(7, 0, step) for step in range(20_000))
        numbers = np.concatenate([sampling.bits(key, np.array([5])) for key in keys])
    counts, _ = np.histogram(numbers / 2**64, bins=20, range=(0, 1))
    assert ((counts - 1000) ** 2 / 1000).sum() < 50  # chi squared, 19 degrees, p about 1e-4


def test_samples_follow_the_probabilities() -> None:
    sampler = Sampler(GenerationConfig(do_sample=True), [0], room=10_000, seed=3)
    counts = np.bincount([sampler.next(log(0.6, 0.3, 0.1)) for _ in range(10_000)])
    assert np.abs(counts / 10_000 - [0.6, 0.3, 0.1]).max() < 0.02


def test_samples_follow_the_probabilities_of_many_unlikely_ids_too() -> None:
    """Two ids of a quarter each, and 5,000 that share the other half, each far behind."""
    logits = np.full(5_002, math.log(0.5 / 5_000), np.float32)
    logits[:2] = math.log(0.25)
    sampler = Sampler(GenerationConfig(do_sample=True), [0], room=10_000, seed=3)
    drawn = np.array([sampler.next(logits) for _ in range(10_000)])
    shares = [(drawn == 0).mean(), (drawn == 1).mean(), (drawn > 1).mean()]
    assert np.abs(np.array(shares) - [0.25, 0.25, 0.5]).max() < 0.02
    assert len(np.unique(drawn)) > 3_000  # of 5,000 that are drawn 5,000 times, 1 - 1/e


def test_no_end_before_min_new_tokens() -> None:
    config = GenerationConfig(min_new_tokens=2)
    sampler = Sampler(config, [0], eos_token_ids=(2,), room=3, seed=0)
    assert [sampler.next(array(0, 1, 2)) for _ in range(3)] == [1, 1, 2]


def test_any_of_several_ends_is_put_off() -> None:
    sampler = Sampler(GenerationConfig(min_new_tokens=1), [0], eos_token_ids=(1, 2), room=2, seed=0)
    assert [sampler.next(array(0, 1, 2)) for _ in range(2)] == [0, 2]


def test_what_is_chosen_counts_as_read() -> None:
    sampler = Sampler(GenerationConfig(no_repeat_ngram_size=1), [3], room=3, seed=0)
    assert [sampler.next(array(1, 2, 3, 4)) for _ in range(3)] == [2, 1, 0]


def test_without_a_seed_two_samplers_differ() -> None:
    config, logits = GenerationConfig(do_sample=True), np.zeros(1000, np.float32)
    one, other = (Sampler(config, [0], room=8, seed=fresh_seed()) for _ in range(2))
    assert [one.next(logits) for _ in range(8)] != [other.next(logits) for _ in range(8)]


# --- the chain ----------------------------------------------------------------------------------


def test_a_bias_moves_a_choice_and_only_that() -> None:
    biased = Sampler(GenerationConfig(logit_bias={1: 5.0, 2: -5.0}), [0], room=2, seed=0)
    assert biased.next(array(0, 1, 2)) == 1
    assert biased.next(array(0, -6, 4.5)) == 0


def test_a_processor_sees_all_ids_and_what_the_others_left() -> None:
    seen: list[list[int]] = []

    def forbid(ids: NDArray[np.int64], logits: NDArray[np.float32]) -> NDArray[np.float32]:
        seen.append(ids.tolist())
        assert logits[3] == GONE
        return np.where(np.arange(len(logits)) == ids[-1], GONE, logits).astype(np.float32)

    config = GenerationConfig(logits_processor=forbid, bad_words_ids=[[3]])
    sampler = Sampler(config, [0, 2], room=3, seed=0)
    assert [sampler.next(array(0, 1, 2, 9)) for _ in range(3)] == [1, 2, 1]
    assert seen == [[0, 2], [0, 2, 1], [0, 2, 1, 2]]


@pytest.mark.parametrize("wrong", [None, 3.0, array(1, 2), [0, 1, 2]])
def test_what_a_processor_gives_is_checked(wrong: Any) -> None:
    sampler = Sampler(GenerationConfig(logits_processor=lambda *_: wrong), [0], room=1, seed=0)
    with pytest.raises(OptionError, match=r"wanted logits \[3\] from a logits_processor"):
        sampler.next(array(0, 1, 2))


def test_a_guess_is_what_would_be_chosen_and_decides_nothing() -> None:
    config = GenerationConfig(temperature=1.0, no_repeat_ngram_size=1)
    plain, guessing = (Sampler(config, [0], room=6, seed=4) for _ in range(2))
    logits = np.zeros(50, np.float32)
    ahead: list[int] = []
    for _ in range(5):
        ahead.append(guessing.guess(logits, ahead))
    chosen = [plain.next(logits) for _ in range(5)]
    assert ahead == chosen
    assert [guessing.next(logits) for _ in range(5)] == chosen


def test_log_probabilities_are_those_of_the_softmax() -> None:
    logits = array(1, 3, 2, -1)
    wanted = np.log(np.exp(logits) / np.exp(logits).sum())
    np.testing.assert_allclose(sampling.log_probabilities(logits, [2, 0]), wanted[[2, 0]], 1e-6)
    assert sampling.most_likely(array(1, 3, 3, 2), 3).tolist() == [1, 2, 3]
    assert sampling.most_likely(array(1, 3), 5).tolist() == [1, 0]


# --- against transformers -----------------------------------------------------------------------

Function = Callable[[NDArray[np.float32], NDArray[np.int64]], NDArray[np.float32]]

PAIRS: list[tuple[str, dict[str, Any], Function]] = [
    (
        "TemperatureLogitsWarper",
        {"temperature": 0.7},
        lambda x, _: sampling.apply_temperature(x, 0.7),
    ),
    ("TopKLogitsWarper", {"top_k": 7}, lambda x, _: sampling.top_k(x, 7)),
    ("TopPLogitsWarper", {"top_p": 0.8}, lambda x, _: sampling.top_p(x, 0.8)),
    ("TopPLogitsWarper", {"top_p": 0.05}, lambda x, _: sampling.top_p(x, 0.05)),
    ("MinPLogitsWarper", {"min_p": 0.1}, lambda x, _: sampling.min_p(x, 0.1)),
    ("TypicalLogitsWarper", {"mass": 0.3}, lambda x, _: sampling.typical_p(x, 0.3)),
    ("TypicalLogitsWarper", {"mass": 0.95}, lambda x, _: sampling.typical_p(x, 0.95)),
    (
        "RepetitionPenaltyLogitsProcessor",
        {"penalty": 1.3},
        lambda x, ids: sampling.repetition_penalty(x, ids, 1.3),
    ),
    (
        "NoRepeatNGramLogitsProcessor",
        {"ngram_size": 2},
        lambda x, ids: sampling.no_repeat_ngram(x, ids, 2),
    ),
    (
        "SequenceBiasLogitsProcessor",
        {"sequence_bias": [[[3], 2.5], [[7], -4.0]]},
        lambda x, _: sampling.add_bias(x, np.array([3, 7]), array(2.5, -4.0)),
    ),
    (
        "NoBadWordsLogitsProcessor",
        {"bad_words_ids": [[4], [1, 2], [2, 1, 9]]},
        lambda x, ids: sampling.bad_words(x, ids, [[4], [1, 2], [2, 1, 9]]),
    ),
]


@pytest.mark.parametrize(("name", "arguments", "ours"), PAIRS, ids=range(len(PAIRS)))
def test_each_function_equals_that_of_transformers(
    name: str, arguments: dict[str, Any], ours: Function
) -> None:
    torch = pytest.importorskip("torch")
    theirs = getattr(pytest.importorskip("transformers"), name, None)
    if theirs is None:
        theirs = getattr(pytest.importorskip("transformers.generation.logits_process"), name)
    process = theirs(**arguments)
    for seed in range(20):
        random = np.random.default_rng(seed)
        logits = (3 * random.standard_normal(200)).astype(np.float32)
        ids = random.integers(0, 10, 30)
        wanted = process(torch.from_numpy(ids[None]), torch.from_numpy(logits[None].copy()))[0]
        np.testing.assert_allclose(ours(logits, ids), wanted.numpy(), rtol=1e-6)
