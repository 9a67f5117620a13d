"""Fine-tuning for a task: tables to examples, packing, splits, adapters, and the command."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from export.checkpoint import Checkpoint, load_checkpoint, resolve_checkpoint, save_checkpoint
from export.cli import main as gptrt_export
from export.evaluate import evaluate
from export.example_tables import Tables, balanced_weights, read_examples, split
from export.examples import Example, Examples, write_examples
from export.files import save_tensors, write_json
from export.finetune import plan_finetuning
from export.lora import (
    ADAPTER_CONFIG_FILE,
    ADAPTER_FILE,
    LoraConfig,
    adapt,
    from_peft,
    merged_state,
    peft_config,
    to_peft,
)
from export.loss import IGNORED
from export.model import GPT, CausalAttention
from export.new_run import create_run
from export.options import ConvertOptions
from export.pipeline import convert, verify
from export.progress import ProgressBar
from export.runs import Run, open_run
from export.task_metric import calibrated
from export.tokenization import SpecialIds
from export.torch_decoder import open_checkpoint_generator
from export.train import train
from gptrt.errors import CheckpointError, DataError, OptionError
from gptrt.format import read_manifest
from gptrt.task import Task
from gptrt.tokenizer import Tokenizer as Words

from .conftest import GPT2_SHAPE, LLAMA_SHAPE, assert_refused, run_cli, scrambled, story

TASK = Task("classification", "The {text} king:", ("good", "bad"))
WORDS = ("old", "young", "wise", "merry", "silent")


@pytest.fixture(scope="module")
def reviews(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two labels that a word decides."""
    path = tmp_path_factory.mktemp("tables") / "reviews.tsv"
    rows = [
        f"{WORDS[n % 5]} bird {n} is {'great' if n % 2 else 'poor'}\t{n % 2}" for n in range(200)
    ]
    path.write_text("\n".join(["text\tlabel", *rows]) + "\n")
    return path


LABELS = ("--column", "answer=label", "--label", "1=good", "--label", "0=bad")
QUICK = ("--set", "batch_size=2", "--set", "eval_every=20", "--set", "seq_len=64")


@pytest.fixture(scope="module")
def tuned(run: Run, reviews: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    out = tmp_path_factory.mktemp("tuned") / "run"
    task = ("finetune", "--task", "classification", "--from", run.path, "--data", reviews)
    steps = ("--set", "max_steps=120", "--set", "optimizer.matrix_lr=0.02", "--set", "dropout=0")
    result = run_cli(gptrt_export, *task, "--out", out, *LABELS, *QUICK, *steps)
    assert result.exit_code == 0, result.output
    return open_run(out)


# --- tables to examples -------------------------------------------------------------------------


def test_all_faults_of_a_table_are_listed_and_nothing_is_written(run: Run, tmp_path: Path) -> None:
    table = tmp_path / "bad.jsonl"
    rows = ['{"text": "a", "answer": "x"}', '{"text": "", "answer": "x"}', "no json"]
    rows += [
        '{"text": "a"}',
        '{"text": "a", "answer": ["x", "y"]}',
        '{"text": [1, {}], "answer": "x"}',
    ]
    table.write_text("\n".join(rows) + "\n")
    task = ("finetune", "--task", "classification", "--from", run.path, "--data", table)
    result = run_cli(gptrt_export, *task, "--out", tmp_path / "run")
    assert_refused(result, *(f"bad.jsonl:{line}:" for line in (2, 3, 4, 5, 6)))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--prompt", "no field"), ("--prompt", "no field in braces")),
        (("--prompt", "{text!r}"), ("--prompt",)),
        (("--column", "review=text"), ("--column", "review")),
        (("--label", "1=good"), ("'0'", "none of 1")),
        (("--lora-alpha", 4), ("--lora-rank",)),
        (("--lora-rank", 2, "--lora-alpha", 2e6), ("lora.alpha", "correct the option")),
        (("--epochs", "inf"), ("--epochs",)),
        (("--task", "lm", "--label", "1=good"), ("--label for a classification", "lm")),
        (("--lora-rank", 2, "--lora-target", "wte"), ("wte", "attn.c_attn")),
        (("--set", "seq_len=2"), ("answers of at most 2",)),
        (("--set", "seq_len=65"), ("seq_len of at most 64",)),
        (
            ("--task", "lm", "--column", "answer=text", "--set", "prompt_share=0.5"),
            ("--prompt", "prompt_share"),
        ),
        (("--valid-share", 0), ("validate by",)),
        (("--valid", "a.tsv", "--valid-share", 0.2), ("--valid or --valid-share", "both")),
        (("--test", "a.tsv", "--test-share", 0.2), ("--test or --test-share", "both")),
    ],
)
def test_what_does_not_go_together_is_refused(
    run: Run, reviews: Path, tmp_path: Path, options: tuple[Any, ...], words: tuple[str, ...]
) -> None:
    task = ("finetune", "--task", "classification", "--from", run.path, "--data", reviews)
    result = run_cli(
        gptrt_export, *task, "--column", "answer=label", "--out", tmp_path / "run", *options
    )
    assert_refused(result, *words)
    assert not (tmp_path / "run").exists()


