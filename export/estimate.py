"""Before a training: how much data, how long, how much memory.

Data by published laws, time and memory by measurement: a process of its own prepares a temporary
run as `train` or `finetune` would, and takes a few steps of it.
"""

from __future__ import annotations

import math
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import tokenizers
import torch

from gptrt.architecture import ModelConfig
from gptrt.errors import OptionError, TrainingError
from gptrt.machine import peak_memory, physical_memory

from .checkpoint import Checkpoint, run_pointer
from .data import open_ids, save_ids
from .model import parameter_shapes
from .needs import Data, Estimate, Speed
from .new_run import RunPlan, create_run
from .progress import ProgressBar
from .runs import Run
from .scaling import LAW, RULE_OF_THUMB, cheapest_to_serve, effective_tokens
from .start import plan_run
from .trainer import Metric, Trainer

T = TypeVar("T")

_STATES = 3  # of every parameter at least: its value, its gradient, a moment
_PLACEHOLDER = 64  # ids of a text that stands in until random ids take its place


Planner = Callable[[Path], RunPlan]  # with a folder for what the plan needs on disk


@dataclass(frozen=True)
class Request:
    """What is to be estimated: the training that `plan` makes a plan of, in this process and in
    another one; and a few steps to measure (0: none).

    `inference_tokens` are those that the model will read and write in its life. The steps read what
    the plan names, or `random_ids`. `metric` gives that of the run's task, which evaluations take
    as well.
    """

    plan: Planner
    metric: Callable[[Run], Metric | None] | None = None
    random_ids: bool = False
    target_tokens: int | None = None
    inference_tokens: int | None = None
    steps: int = 6
    quiet: bool = False


def estimate(request: Request) -> Estimate:
    """Raises what `plan` does, OptionError for more memory than there is, TrainingError."""
    with tempfile.TemporaryDirectory(prefix="gptrt-estimate-") as folder:
        plan = request.plan(Path(folder))  # raises for what is wrong with it, before any work
        if not request.steps:
            if request.random_ids:
                return _estimate(request, plan, None, None)
            return _measured(request, Path(folder))
        _check_memory(count_parameters(_shape(plan))[0], plan.device)
        del plan  # and its weights: the child has its own
        return in_child(_measured, request, Path(folder))


def _shape(plan: RunPlan) -> ModelConfig:
    return plan.start.config if isinstance(plan.start, Checkpoint) else plan.start


def count_parameters(config: ModelConfig) -> tuple[int, int]:
    """All of them, a tied matrix once; and without those of vocabulary and positions."""
    counts = {name: shape.numel() for name, shape in parameter_shapes(config).items()}
    total = sum(counts.values())
    around = ("wte.weight", "wpe.weight", "lm_head.weight")
    return total, total - sum(counts.get(name, 0) for name in around)


