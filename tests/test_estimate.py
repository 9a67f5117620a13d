"""How much data, by laws that can be checked; how long and how much memory, by measuring."""

from __future__ import annotations

import json
import math
import os
from functools import partial
from pathlib import Path

import pytest

from export import estimate as module
from export.cli import main as gptrt_export
from export.estimate import count_parameters, estimate, in_child, tables_request, texts_request
from export.example_tables import Tables
from export.finetune import plan_finetuning
from export.model import GPT
from export.needs import describe
from export.runs import Run
from export.scaling import LAW, Law, cheapest_to_serve, effective_tokens
from export.trainer import Metric
from gptrt.errors import OptionError, TrainingError

from .conftest import GPT2_SHAPE, LLAMA_SHAPE, assert_refused, run_cli


def test_no_other_use_of_the_same_compute_beats_the_compute_optimum() -> None:
    parameters = 124e6
    compute = parameters * LAW.optimal_tokens(parameters)
    best = LAW.loss(parameters, compute / parameters)
    for factor in (0.5, 0.9, 1.1, 2.0):
        assert LAW.loss(parameters * factor, compute / (parameters * factor)) > best


def test_at_the_size_of_chinchilla_it_is_about_20_tokens_a_parameter() -> None:
    assert LAW.optimal_tokens(70e9) / 70e9 == pytest.approx(20, rel=0.1)


def test_serving_gives_the_example_of_the_paper() -> None:
    """arXiv 2401.00448, figure 1: 13B for 2T tokens, with the coefficients of that paper."""
    found = cheapest_to_serve(13e9, 2e12, Law(e=1.69, a=406.4, b=410.7, alpha=0.336, beta=0.283))
    assert found.parameters == pytest.approx(7e9, rel=0.02)
    assert found.saved == pytest.approx(0.17, abs=0.01)


def test_a_model_that_nobody_uses_is_cheapest_at_its_compute_optimum() -> None:
    found = cheapest_to_serve(124e6, 0)
    assert found.parameters == pytest.approx(124e6, rel=1e-3)
    assert found.training_tokens == pytest.approx(LAW.optimal_tokens(124e6), rel=1e-3)
    assert found.saved == pytest.approx(0, abs=1e-6)


def test_the_cheapest_model_to_serve_has_the_loss_that_was_asked_for() -> None:
    found = cheapest_to_serve(124e6, 1e11)
    loss = LAW.loss(124e6, LAW.optimal_tokens(124e6))
    assert LAW.loss(found.parameters, found.training_tokens) == pytest.approx(loss)
    assert LAW.tokens_for(loss, found.parameters / 100) == math.inf


def test_repeats_are_worth_less_and_less() -> None:
    assert effective_tokens(100, 50) == 50
    assert effective_tokens(100, 400) == pytest.approx(400, rel=0.08)  # "nearly as good as new"
    assert effective_tokens(100, 1e9) == pytest.approx(1638.8, rel=1e-3)


@pytest.mark.parametrize("shape", [GPT2_SHAPE, LLAMA_SHAPE], ids=["learned", "rotary"])
def test_parameters_are_counted_once_and_those_of_the_vocabulary_apart(shape: object) -> None:
    model = GPT(shape)  # type: ignore[arg-type]
    total, inner = count_parameters(model.config)
    assert total == sum(p.numel() for p in model.parameters())
    blocks = sum(p.numel() for p in model.h.parameters())
    assert inner == blocks + sum(p.numel() for p in model.ln_f.parameters())