def test_a_list_is_one_text_in_a_prompt_and_several_answers(tmp_path: Path) -> None:
    table = tmp_path / "t.jsonl"
    table.write_text('{"source": ["One.", "Two."], "target": ["a", "b"]}\n')
    columns = {"text": "source", "answer": "target"}
    task = Task("summarization", "{text} Summary:")
    (found,) = read_examples([table], task, Tables([table], columns=columns))
    assert found == Example({"text": "One. Two."}, ("a", "b"))


# --- splits and weights -------------------------------------------------------------------------


def examples(count: int) -> list[Example]:
    return [
        Example({"text": f"text {n // 2}"}, ("good" if n % 4 < 1 else "bad",)) for n in range(count)
    ]


def test_a_split_is_stratified_and_never_parts_equal_prompts() -> None:
    first, rest = split(examples(2000), 0.1)
    prompts = [{example.fields["text"] for example in part} for part in (first, rest)]
    assert not prompts[0] & prompts[1]
    shares = [Counter(e.answers[0] for e in part)["good"] / len(part) for part in (first, rest)]
    assert 150 < len(first) < 450 and abs(shares[0] - 0.25) < 0.1


def test_a_split_does_not_depend_on_the_order() -> None:
    some = examples(400)
    one, other = ({e.fields["text"] for e in split(order, 0.2)[0]} for order in (some, some[::-1]))
    assert one == other


@pytest.mark.parametrize(("own_test", "parts"), [(False, (50, 60, 90)), (True, (140, 60, 200))])
def test_shares_are_of_all_that_is_split(
    run: Run, reviews: Path, own_test: bool, parts: tuple[int, ...]
) -> None:
    test = [reviews] if own_test else []
    share = None if own_test else 0.45
    tables = Tables(
        *([reviews], (), test), columns={"answer": "label"}, valid_share=0.3, test_share=share
    )
    found = plan_finetuning("classification", run.path, tables).examples
    assert found is not None
    assert (len(found.train), len(found.valid), len(found.test)) == parts


def test_balanced_weights_give_every_label_the_same_say() -> None:
    some = [Example({"text": "x"}, (a,)) for a in ["good"] * 30 + ["bad"] * 10]
    weights = balanced_weights(TASK, some)
    assert weights[0] * 30 == pytest.approx(weights[1] * 10) == pytest.approx(20)


def test_a_calibrated_model_is_as_sure_as_it_is_right() -> None:
    """Scores ten times too sure, and one label favoured: both are undone."""
    torch.manual_seed(0)
    honest = torch.randn(5000, 3)
    wanted = torch.multinomial(honest.softmax(-1), 1).squeeze(1)
    temperature, bias = calibrated(10 * honest + torch.tensor([3.0, 0.0, 0.0]), wanted)
    assert temperature == pytest.approx(10, rel=0.1)
    assert bias == pytest.approx((-0.2, 0.1, 0.1), abs=0.1)


# --- packing ------------------------------------------------------------------------------------


@pytest.fixture
def written(run: Run, tmp_path: Path) -> Path:
    some = [
        Example({"text": f"{WORDS[n % 5]} " * (1 + n % 7)}, (TASK.labels[n % 2],))
        for n in range(50)
    ]
    checkpoint = load_checkpoint(run.path)
    assert checkpoint.tokenizer is not None and checkpoint.special.end is not None
    words, end = Words(checkpoint.tokenizer), checkpoint.special.end
    write_examples(tmp_path / "x.bin", some, TASK, words=words, end=end, length=40)
    return tmp_path / "x.bin"


