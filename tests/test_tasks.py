"""Tasks: labels with the probabilities of the formula, answers, and sentences of the text."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gptrt.answers import NEUTRAL, ZERO_SHOT
from gptrt.decoder import Logits
from gptrt.errors import FidelityError, OptionError, PromptError
from gptrt.generator import Generator
from gptrt.opening import embedded_bundle
from gptrt.sentences import sentences
from gptrt.task import Task, label_ids
from gptrt.testing import EOS, FakeDecoder, FakeGenerator, byte_tokenizer
from tests.conftest import change_manifest
from tests.fakes import favouring, noise

REVIEWS = Task("classification", "Review: {text}\nVerdict:", ("good", "bad", "so-so"))
CALIBRATED = Task(
    REVIEWS.kind, REVIEWS.prompt, REVIEWS.labels, temperature=2.5, bias=(0.5, -1.0, 0.0)
)
SUMMARIES = Task("summarization", "{document}\nIn short:", max_new_tokens=40)
GERMAN = Task("translation", "English: {text}\nGerman:", max_new_tokens=20)


def fake(task: Task | None = None, context: int = 256) -> Generator:
    """A model without a clear favourite, that speaks bytes."""
    return Generator.from_parts(FakeDecoder(noise, context=context), byte_tokenizer(), task=task)


@pytest.fixture(scope="module")
def embedded() -> Generator:
    return Generator(threads=1)


def of(generator: Generator, task: Task) -> Generator:
    """The same model, as if it were fine-tuned."""
    return Generator.from_parts(generator.decoder, generator.tokenizer, task=task)


def log_softmax(logits: Logits) -> Any:
    wide = logits.astype(np.float64)
    return wide - np.log(np.exp(wide).sum())


def by_hand(
    prompt: str,
    labels: Sequence[str],
    temperature: float = 1.0,
    bias: Sequence[float] = (),
    *,
    end: bool = False,
) -> dict[str, float]:
    """Probabilities straight from the definition, of the model `noise`."""
    scores = []
    for label in labels:
        seen, answer = list(prompt.encode()), [*f" {label}".encode(), *([EOS] if end else [])]
        scores.append(0.0)
        for token in answer:
            scores[-1] += log_softmax(noise(seen))[token]
            seen.append(token)
    logits = np.array(scores) / temperature + (np.array(bias) if bias else 0.0)
    weights = np.exp(logits - logits.max())
    return dict(zip(labels, weights / weights.sum(), strict=True))


# --- labels -------------------------------------------------------------------------------------


def test_probabilities_are_the_softmax_of_scores_over_temperature_with_bias() -> None:
    prompt = "Review: A fine film.\nVerdict:"
    for task in (REVIEWS, CALIBRATED):
        found = fake(task).classify("A fine film.")
        assert dict(found) == pytest.approx(
            by_hand(prompt, task.labels, task.temperature, task.bias), rel=1e-5
        )
        assert [p for _, p in found] == sorted((p for _, p in found), reverse=True)
        assert math.fsum(p for _, p in found) == pytest.approx(1)
    plain = fake(CALIBRATED).classify("A fine film.", calibrate=False)
    assert plain == fake(REVIEWS).classify("A fine film.")


def test_temperature_and_bias_by_hand() -> None:
    task = Task("classification", "{x}", ("a", "b"), temperature=2.0, bias=(0.0, 1.0))
    a, b = math.exp(-1.0), math.exp(-3.0 + 1.0)
    assert task.probabilities([-2.0, -6.0]) == pytest.approx([a / (a + b), b / (a + b)])
    assert task.probabilities([-2e5, -6e5]) == [1.0, 0.0]
    assert REVIEWS.probabilities([-1.0, -1.0, -1.0]) == pytest.approx([1 / 3] * 3)


def test_labels_of_one_id_take_one_pass_and_are_read_off_it(embedded: Generator) -> None:
    task = Task("classification", "{text}\nThe", ("king", "queen", "time"))
    ids = label_ids(task.labels, lambda text: embedded.encode(text, whole=False), None)
    assert [len(each) for each in ids] == [1, 1, 1]
    logits = embedded.logits("Once upon a time\nThe")[0, [each[0] for each in ids]]
    wanted = np.exp(log_softmax(logits))
    found = dict(of(embedded, task).classify("Once upon a time"))
    assert [found[label] for label in task.labels] == pytest.approx(wanted.tolist(), rel=1e-5)


def test_scores_are_those_of_score(embedded: Generator) -> None:
    labels = ("a very old story", "a very old recipe", "something else")
    task = Task("classification", "{text}\nThis is", labels)
    prompt = "Stir the soup.\nThis is"
    wanted = [s.total for s in embedded.score(prompt, [f" {label}" for label in labels])]
    found = dict(of(embedded, task).classify("Stir the soup."))
    assert [found[label] for label in labels] == pytest.approx(task.probabilities(wanted))


def test_what_labels_share_is_read_once() -> None:
    decoder = FakeDecoder(noise, context=256)
    labels = ("something long and good", "something long and bad", "something long and so-so")
    task = Task("classification", "{text}:", labels)
    Generator.from_parts(decoder, byte_tokenizer(), task=task).classify("x" * 50)
    assert decoder.passes[0] == 51 + len(" something long and bad") - 1  # sorted, "bad" is first
    assert sum(decoder.passes[1:]) < 20


def test_a_label_that_begins_another_is_told_from_it_by_the_end() -> None:
    labels = ("good", "goodness", "bad")
    task = Task("classification", "{text}:", labels)
    found = dict(fake(task).classify("x"))
    assert found == pytest.approx(by_hand("x:", labels, end=True), rel=1e-5)
    encode = byte_tokenizer().encode
    assert label_ids(labels, encode, EOS)[0] == [*b" good", EOS]
    assert label_ids(("good", "bad"), encode, EOS) == [[*b" good"], [*b" bad"]]
    assert label_ids(labels, encode, None)[0] == [*b" good"]
    # It counts where only some of them are asked for, too: a label's score is always the same.
    some = dict(fake(task).classify("x", ["good", "bad"]))
    assert some["good"] / some["bad"] == pytest.approx(found["good"] / found["bad"], rel=1e-5)


def test_some_labels_share_the_probability_out_among_them() -> None:
    generator = fake(CALIBRATED)
    every, some = dict(generator.classify("x")), dict(generator.classify("x", ["so-so", "good"]))
    total = every["so-so"] + every["good"]
    assert some == pytest.approx({k: every[k] / total for k in ("so-so", "good")})
    for labels in (["good", "great"], [], ["good", "good"]):
        with pytest.raises(OptionError, match="some of the labels good, bad, so-so"):
            generator.classify("x", labels)
    with pytest.raises(OptionError, match="a list of labels"):
        generator.classify("x", "good")


def test_labels_of_ones_own_are_calibrated_by_a_neutral_text() -> None:
    generator, labels = fake(), ["sunny", "wet"]

    def totals(text: str) -> list[float]:
        prompt = ZERO_SHOT.replace("{text}", text)
        return [s.total for s in generator.score(prompt, [f" {label}" for label in labels])]

    task = Task("classification", ZERO_SHOT, tuple(labels))
    less = [score - base for score, base in zip(totals("rain"), totals(NEUTRAL), strict=True)]
    calibrated = dict(zip(labels, task.probabilities(less), strict=True))
    assert dict(generator.classify("rain", labels)) == pytest.approx(calibrated)
    plain = dict(zip(labels, task.probabilities(totals("rain")), strict=True))
    assert dict(generator.classify("rain", labels, calibrate=False)) == pytest.approx(plain)
    assert dict(generator.classify(NEUTRAL, labels)) == pytest.approx({"sunny": 0.5, "wet": 0.5})


def test_a_prompt_of_ones_own_may_have_several_fields() -> None:
    for generator in (fake(), fake(REVIEWS)):
        found = generator.classify(
            {"a": "x", "b": "y"}, ["yes", "no"], prompt="{a} then {b}?", calibrate=False
        )
        assert dict(found) == pytest.approx(by_hand("x then y?", ["yes", "no"]), rel=1e-5)
    with pytest.raises(PromptError, match="the fields a, b, each by its name"):
        fake().classify("x", ["yes", "no"], prompt="{a} then {b}?")
    with pytest.raises(PromptError, match="the fields a, b; found a"):
        fake().classify({"a": "x"}, ["yes", "no"], prompt="{a} then {b}?")
    with pytest.raises(PromptError, match="mapping of texts"):
        fake().classify(3, ["yes", "no"])  # type: ignore[arg-type]
    for prompt in ("no field", "{}", "{a!r}", "{a"):
        with pytest.raises(OptionError, match="a prompt like"):
            fake().classify("x", ["yes", "no"], prompt=prompt)
    with pytest.raises(OptionError, match="different labels"):
        fake().classify("x", ["yes", "yes"])


def test_a_batch_gives_what_each_text_gives_alone(embedded: Generator) -> None:
    generator = of(embedded, CALIBRATED)
    texts = ["A fine film.", {"text": "Never again."}, "A fine book, which I gave away."]
    assert generator.classify_batch(texts) == [generator.classify(text) for text in texts]
    assert generator.classify_batch([]) == []


def test_logits_that_are_no_numbers_are_refused() -> None:
    broken = FakeDecoder(lambda seen: favouring(len(seen)) * np.float32(np.nan))
    generator = Generator.from_parts(broken, byte_tokenizer(), task=REVIEWS)
    with pytest.raises(FidelityError, match="gptrt verify"):
        generator.classify("x")


# --- the prompt ---------------------------------------------------------------------------------


def told(task: Task, context: int = 64) -> tuple[FakeGenerator, list[str]]:
    """A generator, and the last prompts that it was given."""
    prompts: list[str] = []

    def answer(prompt: str) -> str:
        prompts.append(prompt)
        return " ja \n"

    return FakeGenerator(answer, context=context, task=task), prompts


def test_a_text_that_is_too_long_loses_words_at_its_end_and_the_template_stays() -> None:
    generator, prompts = told(GERMAN)
    assert generator.translate("one two three four five six seven eight nine") == "ja"
    assert prompts[-1] == "English: one two three four five six\nGerman:"
    assert len(prompts[-1]) == 64 - 20
    generator.translate("one two three four five six seven eight", max_new_tokens=5)
    assert prompts[-1] == "English: one two three four five six seven eight\nGerman:"
    with pytest.raises(PromptError, match="at most 4 tokens"):
        generator.translate("one", max_new_tokens=60)
    with pytest.raises(PromptError, match="at most 0 tokens"):
        generator.translate("one", max_new_tokens=100)
    generator, prompts = told(REVIEWS)
    generator.classify("word " * 100)
    assert prompts[-1].startswith("Review: word word") and prompts[-1].endswith("word\nVerdict:")
    assert len(prompts[-1]) + len(" so-so") <= 64


def test_the_longest_field_is_shortened() -> None:
    task = Task("translation", "To {language}: {text} ->", max_new_tokens=20)
    generator, prompts = told(task)
    assert generator.answer({"language": "German", "text": "word " * 20}).text == "ja"
    assert prompts[-1].startswith("To German: word") and prompts[-1].endswith("word ->")


# --- answers ------------------------------------------------------------------------------------


def test_answers_are_stripped_and_as_long_as_the_task_says() -> None:
    generator = FakeGenerator({"English: no\nGerman:": " nein\n", "": " x" * 100}, task=GERMAN)
    assert generator.task is GERMAN
    assert generator.translate("no") == "nein"
    result = generator.answer("yes")
    assert (len(result.ids), result.finish_reason) == (20, "length")
    assert len(generator.answer("yes", max_new_tokens=7).ids) == 7
    assert generator.translate("yes", stop_strings=" x x") == ""
    assert [r.text for r in generator.answer_batch(["no", {"text": "no"}])] == ["nein", "nein"]
    with pytest.raises(OptionError, match="unknown option 'max_tokens'"):
        generator.translate("yes", max_tokens=7)
    with pytest.raises(OptionError, match="use complete_batch"):
        generator.answer("yes", num_return_sequences=2)


def test_a_batch_of_answers_is_that_of_each_alone(embedded: Generator) -> None:
    generator = of(embedded, SUMMARIES)
    texts = ["The king went out.", "Stir the soup and add some salt.", "Once upon a time"]
    batch = generator.answer_batch(texts, batch_size=2)
    assert batch == [generator.answer(text) for text in texts]
    assert generator.summarize(texts[0]) == batch[0].text


def test_a_bundle_of_another_task_is_refused() -> None:
    wrong: list[tuple[Task | None, Callable[[Generator], object], str]] = [
        (
            REVIEWS,
            lambda g: g.translate("x"),
            "for translation; found classification; use classify",
        ),
        (GERMAN, lambda g: g.summarize("x"), "summarization; found translation; use translate"),
        (GERMAN, lambda g: g.summarize("x", extract=True), "for summarization; found translation"),
        (SUMMARIES, lambda g: g.classify("x"), "for classification; found summarization"),
        (None, lambda g: g.classify("x"), "for classification; found one that only continues"),
        (None, lambda g: g.answer("x"), "for a task; found one that only continues text"),
        (Task("lm", ""), lambda g: g.answer("x"), "found one that only continues text"),
        (Task("lm", "{text}"), lambda g: g.translate("x"), "use answer"),
        (REVIEWS, lambda g: g.classify("x", prompt="{text}:"), "labels for this prompt"),
    ]
    for task, call, message in wrong:
        with pytest.raises(OptionError, match=message):
            call(fake(task))
    assert len(fake(GERMAN).classify("x", ["a", "b"])) == 2
    with pytest.raises(OptionError, match="a task without faults; found labels"):
        fake(Task("classification", "{text}"))


def test_the_task_of_a_bundle_is_opened_with_it(tmp_path: Path) -> None:
    path = Path(shutil.copytree(embedded_bundle(), tmp_path / "reviews"))
    task = {"kind": "classification", "prompt": "{text}\nThe", "labels": ["king", "wood"]}
    change_manifest(path, lambda manifest: manifest.update(task=task))
    with Generator(path, threads=1) as generator:
        assert generator.task == Task("classification", "{text}\nThe", ("king", "wood"))
        assert {label for label, _ in generator.classify("The queen said:")} == {"king", "wood"}
    assert Generator(threads=1).task is None


# --- sentences ----------------------------------------------------------------------------------

STORY = "It rained. The old king, who had\nthree sons, fell ill! Nobody could help him."


def test_an_extract_is_the_sentence_that_is_likeliest_as_the_summary() -> None:
    for sentence in sentences(STORY):
        generator = FakeGenerator({f"{STORY}\nIn short:": f" {sentence}"}, task=SUMMARIES)
        assert generator.summarize(STORY, extract=True) == sentence
    with pytest.raises(OptionError, match="no options of generation"):
        generator.summarize(STORY, extract=True, max_new_tokens=3)
    with pytest.raises(PromptError, match="a text of a sentence or more"):
        generator.summarize(" \n", extract=True)


def test_an_extract_is_chosen_by_the_mean_with_the_end(embedded: Generator) -> None:
    generator = of(embedded, SUMMARIES)
    prompt = f"{STORY}\nIn short:"
    end = list(embedded.tokenizer.eos_token_ids[:1])
    ids = [[*embedded.encode(f" {s}", whole=False), *end] for s in sentences(STORY)]
    means = [score.mean for score in embedded.score(prompt, ids)]
    wanted = sentences(STORY)[means.index(max(means))]
    assert generator.summarize(STORY, extract=True) == wanted


def test_an_extract_of_a_text_beyond_the_context_is_still_of_the_text(embedded: Generator) -> None:
    text = " ".join(f"The king of the {n} hills went out. " + "And so on " * 60 for n in range(30))
    assert of(embedded, SUMMARIES).summarize(text, extract=True) in sentences(text)


def test_sentences_end_where_a_reader_would_say_so() -> None:
    assert sentences(STORY) == [
        "It rained.",
        "The old king, who had three sons, fell ill!",
        "Nobody could help him.",
    ]
    text = 'See Fig. 2, e.g. by J. Smith et al. "Is it so?" he asked. "Yes." '
    text += "It was (cf. p. 3.) 4 of 5."
    assert sentences(text) == [
        'See Fig. 2, e.g. by J. Smith et al. "Is it so?" he asked.',
        '"Yes."',
        "It was (cf. p. 3.)",
        "4 of 5.",
    ]
    assert sentences("A headline\nIn No. 5 it was 3.5 m. He said no. Dr. No?! The U.S. Army") == [
        "A headline",
        "In No. 5 it was 3.5 m. He said no.",
        "Dr. No?!",
        "The U.S. Army",
    ]
    assert sentences("你好。再见！") == ["你好。", "再见！"]
    assert sentences("  ") == [] and sentences("no end") == ["no end"]


@pytest.mark.timeout(10)
@pytest.mark.parametrize("part", [".", "\n", " ", ".)", ". ", "a.", "A. ", "。", '."', "\n a"])
def test_splitting_takes_no_longer_than_the_text(part: str) -> None:
    sentences(part * 200_000)