def in_child(function: Callable[..., T], *arguments: object) -> T:
    """What a function gives or raises in a new process, whose memory is its own.

    Raises TrainingError if the process ends without a word.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as executor:
        try:
            return executor.submit(function, *arguments).result()
        except BrokenProcessPool as e:
            raise TrainingError(
                "a few steps of training",
                found="a process that was killed, as happens where memory ends",
                do="take a smaller shape, or --set batch_size lower and grad_accum higher",
            ) from e


# --- what is planned ----------------------------------------------------------------------------


def texts_request(
    preset: str | None,
    checkpoint: Path | None,
    texts: Sequence[Path],
    device: str,
    settings: Mapping[str, str],
    **limits: Any,
) -> Request:
    """Of a training as `train` would be asked for it; without texts, on random ids."""
    plan = partial(_plan_texts, preset, checkpoint, tuple(texts), device, dict(settings))
    return Request(plan, random_ids=not texts, **limits)


def tables_request(
    plan: Callable[[], RunPlan], metric: Callable[[Run], Metric | None], **limits: Any
) -> Request:
    """Of a fine-tuning that `plan` plans and `metric` judges; another process must be able to call
    both, too."""
    return Request(partial(_plan_tables, plan), metric, **limits)


def _plan_tables(plan: Callable[[], RunPlan], _folder: Path) -> RunPlan:
    return plan()


def _plan_texts(
    preset: str | None,
    checkpoint: Path | None,
    texts: Sequence[Path],
    device: str,
    settings: dict[str, str],
    folder: Path,
) -> RunPlan:
    """Without texts the plan names one that only stands in."""
    if texts:
        return plan_run(preset, checkpoint, list(texts), [], device, settings)
    stand_in = folder / "stand-in.txt"
    stand_in.touch()
    plan = plan_run(preset, checkpoint, [stand_in], [stand_in], device, settings)
    if isinstance(plan.start, Checkpoint):
        tokenizer, vocab_size = plan.start.tokenizer, plan.start.config.vocab_size
    else:
        tokenizer, vocab_size = None, plan.start.vocab_size
    if tokenizer is None:
        tokenizer = _number_tokenizer(vocab_size)
        plan = replace(plan, tokenizer=tokenizer)
    ids = list(range(min(vocab_size, _PLACEHOLDER)))
    sample = tokenizer.decode(ids, skip_special_tokens=False)
    repeats = 2 + 2 * plan.train.seq_len // max(1, len(tokenizer.encode(sample).ids))
    stand_in.write_text(sample * repeats)
    return plan


def _number_tokenizer(vocab_size: int) -> tokenizers.Tokenizer:
    """One with so many entries, where there is no text to learn one from."""
    numbers = tokenizers.models.WordLevel({str(n): n for n in range(vocab_size)}, unk_token="0")
    tokenizer = tokenizers.Tokenizer(numbers)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return tokenizer


def _check_memory(parameters: int, device: str) -> None:
    """A system that runs out of memory may end other programs than this one."""
    needed, there = 4 * _STATES * parameters, physical_memory()
    if there is not None and needed > there and device == "cpu":
        raise OptionError(
            f"{needed / 1e9:.1f} GB of memory at least, for {parameters:,} parameters with their "
            "gradients and moments",
            found=f"{there / 1e9:.1f} GB in this machine",
            do="take a smaller shape, or --steps 0 for the data alone",
        )


# --- what is measured, in the child if steps are ------------------------------------------------


@dataclass(frozen=True)
class _Measured:
    """Of a few steps; times in seconds."""

    steps: int
    step_s: float
    evaluation_s: float  # without the task's metric, whose time does not count as training
    metric_s: float
    peak_bytes: int | None
    device_peak_bytes: int | None
    checkpoint_bytes: int


def _measured(request: Request, folder: Path) -> Estimate:
    plan = request.plan(folder)
    with ProgressBar("measuring", quiet=request.quiet) as bar:
        run = create_run(folder / "run", plan, bar.update)
        counts = None
        if request.random_ids:
            _fill_with_random_ids(run, request.steps)
        else:
            counts = len(open_ids(run.train_ids)), len(open_ids(run.valid_ids))
        measured = None
        if request.steps:
            metric = None if request.metric is None else request.metric(run)
            measured = _take_steps(run, request.steps, counts, metric, bar)
    return _estimate(request, plan, counts, measured)


def _fill_with_random_ids(run: Run, steps: int) -> None:
    train = run.config.train
    windows = train.batch_size * max(2, train.grad_accum) * (steps + 1) + 2
    ids = np.random.default_rng(train.seed).integers(
        run.config.model.vocab_size, size=train.seq_len * windows
    )
    for path in (run.train_ids, run.valid_ids):
        save_ids(ids, path)


def _take_steps(
    run: Run,
    steps: int,
    counts: tuple[int, int] | None,
    metric: Metric | None,
    bar: ProgressBar,
) -> _Measured:
    """A step that warms up, then those that count; a batch of an evaluation, with the whole metric;
    a checkpoint."""
    train = run.config.train
    batch = train.seq_len * train.batch_size
    one_batch = replace(train, eval_tokens=1)
    trainer = Trainer(replace(run, config=replace(run.config, train=one_batch)), metric)
    seconds = []
    for step in range(steps + 1):
        seconds.append(trainer.step().seconds)
        bar.update((step + 1) / (steps + 1), f"step {step} of {steps}")
    before, began = trainer.state.elapsed_s, time.perf_counter()
    loss = trainer.evaluate().loss
    took, batch_s = time.perf_counter() - began, trainer.state.elapsed_s - before
    batches = train.eval_tokens / batch
    if counts:  # of a task not all ids are answers: what it evaluates is for its examples to say
        batches = sum(1 for _ in trainer.valid.in_order(train.batch_size, train.eval_tokens))
    trainer.save(loss, best=True)
    files = (run.path / run_pointer(run.path)["last"]).iterdir()
    on_gpu = trainer.device.type == "cuda"
    return _Measured(
        steps,
        statistics.median(seconds[1:]),
        batch_s * max(1.0, batches),
        took - batch_s,
        peak_memory(),
        torch.cuda.max_memory_reserved() if on_gpu else None,
        sum(file.stat().st_size for file in files),
    )


# --- what follows from it -----------------------------------------------------------------------


def _estimate(
    request: Request,
    plan: RunPlan,
    counts: tuple[int, int] | None,
    measured: _Measured | None,
) -> Estimate:
    train, (parameters, inner) = plan.train, count_parameters(_shape(plan))
    step_tokens = train.tokens_per_step
    planned_steps = train.max_steps
    if train.max_time is not None and measured is not None:
        step_s = measured.step_s + measured.evaluation_s / train.eval_every
        planned_steps = min(planned_steps, math.ceil(train.max_time / step_s))
    planned, optimal = planned_steps * step_tokens, LAW.optimal_tokens(parameters)
    fine_tuning = isinstance(plan.start, Checkpoint)
    target = float(request.target_tokens or (planned if fine_tuning else optimal))
    demand = request.inference_tokens
    return Estimate(
        parameters=parameters,
        parameters_without_embedding=inner,
        fine_tuning=fine_tuning,
        optimal_tokens=optimal,
        rule_of_thumb_tokens=RULE_OF_THUMB * parameters,
        planned_steps=planned_steps,
        planned_tokens=planned,
        target_tokens=target,
        serving=None if demand is None else cheapest_to_serve(parameters, demand),
        data=None if counts is None else _data(counts, planned, target),
        speed=None if measured is None else _speed(plan, measured, planned_steps, target),
    )


def _data(counts: tuple[int, int], planned: float, target: float) -> Data:
    unique, valid = counts
    return Data(
        train_tokens=unique,
        valid_tokens=valid,
        planned_epochs=planned / unique,
        planned_worth=effective_tokens(unique, planned),
        target_epochs=target / unique,
        target_worth=effective_tokens(unique, target),
    )


def _speed(plan: RunPlan, measured: _Measured, planned_steps: int, target: float) -> Speed:
    step_tokens = plan.train.tokens_per_step
    return Speed(
        device=plan.device,
        steps=measured.steps,
        step_tokens=step_tokens,
        step_s=measured.step_s,
        tokens_s=step_tokens / measured.step_s,
        evaluation_s=measured.evaluation_s + measured.metric_s,
        planned_s=_training_s(plan, measured, planned_steps),
        target_s=_training_s(plan, measured, target / step_tokens),
        peak_bytes=measured.peak_bytes,
        device_peak_bytes=measured.device_peak_bytes,
        checkpoint_bytes=measured.checkpoint_bytes,
    )


def _training_s(plan: RunPlan, measured: _Measured, steps: float) -> float:
    """A run evaluates at its end as well, and what is fine-tuned before it begins."""
    evaluations = math.ceil(steps / plan.train.eval_every) + isinstance(plan.start, Checkpoint)
    return steps * measured.step_s + evaluations * (measured.evaluation_s + measured.metric_s)
