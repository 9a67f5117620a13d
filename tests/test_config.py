"""The options: what is accepted, what is refused, and what they mean together."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from gptrt.config import GenerationConfig
from gptrt.errors import OptionError


def samples(**options: object) -> bool:
    return GenerationConfig.from_options(**options).samples


def test_greedy_is_the_default() -> None:
    assert not samples()


@pytest.mark.parametrize(
    "option", [{"temperature": 0.7}, {"top_k": 5}, {"top_p": 0.9}, {"min_p": 0.1}, {"typical_p": 1}]
)
def test_an_option_of_chance_means_sampling(option: dict[str, float]) -> None:
    assert samples(**option)


def test_temperature_zero_means_greedy_whatever_else_is_given() -> None:
    assert not samples(temperature=0)
    assert not samples(temperature=0.0, top_k=40)
    assert not samples(temperature=0, do_sample=False)


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": False, "top_k": 5},
        {"do_sample": False, "temperature": 0.5},
        {"do_sample": True, "temperature": 0},
        {"min_new_tokens": 9, "max_new_tokens": 8},
    ],
)
def test_contradictions_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(OptionError):
        GenerationConfig.from_options(**options)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_new_tokens", 0),
        ("max_new_tokens", 1.5),
        ("max_new_tokens", True),
        ("min_new_tokens", -1),
        ("do_sample", 1),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("temperature", "hot"),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("top_p", float("nan")),
        ("min_p", -0.1),
        ("typical_p", 0),
        ("repetition_penalty", 0),
        ("no_repeat_ngram_size", -2),
        ("bad_words_ids", [[]]),
        ("bad_words_ids", [1, 2]),
        ("bad_words_ids", [[-1]]),
        ("stop_strings", [""]),
        ("stop_strings", [3]),
        ("max_time", 0),
        ("max_time", float("nan")),
        ("logit_bias", [5, 1.0]),
        ("temperature", 10**400),
        ("seed", -1),
        ("seed", 1 << 64),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(OptionError, match=name):
        GenerationConfig.from_options(**{name: value})
    with pytest.raises(OptionError, match=name):
        GenerationConfig(**{name: value})


def test_an_unknown_option_is_refused_with_the_nearest_and_all_known_names() -> None:
    with pytest.raises(OptionError) as caught:
        GenerationConfig.from_options(temprature=0.5)
    assert "'temprature' (did you mean 'temperature'?)" in caught.value.found
    assert all(f.name in caught.value.do for f in dataclasses.fields(GenerationConfig))


@pytest.mark.parametrize("name", ["num_beam_groups", "penalty_alpha", "guidance_scale"])
def test_an_option_that_cannot_be_honoured_is_not_ignored(name: str) -> None:
    with pytest.raises(OptionError, match=name):
        GenerationConfig.from_options(**{name: 2})


def test_every_fault_is_listed_at_once() -> None:
    with pytest.raises(OptionError) as caught:
        GenerationConfig.from_options(top_p=2.0, temperature=-1, penalty_alpha=4)
    assert all(name in caught.value.found for name in ("top_p", "temperature", "penalty_alpha"))


def test_none_means_not_given() -> None:
    assert GenerationConfig.from_options(max_new_tokens=None, stop_strings=None, top_k=None) == (
        GenerationConfig()
    )


def test_a_lone_stop_string_and_lists_become_tuples() -> None:
    config = GenerationConfig.from_options(stop_strings="end", bad_words_ids=[[1, 2], [3]])
    assert config.stop_strings == ("end",)
    assert config.bad_words_ids == ((1, 2), (3,))
    assert hash(config) == hash(
        GenerationConfig(stop_strings=["end"], bad_words_ids=((1, 2), (3,)))
    )


def test_numbers_of_numpy_are_numbers() -> None:
    config = GenerationConfig(max_new_tokens=np.int64(3), temperature=np.float32(0.5))
    assert config.max_new_tokens == 3
    values = {"seed": np.int32(7), "max_new_tokens": np.uint8(200), "top_p": np.float32(0.5)}
    bias = {np.int64(5): np.float32(1)}
    config = GenerationConfig.from_options(**values, logit_bias=bias)
    found = (config.seed, config.max_new_tokens, config.top_p, *config.logit_bias[0])
    assert [type(value) for value in found] == [int, int, float, int, float]
