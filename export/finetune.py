"""From tables of examples to the plan of a run that learns a task: all of it is checked before
anything is trained."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal

from gptrt.architecture import ModelConfig
from gptrt.errors import CheckpointError, DataError, OptionError
from gptrt.task import Kind

from .evaluate import check
from .example_tables import Tables, balanced_weights, read_examples, split, task_of, with_labels
from .examples import ExamplePlan, count_rows, longest_answer
from .lora import LoraConfig
from .new_run import RunPlan
from .settings import OptimizerConfig, TrainConfig
from .start import (
    check_compiler,
    check_context,
    choose_device,
    load_checkpoint_or_bundle,
    with_settings,
)
from .tokenization import TokenizerConfig

_EPOCHS = 4


def plan_finetuning(
    kind: Kind,
    checkpoint: Path,
    tables: Tables,
    *,
    prompt: str | None = None,
    lora: LoraConfig | None = None,
    class_weights: Literal["none", "balanced"] = "none",
    epochs: float | None = None,
    device: str = "auto",
    settings: Mapping[str, str] | None = None,
) -> RunPlan:
    """The run ends after `epochs` or the `max_steps` of the settings, whichever come first; after 4
    epochs where neither is given. Raises a GptrtError for a checkpoint, table, template or setting
    that is not right."""
    if epochs is not None and not math.isfinite(epochs):
        raise OptionError("a number of --epochs", found=f"{epochs}", do="correct it")
    valid_share, test_share = tables.shares()
    start = load_checkpoint_or_bundle(checkpoint)
    if start.rounding is not None:
        raise CheckpointError(
            "a model that was not trained for its rounding",
            found="one that was",
            do="fine-tune what it was made from, and round after that",
        )
    task = task_of(kind, prompt)
    train, valid, test = (
        read_examples(paths, task, tables) for paths in (tables.data, tables.valid, tables.test)
    )
    task = with_labels(task, train)
    if not tables.test:
        test, train = split(train, test_share)
    if not tables.valid:  # so many that they are that share of all
        valid, train = split(train, valid_share / (1.0 - test_share))
    for name, part in (("train on", train), ("validate by", valid)):
        if not part:
            raise DataError(f"examples to {name}", found="none", do="give more, or other shares")
    check(task, [*valid, *test])
    words = start.words()
    longest = min(longest_answer(train, words), start.config.n_positions // 2)
    task = replace(task, max_new_tokens=longest)
    weights = balanced_weights(task, train) if class_weights == "balanced" else ()
    examples = ExamplePlan(task, train, valid, test, list(tables.data), weights)
    config = with_settings(task_training(start.config, lora), dict(settings or {}))
    check_context(config, start.config)
    if config.prompt_share and not task.prompt:
        raise OptionError(
            "--prompt, whose loss prompt_share weighs", found="none", do="leave prompt_share out"
        )
    ends = [config.max_steps] if "max_steps" in (settings or {}) else []
    if epochs is not None or not ends:
        epochs = _EPOCHS if epochs is None else epochs
        rows = count_rows(examples, words, config.seq_len)
        ends.append(max(1, round(epochs * rows / rows_per_step(config))))
    config = replace(config, max_steps=min(ends))
    on = choose_device(device)
    if config.compile:
        check_compiler(on)
    return RunPlan(
        *(config, start, TokenizerConfig("bpe"), [], [], on),
        examples=examples,
        lora=lora,
    )


def rows_per_step(train: TrainConfig) -> int:
    return train.batch_size * train.grad_accum


def task_training(model: ModelConfig, lora: LoraConfig | None) -> TrainConfig:
    """A table is read several times, so gently and with dropout; an adapter is small, and takes
    larger steps."""
    optimizer = OptimizerConfig(lr=5e-4, matrix_lr=3e-3)
    if lora is not None:
        optimizer = OptimizerConfig("adamw", lr=2e-3, weight_decay=0.0)
    return TrainConfig(
        seq_len=min(512, model.n_positions),
        batch_size=4,
        warmup_steps=20,
        dropout=0.1,
        eval_every=100,
        patience=5,
        optimizer=optimizer,
    )
