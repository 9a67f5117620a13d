"""The generator for other people's tests."""

from __future__ import annotations

import pytest

from gptrt.errors import OptionError, PromptError
from gptrt.testing import FakeGenerator


def test_it_gives_the_answers_that_it_was_given() -> None:
    generator = FakeGenerator({"Hello": " there.", "Bye": " now 👍."})
    assert generator.generate("Hello") == " there."
    assert list(generator.stream("Bye"))[-2:] == ["👍", "."]
    assert generator.generate("What?") == ""
    assert generator.complete("Hello").finish_reason == "stop"


def test_a_function_may_answer_anything() -> None:
    generator = FakeGenerator(str.upper)
    assert generator.generate("abc") == "ABC"
    assert generator.generate_batch(["x", "yz"]) == ["X", "YZ"]


def test_the_longest_prompt_counts() -> None:
    generator = FakeGenerator({"a": "1", "ab": "2"})
    assert [generator.generate(prompt) for prompt in ("a", "ab", "abc")] == ["1", "2", "2"]


def test_everything_else_is_real() -> None:
    generator = FakeGenerator({"Say": " one END two"})
    result = generator.complete("Say", stop_strings="END")
    assert (result.text, result.stop_string) == (" one ", "END")
    assert generator.complete("Say", max_new_tokens=2).finish_reason == "length"
    assert generator.generate("Say", temperature=5.0, seed=1) == " one END two"
    with pytest.raises(OptionError):
        generator.generate("Say", temprature=1)
    with pytest.raises(PromptError):
        generator.generate("")
