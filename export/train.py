"""Training: from a run's last checkpoint to its end. To start and to resume are the same thing.

What a step computes depends on (seed, step) and the checkpoint alone, so an interrupted run that
goes on gives the same losses as one that was never interrupted, bit for bit on a CPU.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TextIO

import torch
from torch import Tensor, nn

from gptrt.errors import TrainingError

from .checkpoint import load_checkpoint
from .data import Windows, in_order, open_ids
from .loss import Lesson, autocast, linear_cross_entropy, product_dtype
from .model import GPT
from .optimizer import Optimizer, rate_scale
from .parts import parameter_of
from .plots import LOSS, OBJECTIVE, plot_losses
from .progress import ProgressBar
from .runs import PLOT_FILE, TEACHER_FOLDER, Run, State, TrainConfig, tokens_per_step, truncate_log
from .trained_rounding import TrainedRounding, hidden_and_head


@dataclass(frozen=True)
class TrainResult:
    """How a run ended. Losses are validation losses in nats a token."""

    steps: int
    seconds: float
    best_loss: float
    reason: str  # "max_steps", "max_time", "patience" or "interrupted"

    @property
    def perplexity(self) -> float:
        return math.exp(self.best_loss)


def train(
    run: Run, bar: ProgressBar, interrupted: Callable[[], bool] = lambda: False
) -> TrainResult:
    """Train until a limit, or until `interrupted()`; checkpoints, log and picture are in the run.

    Raises TrainingError when the loss is not a finite number; the last checkpoint stays good.
    """
    trainer = Trainer(run)
    truncate_log(run.log, trainer.state.step)
    with run.log.open("a") as log:
        reason = _loop(trainer, log, bar, interrupted)
    plot_losses(run.log, run.path / PLOT_FILE)
    state = trainer.state
    return TrainResult(state.step, state.elapsed_s, state.best_loss or math.nan, reason)


def _loop(trainer: Trainer, log: TextIO, bar: ProgressBar, interrupted: Callable[[], bool]) -> str:
    config = trainer.config
    what = OBJECTIVE if config.distill else LOSS  # no nats a token where a teacher's weigh in
    if trainer.run.config.fine_tuning and trainer.state.step == 0:
        trainer.judge(_evaluate(trainer, log, bar))
    while not (reason := trainer.finished()):
        loss, seconds = trainer.step()
        state = trainer.state
        speed = tokens_per_step(config) / seconds
        bar.update(
            trainer.share(),
            f"step {state.step}  {what} {loss:.4f}  {speed:,.0f} tok/s{_best(state)}",
        )
        _write(log, step=state.step, **{what: loss}, tok_s=round(speed, 1))
        stop = interrupted()
        due = state.step % config.eval_every == 0 or bool(trainer.finished())
        if due or stop:
            valid = _evaluate(trainer, log, bar)
            # Out of turn it does not count: a run that goes on must take the same decisions as
            # one that was never interrupted.
            trainer.save(valid, best=due and trainer.judge(valid))
        if stop:
            return "interrupted"
    return reason


def _evaluate(trainer: Trainer, log: TextIO, bar: ProgressBar) -> float:
    valid, step = trainer.evaluate(), trainer.state.step
    _write(log, step=step, valid_loss=valid, perplexity=math.exp(valid))
    log.flush()
    bar.say(f"step {step}  validation loss {valid:.4f}  perplexity {math.exp(valid):.2f}")
    return valid


def _write(log: TextIO, **values: Any) -> None:
    log.write(json.dumps(values) + "\n")


def _best(state: State) -> str:
    return f"  best {state.best_loss:.4f}" if state.best_loss is not None else ""


class Trainer:
    """Model, optimizer, data and state of one run."""

    def __init__(self, run: Run) -> None:
        self.run, self.config = run, run.config.train
        last, moments, self.state = run.last()
        self.beside = replace(last, state={}, rounding=None)  # what comes with the weights
        self.device = torch.device(run.config.device)
        self.model: GPT = last.model(self.config.dropout).to(self.device)
        self.rounding = last.rounding.to(self.device) if last.rounding else None
        self.teacher = _teacher(run).to(self.device) if self.config.distill else None
        self.learning = learning_parameters(self.model, self.rounding)
        self.optimizer = Optimizer(self.learning, self.config.optimizer)
        self.optimizer.load({name: t.to(self.device) for name, t in moments.items()})
        self.dtype = compute_dtype(self.config, run.config.model.n_embd, self.device)
        self.windows = Windows(open_ids(run.train_ids), self.config.seq_len, self.config.seed)
        self.valid = open_ids(run.valid_ids)
        Windows(self.valid, self.config.seq_len, 0)  # too short? say so before the first step

    def share(self) -> float:
        """How much of the run is done, 0 to 1, by the limit that comes first."""
        done = self.state.step / max(1, self.config.max_steps)
        if self.config.max_time:
            done = max(done, self.state.elapsed_s / self.config.max_time)
        return min(1.0, done)

    def finished(self) -> str:
        """Why the run is over; empty while it is not."""
        config, state = self.config, self.state
        if config.patience is not None and state.stale >= config.patience:
            return "patience"
        if config.max_time is not None and state.elapsed_s >= config.max_time:
            return "max_time"
        return "max_steps" if state.step >= config.max_steps else ""

    def step(self) -> tuple[float, float]:
        """One optimizer step: its mean training loss and the seconds it took."""
        began = time.perf_counter()
        config, step = self.config, self.state.step
        torch.manual_seed(hash((config.seed, step)) & (2**63 - 1))  # dropout, the same on resume
        self.model.train()
        loss = 0.0
        for micro in range(config.grad_accum):
            ids = self.windows.batch(step * config.grad_accum + micro, config.batch_size)
            part = self._loss(torch.from_numpy(ids), distill=config.distill) / config.grad_accum
            part.backward()  # type: ignore[no-untyped-call]
            loss += part.item()
        if not math.isfinite(loss):
            raise TrainingError(
                "a finite loss",
                found=f"{loss} at step {step + 1}",
                do=f"go on from the checkpoint in {self.run.path} with a lower learning rate",
            )
        if config.grad_clip:
            torch.nn.utils.clip_grad_norm_(self.learning.values(), config.grad_clip)
        rate = rate_scale(step, self.share(), config.warmup_steps, config.final_lr)
        self.optimizer.step(rate)
        seconds = time.perf_counter() - began
        self.state = replace(self.state, step=step + 1, elapsed_s=self.state.elapsed_s + seconds)
        return loss, seconds

    @torch.no_grad()
    def evaluate(self) -> float:
        """Mean loss on validation text, the same windows every time. Raises TrainingError."""
        self.model.eval()
        began = time.perf_counter()
        total = count = 0.0
        for ids in in_order(self.valid, self.config.seq_len, self.config.batch_size):
            total += self._loss(torch.from_numpy(ids)).item() * len(ids)
            count += len(ids)
            if count * self.config.seq_len >= self.config.eval_tokens:
                break
        loss = total / count
        if not math.isfinite(loss):
            raise TrainingError(
                "a finite validation loss",
                found=f"{loss} after step {self.state.step}",
                do=f"go on from the checkpoint in {self.run.path} with a lower learning rate",
            )
        elapsed = self.state.elapsed_s + time.perf_counter() - began
        self.state = replace(self.state, elapsed_s=elapsed)
        return loss

    def judge(self, valid_loss: float) -> bool:
        """Whether it is the lowest validation loss yet; counted for `patience`."""
        state = self.state
        gained = state.best_loss is None or valid_loss < state.best_loss
        if gained:
            self.state = replace(state, best_loss=valid_loss, stale=0)
        else:
            self.state = replace(state, stale=state.stale + 1)
        return gained

    def save(self, valid_loss: float, *, best: bool) -> None:
        """A checkpoint of everything, named the best of the run if it is."""
        weights = self.model.state_dict()
        if self.rounding is not None:
            weights = self.rounding.in_state(weights)
        checkpoint = replace(self.beside, state=weights, rounding=self.rounding)
        moments = self.optimizer.state()
        self.run.save(checkpoint, moments, self.state, best=best, valid_loss=valid_loss)

    def _loss(self, ids: Tensor, distill: float = 0.0) -> Tensor:
        ids = ids.to(self.device, non_blocking=True)  # [batch, seq + 1]
        inputs, targets = ids[:, :-1], ids[:, 1:].flatten()
        with autocast(self.dtype, self.device):
            hidden, head = hidden_and_head(self.model, self.rounding, inputs)
            lesson = self._lesson(inputs, distill) if distill else None
        return linear_cross_entropy(hidden.flatten(0, 1), head, targets, self.dtype, lesson)

    @torch.no_grad()
    def _lesson(self, inputs: Tensor, share: float) -> Lesson:
        assert self.teacher is not None, "a run with distillation has one"
        return Lesson(self.teacher.hidden(inputs).flatten(0, 1), self.teacher.lm_head.weight, share)


def learning_parameters(model: GPT, rounding: TrainedRounding | None) -> dict[str, nn.Parameter]:
    """By name, a tied matrix once; what is rounded learns as positions and scales instead."""
    named = dict(model.named_parameters())
    if rounding is None:
        return named
    rounded = set(map(parameter_of, rounding.formats))
    return {n: p for n, p in named.items() if n not in rounded} | rounding.parameters()


def _teacher(run: Run) -> GPT:
    """What a run with distillation learns from: the model that it started from."""
    return load_checkpoint(run.path / TEACHER_FOLDER).model().eval().requires_grad_(False)


def compute_dtype(config: TrainConfig, width: int, device: torch.device) -> torch.dtype:
    """The dtype of the products: as configured, or what the hardware gains by."""
    if config.dtype != "auto":
        return torch.bfloat16 if config.dtype == "bfloat16" else torch.float32
    return product_dtype(width, device)