def test_a_training_from_scratch_is_measured_on_random_ids() -> None:
    result = run_cli(
        *(gptrt_export, "estimate", "--preset", "nano-char", "--steps", 2, "--json"),
        *("--set", "batch_size=2", "--set", "eval_tokens=256", "--inference-tokens", 10**9),
    )
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    speed = found["speed"]
    assert found["data"] is None
    assert speed["step_tokens"] == 2 * 64
    assert 0 < speed["step_s"] <= speed["planned_s"] < speed["target_s"]
    # Weights in fp32, and as much again at least of moments.
    assert 8 * found["parameters"] < speed["checkpoint_bytes"] < speed["peak_bytes"]
    assert found["serving"]["parameters"] < found["parameters"]


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a process of its own, which would import PyTorch for a step or two."""
    monkeypatch.setattr(module, "in_child", lambda function, *arguments: function(*arguments))


@pytest.mark.usefixtures("in_this_process")
def test_fine_tuning_is_measured_on_its_own_text(run: Run, text_file: Path) -> None:
    settings = {"seq_len": "16", "batch_size": "2", "max_steps": "30"}
    found = estimate(
        texts_request(None, run.path, [text_file], "auto", settings, steps=1, quiet=True)
    )
    assert found.fine_tuning
    assert found.data is not None and found.speed is not None
    assert found.data.train_tokens == run.train_ids.stat().st_size // 4
    assert found.target_tokens == found.planned_tokens == 30 * 16 * 2
    assert found.data.planned_epochs == pytest.approx(960 / found.data.train_tokens)
    lines = dict(describe(found))
    assert "not for fine-tuning" in lines["by"]
    assert lines["planned"].startswith("30 steps, 960 tokens: ")
    assert "tokens/s on cpu, median of 1 steps of 32 tokens" in lines["speed"]


@pytest.fixture
def reviews(tmp_path: Path) -> Path:
    table = tmp_path / "reviews.tsv"
    rows = [f"king {n} was {('old', 'wise')[n % 2]}\t{n % 2}" for n in range(100)]
    table.write_text("\n".join(["text\tanswer", *rows]))
    return table


@pytest.mark.usefixtures("in_this_process")
def test_a_task_is_measured_with_its_adapter_and_nothing_is_written(
    run: Run, reviews: Path, tmp_path: Path
) -> None:
    task = ("finetune", "--task", "classification", "--from", run.path, "--data", reviews)
    small = ("--set", "seq_len=64", "--set", "batch_size=1", "--lora-rank", 2, "--estimate")
    small += ("--max-time", 0.001)
    result = run_cli(gptrt_export, *task, "--out", tmp_path / "run", *small)
    assert result.exit_code == 0, result.output
    assert "tokens/s on cpu, median of 6 steps of 64 tokens" in result.stdout
    assert "not for fine-tuning" in result.stdout
    assert "planned            1 steps, 64 tokens" in result.stdout  # as --max-time ends it
    assert not (tmp_path / "run").exists()
    again = run_cli(gptrt_export, *task, "--out", tmp_path / "run", *small, "--resume")
    assert_refused(again, "--estimate")
    result = run_cli(gptrt_export, *task, "--out", tmp_path / "run", "--label", "0=bad", *small)
    assert_refused(result, "reviews.tsv:3: label '1'")


def test_without_steps_nothing_is_trained_and_the_text_is_counted(text_file: Path) -> None:
    found = estimate(texts_request("nano-char", None, [text_file], "cpu", {}, steps=0, quiet=True))
    assert found.speed is None and found.data is not None
    total = found.data.train_tokens + found.data.valid_tokens
    assert total == len(text_file.read_text())  # a character is a token
    assert found.data.target_epochs > 4
    assert "beyond 4 times" in dict(describe(found))["target"]


def test_max_time_ends_the_plan(run: Run, tmp_path: Path) -> None:
    measured = module._Measured(6, 2.0, 8.0, 0.5, 1, None, 1)
    settings = {"max_time": "100", "eval_every": "4"}
    request = texts_request(None, run.path, [], "cpu", settings)
    plan = request.plan(tmp_path)
    found = module._estimate(request, plan, None, measured)
    assert found.planned_steps == 25  # of 2 seconds, and a quarter of 8
    assert found.planned_tokens == 25 * plan.train.tokens_per_step
    assert found.speed is not None  # at the beginning, six times, at the end; with the metric
    assert found.speed.planned_s == 25 * 2 + 8 * (8 + 0.5)


def test_evaluations_of_a_task_are_measured_with_its_metric(
    run: Run, reviews: Path, tmp_path: Path
) -> None:
    plan = partial(plan_finetuning, "classification", run.path, Tables([reviews]))
    asked = []

    def metric(made: Run) -> Metric:
        assert made.config.task is not None
        return lambda model: asked.append(type(model)) or 0.5

    module._measured(tables_request(plan, metric, steps=1, quiet=True), tmp_path)
    assert asked == [GPT]


def test_what_cannot_fit_into_memory_is_refused_before_it_is_tried(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "physical_memory", lambda: 1_000_000)
    with pytest.raises(OptionError, match=r"0\.0 GB in this machine.*--steps 0"):
        estimate(texts_request("nano-char", None, [], "cpu", {}))


def test_a_process_that_is_killed_says_so() -> None:
    with pytest.raises(TrainingError, match="where memory ends"):
        in_child(os._exit, 1)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "--preset"),
        (["--preset", "nano"], "nano-char"),
        (["--preset", "nano-char", "--data", "nowhere"], "nowhere"),
        (["--preset", "nano-char", "--set", "speed=1"], "batch_size"),
        (["--from", "nowhere"], "nowhere"),
    ],
)
def test_wrong_input_is_refused_before_any_work(arguments: list[str], words: str) -> None:
    assert_refused(run_cli(gptrt_export, "estimate", *arguments), words)