def test_an_epoch_has_every_example_once_and_rows_are_full(written: Path) -> None:
    found = Examples.open(written, 40, seed=1)
    rows = found.rows_per_epoch()
    (batch,) = found.batches(0, rows, 1)
    assert batch.segments is not None and batch.inputs.shape[1] <= 40
    assert sum(int(row.max()) + 1 for row in batch.segments) == len(found) == 50
    assert (batch.segments >= 0).mean() > 0.8
    (again,) = Examples.open(written, 40, seed=1).batches(0, rows, 1)
    assert (again.inputs == batch.inputs).all()
    (other,) = found.batches(1, rows, 1)  # the next epoch
    assert other.inputs.shape != batch.inputs.shape or (other.inputs != batch.inputs).any()


def test_an_epoch_of_long_texts_has_all_of_their_rows(run: Run, tmp_path: Path) -> None:
    table = tmp_path / "texts.txt"
    table.write_text("".join(f"{n} {story(12)}\n" for n in range(40)))
    settings = {"seq_len": "64", "batch_size": "1"}
    plan = plan_finetuning("lm", run.path, Tables([table]), epochs=4, settings=settings)
    assert plan.examples is not None and isinstance(plan.start, Checkpoint)
    assert plan.start.tokenizer is not None
    plan.examples.write(tmp_path, plan.start.tokenizer, plan.start.special, 64)
    rows = Examples.open(tmp_path / "train.bin", 64).rows_per_epoch()
    assert rows > 5 * len(plan.examples.train)
    assert plan.train.max_steps == pytest.approx(4 * rows, rel=0.05)


def test_rows_count_the_same_at_once_and_one_after_another(
    run: Run, reviews: Path, tmp_path: Path
) -> None:
    tables = Tables([reviews], columns={"answer": "label"})
    settings = {"max_steps": "1", "dropout": "0", "dtype": "float32", "prompt_share": "0.5"}
    found = []
    for rows, parts in ((4, 1), (1, 4)):
        size = {"batch_size": str(rows), "grad_accum": str(parts), "optimizer.kind": "adamw"}
        plan = plan_finetuning("classification", run.path, tables, settings=settings | size)
        made = create_run(tmp_path / str(parts), plan)
        train(made, ProgressBar("training", quiet=True))
        losses = [json.loads(line) for line in made.log.read_text().splitlines()]
        moments = made.last()[1]
        found.append((losses[1]["objective"], moments))
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-5)
    for name, moment in found[0][1].items():
        torch.testing.assert_close(found[1][1][name], moment, atol=1e-5, rtol=1e-3)


