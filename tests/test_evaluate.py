"""A checkpoint behind the runtime's loop, published metrics, and models judged side by side."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from export import metrics
from export.checkpoint import load_checkpoint, save_checkpoint
from export.cli import main as gptrt_export
from export.evaluate import evaluate, open_model, spread
from export.examples import Example
from export.metrics import Scored
from export.model import GPT
from export.options import ConvertOptions
from export.pipeline import convert
from export.runs import Run
from export.torch_decoder import TorchDecoder, open_checkpoint_generator
from gptrt.errors import CheckpointError, DataError, DependencyError, OptionError, PromptError
from gptrt.generator import Generator
from gptrt.interrupt import Cancellation, Interrupt, Interrupted
from gptrt.session import Session
from gptrt.task import Task
from gptrt.testing import FakeGenerator, byte_tokenizer

from .conftest import GPT2_SHAPE, LLAMA_SHAPE, assert_refused, run_cli, scrambled

SHAPES = {
    "gpt2": GPT2_SHAPE,
    "llama-grouped-heads": LLAMA_SHAPE,
    "windows-and-unrotated-layers": replace(LLAMA_SHAPE, window=5, unwindowed=(1,), unrotated=(0,)),
    "side-by-side-and-partly-rotated": replace(
        GPT2_SHAPE, positions="rotary", rotary_dim=8, parallel=True, qk_norm=True
    ),
}
IDS = np.random.default_rng(0).integers(300, size=(2, 30))


def logits_of(model: GPT, ids: Any) -> Any:
    with torch.no_grad():
        return model(torch.tensor(ids)).numpy()


# --- a checkpoint behind the runtime's loop -----------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_reading_bit_by_bit_into_rows_of_any_length_gives_the_logits_of_the_whole(
    shape: str,
) -> None:
    model = scrambled(SHAPES[shape])
    decoder, wanted = TorchDecoder(model), logits_of(model, IDS)
    cache = decoder.new_cache(30, batch=2)
    decoder.run(IDS[:1, :9], cache.rows(0, 1))
    decoder.run(IDS[1:, :3], cache.rows(1, 2), keep=2)
    several = decoder.run([IDS[0, 9:14], IDS[1, 3:8]], cache, keep=0)
    one = decoder.run([[IDS[0, 14]], [IDS[1, 8]]], cache)
    np.testing.assert_allclose(several[0], wanted[0, 9:14], atol=1e-4)
    np.testing.assert_allclose(several[1], wanted[1, 3:8], atol=1e-4)
    np.testing.assert_allclose(one[:, 0], wanted[[0, 1], [14, 8]], atol=1e-4)
    assert [row.length for row in cache.filled] == [15, 9]


@pytest.mark.parametrize("shape", SHAPES)
def test_a_batch_continues_as_each_alone_and_as_the_model_itself(shape: str) -> None:
    model = scrambled(SHAPES[shape])
    generator = Generator.from_parts(TorchDecoder(model), byte_tokenizer().endless())
    prompts = [IDS[0, :n].tolist() for n in (3, 12, 7)]
    batch = generator.complete_batch(prompts, max_new_tokens=8)
    for prompt, found in zip(prompts, batch, strict=True):
        ids = list(prompt)
        for _ in range(8):  # the naive loop
            ids.append(int(logits_of(model, [ids])[0, -1].argmax()))
        assert found.ids == tuple(ids[len(prompt) :])
        assert generator.complete(prompt, max_new_tokens=8).ids == found.ids


def test_everything_else_of_a_generator_works_too(tmp_path: Path) -> None:
    model = scrambled(LLAMA_SHAPE)
    generator = Generator.from_parts(TorchDecoder(model), byte_tokenizer().endless())
    text = IDS[0].tolist()
    log_probs = torch.tensor(logits_of(model, [text])[0]).log_softmax(-1)
    nll = -log_probs[:-1].gather(1, torch.tensor(text[1:])[:, None])
    assert generator.perplexity(text).nll == pytest.approx(nll.mean().item(), rel=1e-4)
    (score,) = generator.score(text[:20], [text[20:]])
    assert score.total == pytest.approx(-nll[19:].sum().item(), rel=1e-4)
    with torch.no_grad():
        hidden = model.hidden(torch.tensor([text]))[0].numpy()
    found = generator.embed([text], normalize=False)[0]
    np.testing.assert_allclose(found, hidden.mean(0), atol=1e-4)
    assert len(generator.complete(text[:5], num_beams=3, max_new_tokens=4).ids) == 4
    session = Session(generator)
    session.append(text[:9])
    session.save(tmp_path / "session")
    again = Session.load(generator, tmp_path / "session")
    assert again.complete(max_new_tokens=5).ids == session.complete(max_new_tokens=5).ids


def test_values_of_another_size_are_refused() -> None:
    cache = TorchDecoder(scrambled(GPT2_SHAPE)).new_cache(8)
    for size in (100, 8 * 2048):
        with pytest.raises(ValueError, match=f"{size} bytes instead of"):
            cache.buffers.write(bytes(size), 2)


def test_an_interrupt_leaves_the_cache_as_it_was() -> None:
    decoder, interrupt = TorchDecoder(scrambled(GPT2_SHAPE)), Interrupt()
    cache = decoder.new_cache(8)
    interrupt.cancel()
    with pytest.raises(Interrupted):
        decoder.run([[1, 2]], cache, interrupt=interrupt)
    assert cache.length == 0
    stop = Cancellation()
    stop.cancel()
    generator = Generator.from_parts(decoder, byte_tokenizer())
    assert generator.complete([1, 2], cancellation=stop).finish_reason == "cancelled"


@pytest.mark.parametrize("ids", [[[1] * 9], [[1], [2]], [[]]])
def test_ids_that_do_not_fit_are_refused(ids: Sequence[Sequence[int]]) -> None:
    decoder = TorchDecoder(scrambled(GPT2_SHAPE))
    with pytest.raises(PromptError, match="1 to 8 more tokens"):
        decoder.run(ids, decoder.new_cache(8))


def test_a_fingerprint_is_that_of_the_parameters_as_they_are() -> None:
    model = scrambled(GPT2_SHAPE)
    decoder, twin = TorchDecoder(model), TorchDecoder(scrambled(GPT2_SHAPE))
    assert decoder.fingerprint == twin.fingerprint
    with torch.no_grad():
        model.ln_f.bias[0] += 1  # type: ignore[index, operator]
    assert decoder.fingerprint != twin.fingerprint


def test_memory_of_a_cache_is_what_it_takes() -> None:
    decoder = TorchDecoder(scrambled(LLAMA_SHAPE))
    buffers = decoder.new_cache(8, batch=3).buffers
    assert decoder.cache_bytes(8, 3) == sum(t.nbytes for t in buffers.values)  # type: ignore[attr-defined]


def test_a_checkpoint_without_a_tokenizer_is_refused(run: Run) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        open_checkpoint_generator(replace(load_checkpoint(run.path), tokenizer=None))


# --- metrics ------------------------------------------------------------------------------------

FOUND = ["the cat sat on the mat today", "a dog runs very fast now", "it rains in the night here"]
WANTED = [
    ["the cat was on the mat today", "there is a cat on a mat"],
    ["the dog ran fast"],
    ["it rains in the night here", "rain"],
]


def test_macro_f1_is_that_of_scikit_learn() -> None:
    judge = pytest.importorskip("sklearn.metrics")
    random = np.random.default_rng(1)
    for labels in ("ab", "abcd"):
        wanted = random.choice(list(labels), 60).tolist()
        found = random.choice(list("abc"), 60).tolist()
        expected = 100 * judge.f1_score(wanted, found, average="macro")
        assert metrics.macro_f1(found, wanted).value == pytest.approx(expected)
        expected = 100 * judge.accuracy_score(wanted, found)
        assert metrics.accuracy(found, wanted).value == pytest.approx(expected)


@pytest.mark.parametrize("name", ["BLEU", "CHRF"])
def test_bleu_and_chrf_and_their_intervals_are_those_of_sacrebleu(name: str) -> None:
    judge = getattr(pytest.importorskip("sacrebleu.metrics"), name)()
    streams = [[r[n] if n < len(r) else None for r in WANTED * 10] for n in range(2)]
    expected = judge.corpus_score(FOUND * 10, streams, n_bootstrap=1000)
    scored = {"BLEU": metrics.bleu, "CHRF": metrics.chrf}[name](FOUND * 10, WANTED * 10)
    assert scored.value == pytest.approx(expected.score)
    assert (scored.high - scored.low) / 2 == pytest.approx(expected._ci, rel=1e-3)
    assert scored.count == 30


def test_rouge_takes_the_reference_with_the_best_rouge_1_for_all_three() -> None:
    pytest.importorskip("rouge_score")
    # Against the first 3 of 4 words, none in a row; against the second 2 of 2, both in a row.
    found = metrics.rouge(["a b c d"], [["d x b c a", "a b"]])
    one, two, longest = (score.value for score in found)
    assert [score.name for score in found] == ["ROUGE-1", "ROUGE-2", "ROUGE-L"]
    assert one == pytest.approx(100 * 2 * (4 / 4) * (4 / 5) / (4 / 4 + 4 / 5))
    assert two == pytest.approx(100 * 2 * (1 / 3) * (1 / 4) / (1 / 3 + 1 / 4))  # "b c"
    assert longest == pytest.approx(100 * 2 * (2 / 4) * (2 / 5) / (2 / 4 + 2 / 5))
    assert metrics.rouge(["running quickly"], [["runs quick"]])[0].value > 0  # stemmed


def test_the_calibration_error_is_the_gap_between_confidence_and_truth() -> None:
    # Two bins: 0.9 and 0.92 with one right of two, 0.4 never right.
    found = metrics.calibration_error([0.9, 0.92, 0.4], [True, False, False])
    assert found.value == pytest.approx(100 * (abs(1.82 - 1) + 0.4) / 3)
    assert metrics.calibration_error([1.0, 1.0], [True, True]).value == 0


def test_the_perplexity_of_answers_weighs_every_token_alike() -> None:
    found = metrics.answer_perplexity([1.0, 5.0], [1, 3])
    assert found.value == pytest.approx(math.exp(6 / 4))
    assert metrics.answer_perplexity([1e6], [1]).value == math.inf


def test_an_interval_holds_the_value_and_is_the_same_every_time() -> None:
    found = [str(n % 3) for n in range(200)]
    wanted = [str(n % 3 if n % 4 else 9) for n in range(200)]
    scored = metrics.accuracy(found, wanted)
    assert scored == metrics.accuracy(found, wanted)
    assert scored.value == 75
    # Of a share of 0.75 in 200: 1.96 * sqrt(0.75 * 0.25 / 200) = 6 points.
    assert scored.low == pytest.approx(69, abs=1)
    assert scored.high == pytest.approx(81, abs=1)
    assert metrics.accuracy(found, found) == Scored("accuracy", 100, 100, 100, 200)


@pytest.mark.parametrize("package", [metrics.SACREBLEU, metrics.ROUGE])
def test_a_missing_package_is_named_with_its_extra(
    package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)  # type: ignore[arg-type]
    metric = metrics.bleu if "bleu" in package else metrics.rouge
    with pytest.raises(DependencyError, match=r"pip install 'gptrt\[tasks\]'"):
        metric(FOUND, WANTED)


def test_a_missing_package_is_found_before_anything_is_written(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, metrics.SACREBLEU, None)  # type: ignore[arg-type]
    generator = FakeGenerator({}, task=Task("translation", "{en} ="))
    with pytest.raises(DependencyError, match="sacrebleu"):
        evaluate(generator, [Example({"en": "yes"}, ("oui",))])
    assert generator.decoder.passes == []  # type: ignore[attr-defined]


@pytest.mark.parametrize(("found", "wanted"), [([], []), (["a"], ["a", "b"])])
def test_answers_that_do_not_match_the_examples_are_refused(
    found: list[str], wanted: list[str]
) -> None:
    with pytest.raises(DataError, match="as many answers as examples"):
        metrics.accuracy(found, wanted)


# --- a model and its task -----------------------------------------------------------------------

MOODS = Task("classification", "Text: {text}\nMood:", labels=("glad", "sad"))


def moods(*pairs: tuple[str, str]) -> list[Example]:
    return [Example({"text": text}, (label,)) for text, label in pairs]


def test_labels_are_judged_by_those_that_the_runtime_gives() -> None:
    answers = {
        f"Text: {text}\nMood:": f" {label}" for text, label in (("ha", "glad"), ("oh", "sad"))
    }
    generator = FakeGenerator(answers, task=MOODS)
    examples = moods(("ha", "glad"), ("oh", "sad"), ("ha", "sad"), ("oh", "sad"))
    found = {score.name: score.value for score in evaluate(generator, examples)}
    assert found["accuracy"] == 75
    assert found["macro-F1"] == pytest.approx(100 * (2 / 3 + 4 / 5) / 2)
    assert found["calibration error"] == pytest.approx(25, abs=0.1)  # it is sure of everything


def test_of_several_right_labels_any_will_do() -> None:
    generator = FakeGenerator({"Text: ha\nMood:": " glad"}, task=MOODS)
    example = Example({"text": "ha"}, ("sad", "glad"))
    assert evaluate(generator, [example])[0].value == 100


def test_a_translation_is_written_and_compared() -> None:
    pytest.importorskip("sacrebleu")
    task = Task("translation", "{en} =", max_new_tokens=60)
    generator = FakeGenerator({f"{n} =": f" {text}" for n, text in enumerate(FOUND)}, task=task)
    examples = [Example({"en": str(n)}, (text,)) for n, text in enumerate(FOUND)]
    progress: list[float] = []
    found = evaluate(generator, examples, progress=lambda share, _: progress.append(share))
    assert [(s.name, s.value) for s in found] == [("BLEU", pytest.approx(100)), ("chrF", 100)]
    assert progress == [0.0]


def test_a_summary_is_written_or_a_sentence_of_the_text() -> None:
    pytest.importorskip("rouge_score")
    text = "Rain fell all day. The town was wet. Nobody went out."
    task = Task("summarization", "{text}\nSummary:", max_new_tokens=40)
    generator = FakeGenerator({f"{text}\nSummary:": " The town was wet."}, task=task)
    examples = [Example({"text": text}, ("All was dry.", "The town was wet."))]
    for extract in (False, True):
        assert [s.value for s in evaluate(generator, examples, extract=extract)] == [100, 100, 100]


@pytest.mark.parametrize("prompt", ["", "{text} said:"])
def test_the_perplexity_of_an_answer_is_that_of_its_ids_and_its_end(run: Run, prompt: str) -> None:
    checkpoint = replace(load_checkpoint(run.path), task=Task("lm", prompt))
    fields = {"text": "The old king"} if prompt else {}
    answer = "that none of the birds had flown."
    with open_checkpoint_generator(checkpoint) as generator:
        (found,) = evaluate(generator, [Example(fields, (answer,))])
        before = generator.encode("The old king said:") if prompt else []
        after = generator.encode(f" {answer}" if prompt else answer, whole=not prompt)
    ids = [*before, *after, *checkpoint.special.eos]
    given = max(1, len(before))
    log_probs = torch.tensor(logits_of(checkpoint.frozen(), [ids])[0]).log_softmax(-1)
    nll = [-log_probs[n - 1, ids[n]].item() for n in range(given, len(ids))]
    assert found.value == pytest.approx(math.exp(sum(nll) / len(nll)), rel=1e-4)


def test_answers_that_leave_no_room_for_the_prompt_are_named_before_any_is_judged(
    run: Run, tmp_path: Path
) -> None:
    table = tmp_path / "table.jsonl"
    answers = ("a king.", "a king. " * 99, "a queen.", "a bird. " * 99)
    rows = ({"text": "The old", "answer": answer} for answer in answers)
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = ("--task", "lm", "--prompt", "{text} is", "--answer", "answer")
    result = run_cli(gptrt_export, "evaluate", run.path, "--data", table, *asked)
    assert_refused(result, "room for the prompt in 64 tokens", "example 2, 4;")


def test_labels_that_the_task_has_not_are_no_zero_but_an_error() -> None:
    with pytest.raises(DataError, match="labels glad, sad; found 0, 1; name them with --label"):
        evaluate(FakeGenerator({}, task=MOODS), moods(("ha", "1"), ("oh", "0")))


def test_what_a_task_cannot_be_judged_by_is_refused() -> None:
    with pytest.raises(OptionError, match="fine-tuned for a task"):
        evaluate(FakeGenerator({}), moods(("ha", "glad")))
    with pytest.raises(OptionError, match="--extract for summarization"):
        evaluate(FakeGenerator({}, task=MOODS), moods(("ha", "glad")), extract=True)
    with pytest.raises(DataError, match="found none"):
        evaluate(FakeGenerator({}, task=MOODS), [])


def test_a_limit_takes_examples_from_all_over_a_sorted_table() -> None:
    examples = moods(*((str(n), "glad" if n < 5 else "sad") for n in range(10)))
    assert [e.fields["text"] for e in spread(examples, 4)] == ["0", "2", "5", "7"]
    assert spread(examples, 20) == examples


# --- the command --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def taught(
    run: Run, text_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path, Path]:
    """A checkpoint with a task, the int8 bundle of it, and a table of examples."""
    folder = tmp_path_factory.mktemp("taught")
    checkpoint = replace(load_checkpoint(run.path), task=MOODS)
    save_checkpoint(checkpoint, folder / "checkpoint")
    options = ConvertOptions("int8", block_size=32, verify_text=text_file, verify_tokens=512)
    convert(folder / "checkpoint", folder / "bundle", options)
    rows = [
        {"text": f"The {w} king", "answer": ["glad", "sad"][n % 2]} for n, w in enumerate("abcde")
    ]
    table = folder / "table.jsonl"
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "checkpoint", folder / "bundle", table


def test_models_stand_side_by_side_in_one_table(
    taught: tuple[Path, Path, Path], run: Run, tmp_path: Path
) -> None:
    checkpoint, bundle, table = taught
    out = tmp_path / "table.md"
    result = run_cli(
        gptrt_export, "evaluate", checkpoint, bundle, run.path, "--data", table, "--out", out
    )
    assert result.exit_code == 0, result.output
    assert result.stdout == out.read_text()
    head, _, *rows = [line.split(" | ") for line in result.stdout.splitlines() if " | " in line]
    assert head == ["| metric", str(checkpoint), str(bundle), f"{run.path} |"]
    assert [row[0] for row in rows] == ["| accuracy %", "| macro-F1 %", "| calibration error %"]
    for row in rows:
        fp32, int8, untaught = (cell.rstrip(" |") for cell in row[1:])
        assert fp32 == untaught  # the same weights, asked in the same way
        assert float(fp32.split()[0]) == pytest.approx(float(int8.split()[0]), abs=5)
    assert "classification on 5 examples of table.jsonl; 95 % intervals" in result.stdout
    assert "onnxruntime " in result.stdout


def test_json_has_the_same_in_one_object(taught: tuple[Path, Path, Path]) -> None:
    checkpoint, _, table = taught
    csv = table.with_suffix(".csv")
    csv.write_text('words,mood\n"The a king",1\n"The b king",0\n"The c king",1\n')
    result = run_cli(
        *(gptrt_export, "evaluate", checkpoint, "--data", csv, "--json", "--limit", 2),
        *("--field", "text=words", "--answer", "mood", "--label", "1=glad", "--label", "0=sad"),
    )
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert (found["task"], found["data"], found["examples"]) == ("classification", "table.csv", 2)
    accuracy = found["scores"][str(checkpoint)]["accuracy"]
    assert accuracy.keys() == {"value", "low", "high", "count"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--data", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--data", "{table}", "--field", "text=words"], "words"),
        (["--data", "{table}", "--field", "text"], "KEY=VALUE"),
        (["--data", "{table}", "--answer", "text"], "--label"),
        (["--data", "{table}", "--extract"], "--extract"),
        (["--data", "{table}", "--prompt", "no field"], "--task"),
        (["--data", "{table}", "--task", "translation"], "classification, translation"),
        (["--data", "{table}", "--task", "classification", "--prompt", "no field"], "--prompt"),
        (["--data", "{table}", "--out", "/no/such/folder/table.md"], "/no/such/folder"),
        (["--data", "{table}", "--out", "/tmp"], "the folder /tmp"),
        (["nowhere", "--data", "{table}"], "checkpoint in nowhere"),
    ],
)
def test_wrong_input_is_refused_before_any_model_runs(
    arguments: list[str],
    words: str,
    taught: tuple[Path, Path, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("export.evaluate.open_model", None)
    checkpoint, _, table = taught
    given = [argument.format(table=table) for argument in arguments]
    assert_refused(run_cli(gptrt_export, "evaluate", checkpoint, *given), words)


def test_models_without_any_task_are_refused(run: Run, taught: tuple[Path, Path, Path]) -> None:
    result = run_cli(gptrt_export, "evaluate", run.path, "--data", taught[2])
    assert_refused(result, "fine-tuned for a task", "finetune")


def test_a_model_without_a_task_can_be_asked_for_one(
    run: Run, taught: tuple[Path, Path, Path]
) -> None:
    checkpoint, _, table = taught
    plain, like = (
        run_cli(gptrt_export, "evaluate", path, "--data", table, "--json", *more)
        for path, more in (
            (run.path, ("--task", "classification", "--prompt", MOODS.prompt)),
            (checkpoint, ()),
        )
    )
    assert plain.exit_code == 0, plain.output
    scores = [next(iter(json.loads(r.stdout)["scores"].values())) for r in (plain, like)]
    assert scores[0]["accuracy"] == scores[1]["accuracy"]


def test_models_of_different_tasks_are_refused(
    taught: tuple[Path, Path, Path], run: Run, tmp_path: Path
) -> None:
    other = replace(load_checkpoint(run.path), task=Task("translation", "{text}:"))
    save_checkpoint(other, tmp_path / "other")
    result = run_cli(gptrt_export, "evaluate", taught[0], tmp_path / "other", "--data", taught[2])
    assert_refused(result, "classification, translation")


def test_a_bundle_can_be_given_another_task(taught: tuple[Path, Path, Path]) -> None:
    other = replace(MOODS, labels=("calm", "wild"))
    with open_model(taught[1], other) as generator:
        assert generator.task == other
        assert len(generator.classify("The old king")) == 2