def test_some_of_the_examples_come_from_all_over_the_file(written: Path) -> None:
    found = Examples.open(written, 40)
    (whole,) = found.in_order(1000)
    rows = [row for batch in found.in_order(2, 40) for row in batch.inputs]
    assert 3 < len(rows) < len(whole.inputs) / 2
    wide = whole.inputs[np.arange(len(rows)) * len(whole.inputs) // len(rows)]
    assert all((row == w[: len(row)]).all() for row, w in zip(rows, wide, strict=True))


def test_only_answers_count_unless_prompts_are_asked_for(written: Path) -> None:
    (batch,) = Examples.open(written, 40, seed=1).in_order(1000)
    counted = batch.targets != IGNORED
    assert batch.shares is not None and batch.shares.sum() == pytest.approx(1, abs=1e-5)
    assert 2 * 50 <= counted.sum() < batch.inputs.size // 2
    (both,) = Examples.open(written, 40, seed=1, prompt_share=0.5).in_order(1000)
    assert both.shares is not None and both.shares.sum() == pytest.approx(1.5, abs=1e-5)
    assert (both.targets != IGNORED).sum() > 2 * counted.sum()
    (heavy,) = Examples.open(written, 40, seed=1, class_weights=(3.0, 1.0)).in_order(1000)
    assert heavy.shares is not None and heavy.shares.max() == pytest.approx(
        3 * heavy.shares[heavy.shares > 0].min(), rel=1e-4
    )


@pytest.mark.parametrize("shape", [GPT2_SHAPE, LLAMA_SHAPE, replace(LLAMA_SHAPE, window=5)])
def test_a_packed_example_is_computed_as_if_it_stood_alone(written: Path, shape: Any) -> None:
    model = scrambled(shape)
    (batch,) = Examples.open(written, 40, seed=1).batches(0, 2, 1)
    assert batch.segments is not None and batch.positions is not None
    attend = CausalAttention(shape, torch.from_numpy(batch.segments))
    ids = torch.from_numpy(batch.inputs)
    with torch.no_grad():
        packed = model.hidden(ids, torch.from_numpy(batch.positions), attend)
        for row, segments in enumerate(batch.segments):
            for segment in range(segments.max() + 1):
                own = segments == segment
                alone = model.hidden(ids[row, own][None])[0]
                torch.testing.assert_close(packed[row, own], alone, atol=2e-4, rtol=1e-4)


# --- adapters -----------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [GPT2_SHAPE, LLAMA_SHAPE])
def test_an_adapter_changes_nothing_at_first_and_merges_to_what_it_computes(shape: Any) -> None:
    model, ids = scrambled(shape), torch.randint(300, (2, 12))
    before = model(ids)
    learning = adapt(model, LoraConfig(rank=3))
    assert torch.equal(model(ids), before)
    assert [p for p in model.parameters() if p.requires_grad] == list(learning.values())
    for parameter in learning.values():
        torch.nn.init.normal_(parameter, std=0.1)
    wanted = model(ids)
    assert not torch.allclose(wanted, before, atol=0.1)
    plain = GPT(shape)
    plain.load_state_dict(merged_state(model))
    torch.testing.assert_close(plain.eval()(ids), wanted, atol=1e-4, rtol=1e-4)
    twin = scrambled(shape)
    other = adapt(twin, LoraConfig(rank=3))
    from_peft(shape, to_peft(shape, learning), other)
    assert all(torch.equal(learning[name], other[name]) for name in learning)
    with pytest.raises(CheckpointError, match="rank"):
        from_peft(shape, to_peft(shape, adapt(scrambled(shape), LoraConfig(rank=2))), other)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of peft about transformers
@pytest.mark.parametrize("shape", [GPT2_SHAPE, LLAMA_SHAPE])
def test_peft_computes_with_an_adapter_what_we_do(shape: Any, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="the reference implementation is not installed")
    transformers = pytest.importorskip("transformers", reason="the reference implementation")
    lora = LoraConfig(rank=3, alpha=5, targets=("attn.c_attn", "attn.c_proj", "mlp.c_fc"))
    model, ids = scrambled(shape), torch.randint(300, (2, 12))
    save_checkpoint(Checkpoint(shape, model.state_dict(), None, {}), tmp_path / "base")
    learning = adapt(model, lora)
    for parameter in learning.values():
        torch.nn.init.normal_(parameter, std=0.1)
    (tmp_path / "adapter").mkdir()
    save_tensors(to_peft(shape, learning), tmp_path / "adapter" / ADAPTER_FILE)
    about = peft_config(shape, lora, str(tmp_path / "base"))
    write_json(tmp_path / "adapter" / ADAPTER_CONFIG_FILE, about)
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, model(ids), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_an_adapted_run_resumes_bit_for_bit_and_leaves_the_base_alone(
    run: Run, reviews: Path, tmp_path: Path, kind: str
) -> None:
    task = ("finetune", "--task", "classification", "--from", run.path, "--data", reviews)
    lora = (
        "--set",
        f"optimizer.kind={kind}",
        "--lora-rank",
        2,
        "--lora-target",
        "attn.c_attn",
        "--lora-target",
        "mlp.c_fc",
    )
    lora += ("--set", "final_lr=1", "--max-time", 1e5)  # rates that no limit decides
    for name, steps in (("whole", 8), ("parts", 4)):
        made = ("--out", tmp_path / name, *LABELS, *QUICK, *lora, "--set", f"max_steps={steps}")
        result = run_cli(gptrt_export, *task, *made)
        assert result.exit_code == 0, result.output
    go_on = ("train", "--resume", "--out", tmp_path / "parts")  # of a task all the same
    result = run_cli(gptrt_export, *go_on, "--max-steps", 8)
    assert result.exit_code == 0, result.output
    assert "by its own metric" in result.stderr and "test.jsonl" in result.stderr
    log = (tmp_path / "parts" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in log if "metric" in line] == [0, 4, 8]
    configs = [open_run(tmp_path / name).config.train for name in ("whole", "parts")]
    assert configs[0] == configs[1] and configs[0].max_time == 1e5
    adapters = [open_run(tmp_path / name).adapter() for name in ("whole", "parts")]
    assert all(torch.equal(adapters[0][name], adapters[1][name]) for name in adapters[0])
    whole, base = (load_checkpoint(p) for p in (open_run(tmp_path / "whole").last_folder, run.path))
    assert (whole.config, whole.state.keys()) == (base.config, base.state.keys())  # one graph
    changed = [n for n in base.state if not torch.equal(base.state[n], whole.state[n])]
    assert changed and all(n.endswith(("c_attn.weight", "c_fc.weight")) for n in changed)
    kept = load_checkpoint(tmp_path / "whole" / "base").state
    assert all(torch.equal(kept[name], base.state[name]) for name in kept)
    (open_run(tmp_path / "parts").last_folder / "adapter" / ADAPTER_FILE).unlink()
    result = run_cli(gptrt_export, "finetune", "--resume", "--out", tmp_path / "parts")
    assert_refused(result, ADAPTER_FILE)


# --- the command --------------------------------------------------------------------------------


def test_a_task_is_learnt_and_travels_with_the_weights(tuned: Run, tmp_path: Path) -> None:
    rows = list(map(json.loads, (tuned.path / "data" / "test.jsonl").read_text().splitlines()))
    assert len(rows) == 20 and {row["answer"] for row in rows} == {"good", "bad"}
    checkpoint = load_checkpoint(tuned.path)
    assert checkpoint.task is not None and checkpoint.task.labels == ("bad", "good")
    assert len(checkpoint.task.bias) == 2  # calibrated at the end
    test = [Example({"text": row["text"]}, (row["answer"],)) for row in rows]
    with open_checkpoint_generator(checkpoint) as generator:
        accuracy, *_ = evaluate(generator, test)
    assert accuracy.value == 100
    convert(tuned.path, tmp_path / "bundle", ConvertOptions("none"))
    assert read_manifest(tmp_path / "bundle").task == checkpoint.task


def test_a_bundle_is_judged_by_the_answers_that_the_run_validated_by(
    tuned: Run, tmp_path: Path
) -> None:
    """The loss that training wrote down, to the digit, is that of the same answers."""
    fidelity = convert(tuned.path, tmp_path / "bundle", ConvertOptions("none")).fidelity
    assert fidelity is not None and "answers" in fidelity.text
    assert verify(tmp_path / "bundle", tuned.path)[1] == fidelity
    log = map(json.loads, (tuned.path / "log.jsonl").read_text().splitlines())
    logged = {line["step"]: line["perplexity"] for line in log if "perplexity" in line}
    best = int(resolve_checkpoint(tuned.path).name.removeprefix("step-"))
    assert fidelity.perplexity_reference == pytest.approx(logged[best], rel=1e-5)
    (batch,) = Examples.open(tuned.valid_ids).in_order(1)
    assert fidelity.tokens == (batch.targets != IGNORED).sum() < batch.inputs.size / 3


def test_labels_that_nothing_was_learnt_of_are_refused(
    run: Run, reviews: Path, tmp_path: Path
) -> None:
    other = tmp_path / "valid.tsv"
    other.write_text("text\tlabel\nthe wise bird\t2\n")
    tables = Tables([reviews], valid=[other], columns={"answer": "label"})
    with pytest.raises(DataError, match="among the labels 0, 1"):
        plan_finetuning("classification", run.path, tables)
    with pytest.raises(OptionError, match="classification"):
        plan_finetuning("lm", run.path, Tables([reviews]), class_weights="balanced")


def test_a_run_ends_by_epochs_or_steps_whichever_come_first(run: Run, reviews: Path) -> None:
    plan = partial(
        plan_finetuning, *("lm", run.path, Tables([reviews], columns={"answer": "text"}))
    )

    def steps(**limit: str) -> dict[float | None, int]:
        settings = {"batch_size": "2", "seq_len": "64"} | limit
        each = ((n, plan(epochs=n, settings=settings)) for n in (None, 1))
        return {n: made.train.max_steps for n, made in each}

    alone = steps()
    assert alone[None] == pytest.approx(4 * alone[1], abs=2) and alone[1] > 9
    assert steps(max_steps="9") == {None: 9, 1: 9}
    assert steps(max_steps="999") == {None: 999, 1: alone[1]}


def test_a_model_without_an_end_of_text_is_refused(run: Run, reviews: Path, tmp_path: Path) -> None:
    folder = tmp_path / "endless"
    checkpoint = load_checkpoint(run.path)
    end = Tokenizer.from_str(checkpoint.tokenizer.to_str().replace("<|endoftext|>", "<|other|>"))
    save_checkpoint(replace(checkpoint, tokenizer=end, special=SpecialIds()), folder)
    task = ("finetune", "--task", "lm", "--from", folder, "--data", reviews)
    result = run_cli(gptrt_export, *task, "--out", tmp_path / "run")
    assert_refused(result, "end-of-text")
