"""What learns: model, optimizer, data and state of a run, a step at a time.

What a step computes depends on (seed, step) and the checkpoint alone, its rate also on `max_time`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from gptrt.errors import TrainingError

from .averaging import Average
from .checkpoint import Checkpoint, load_checkpoint
from .data import Batch
from .lora import adapt, from_peft, merged_state, to_peft
from .loss import IGNORED, Lesson, linear_cross_entropy
from .model import GPT, Attend, CausalAttention
from .optimizer import Optimizer, rate_scale
from .parts import parameter_of
from .precision import autocast, product_dtype
from .runs import BASE_FOLDER, TEACHER_FOLDER, Run
from .settings import TrainConfig
from .sources import open_sources
from .trained_rounding import TrainedRounding, hidden_and_head


@dataclass(frozen=True)
class Step:
    """The mean training loss; the learning rate of what AdamW trains; the norm of the gradient
    before it was clipped; and the time that it took."""

    loss: float
    rate: float
    grad_norm: float
    seconds: float


@dataclass(frozen=True)
class Judgement:
    """On what was held out: the loss in nats a token; the objective, which a teacher's divergence
    is part of, if there is one; the metric of the task, if there is one."""

    loss: float
    objective: float | None = None
    metric: float | None = None


Metric = Callable[[GPT], float]  # how good a model is at its task; the higher the better


class Trainer:
    """Model, optimizer, data and state of one run."""

    def __init__(self, run: Run, metric: Metric | None = None) -> None:
        self.run, self.config, self._metric = run, run.config.train, metric
        last, moments, self.state = run.last()
        self.beside = replace(last, state={}, rounding=None)  # what comes with the weights
        self.device = torch.device(run.config.device)
        self.rounding = last.rounding.to(self.device) if last.rounding else None
        self.model, self.learning = _learner(run, last, self.rounding)
        self.teacher = _teacher(run).to(self.device) if self.config.distill else None
        if self.config.compile:
            varied = run.config.task is not None  # a batch of examples is as wide as its widest row
            hidden = torch.compile(self.model.hidden, dynamic=varied)
            self.model.hidden = hidden  # type: ignore[method-assign]
        self.optimizer = Optimizer(self.learning, self.config.optimizer)
        self.optimizer.load({name: t.to(self.device) for name, t in moments.items()})
        self.average = Average(self.learning, self.config.average) if self.config.average else None
        _restore(self.learning, moments)
        self.dtype = compute_dtype(self.config, run.config.model.n_embd, self.device)
        self.source, self.valid = open_sources(run)

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

    def step(self) -> Step:
        """One optimizer step."""
        began = time.perf_counter()
        config, step = self.config, self.state.step
        torch.manual_seed(hash((config.seed, step)) & (2**63 - 1))  # dropout, the same on resume
        self.model.train()
        loss = 0.0
        for batch in self.source.batches(step, config.batch_size, config.grad_accum):
            part = self._loss(batch, distill=config.distill) / config.grad_accum
            part.backward()  # type: ignore[no-untyped-call]
            loss += part.item()
        if not math.isfinite(loss):
            raise TrainingError(
                "a finite loss",
                found=f"{loss} at step {step + 1}",
                do=f"go on from the checkpoint in {self.run.path} with a lower learning rate",
            )
        parameters = self.learning.values()
        norm = torch.nn.utils.clip_grad_norm_(parameters, config.grad_clip or math.inf).item()
        rate = rate_scale(step, self.share(), config.warmup_steps, config.final_lr)
        self.optimizer.step(rate)
        if self.average is not None:
            self.average.update(step + 1)
        seconds = time.perf_counter() - began
        self.state = replace(self.state, step=step + 1, elapsed_s=self.state.elapsed_s + seconds)
        return Step(loss, rate * config.optimizer.lr, norm, seconds)

    @torch.no_grad()
    def evaluate(self) -> Judgement:
        """Means on what was held out, the same every time. Raises TrainingError."""
        self.model.eval()
        began = time.perf_counter()
        distill, loss, objective, count = self.config.distill, 0.0, 0.0, 0
        with self._averaged():
            for batch in self.valid.in_order(self.config.batch_size, self.config.eval_tokens):
                tokens = int((batch.targets != IGNORED).sum())
                loss += self._loss(batch).item() * tokens
                if distill:
                    objective += self._loss(batch, distill).item() * tokens
                count += tokens
        loss, objective = loss / count, objective / count
        if not math.isfinite(loss):
            raise TrainingError(
                "a finite validation loss",
                found=f"{loss} after step {self.state.step}",
                do=f"go on from the checkpoint in {self.run.path} with a lower learning rate",
            )
        elapsed = self.state.elapsed_s + time.perf_counter() - began
        self.state = replace(self.state, elapsed_s=elapsed)
        return Judgement(loss, objective if distill else None, self._measure())

    @torch.no_grad()
    def _measure(self) -> float | None:
        """The task's metric; its time does not count as training."""
        with self._averaged():
            return None if self._metric is None else self._metric(self.model.eval())

    def judge(self, found: Judgement) -> bool:
        """Whether it is the best yet, counted for `patience`: by the metric; where that is equal or
        there is none, by the objective, as chance moves the loss of one rounding or another more
        than training does; and where there is no teacher, by the loss."""
        state = self.state
        best = Judgement(state.best_loss or 0.0, state.best_objective, state.best_metric)
        gained = state.best_loss is None or _merit(found) > _merit(best)
        if gained:
            self.state = replace(
                state,
                best_loss=found.loss,
                best_objective=found.objective,
                best_metric=found.metric,
                stale=0,
            )
        else:
            self.state = replace(state, stale=state.stale + 1)
        return gained

    def save(self, valid_loss: float | None, *, best: bool) -> None:
        """A checkpoint of everything, named the best of the run if it is. Where a mean is kept, it
        is the mean that is saved as the model, and the latest parameters beside the moments."""
        moments = self.optimizer.state()
        if self.average is not None:
            moments |= {_LATEST + name: t.detach().clone() for name, t in self.learning.items()}
        with self._averaged():
            self._save(moments, valid_loss, best=best)

    def _averaged(self) -> AbstractContextManager[None]:
        return nullcontext() if self.average is None else self.average.in_place()

    def _save(self, moments: dict[str, Tensor], valid_loss: float | None, *, best: bool) -> None:
        adapter = None
        weights = self.model.state_dict()
        if self.run.config.lora is not None:
            adapter = to_peft(self.run.config.model, self.learning)
            weights = merged_state(self.model)
        if self.rounding is not None:
            weights = self.rounding.in_state(weights)
        checkpoint = replace(self.beside, state=weights, rounding=self.rounding)
        self.run.save(
            *(checkpoint, moments, self.state),
            best=best,
            valid_loss=valid_loss,
            adapter=adapter,
        )

    def _loss(self, batch: Batch, distill: float = 0.0) -> Tensor:
        inputs, targets = self._tensor(batch.inputs), self._tensor(batch.targets).flatten()
        attend = positions = shares = None
        if batch.segments is not None and batch.positions is not None:
            attend = CausalAttention(self.model.config, self._tensor(batch.segments))
            positions = self._tensor(batch.positions)
        with autocast(self.dtype, self.device):
            hidden, head = hidden_and_head(self.model, self.rounding, inputs, positions, attend)
            shown = self._shown(inputs, positions, attend) if distill else None
        hidden = hidden.flatten(0, 1)
        if batch.shares is not None:  # few positions count: the head reads no others
            counts = targets != IGNORED
            hidden, targets = hidden[counts], targets[counts]
            shares = self._tensor(batch.shares).flatten()[counts]
            shown = None if shown is None else shown[counts]
        lesson = None
        if shown is not None and self.teacher is not None:
            lesson = Lesson(shown, self.teacher.lm_head.weight, distill)
        return linear_cross_entropy(hidden, head, targets, self.dtype, lesson, shares)

    def _tensor(self, array: NDArray[Any]) -> Tensor:
        return torch.from_numpy(array).to(self.device, non_blocking=True)

    @torch.no_grad()
    def _shown(self, inputs: Tensor, positions: Tensor | None, attend: Attend | None) -> Tensor:
        """What the teacher's head reads, [tokens, n_embd]."""
        assert self.teacher is not None, "a run with distillation has one"
        return self.teacher.hidden(inputs, positions, attend).flatten(0, 1)


def _merit(found: Judgement) -> tuple[float, float]:
    return found.metric or 0.0, -(found.loss if found.objective is None else found.objective)


def _learner(
    run: Run, last: Checkpoint, rounding: TrainedRounding | None
) -> tuple[GPT, dict[str, nn.Parameter]]:
    """The model as the last checkpoint has it, and what of it learns."""
    config, device = run.config, torch.device(run.config.device)
    if config.lora is None:
        model = last.model(config.train.dropout).to(device)
        return model, learning_parameters(model, rounding)
    model = load_checkpoint(run.path / BASE_FOLDER).model(config.train.dropout)
    learning = adapt(model, config.lora)
    from_peft(config.model, run.adapter(), learning)
    model.to(device)
    return model, learning


_LATEST = "latest/"  # of names beside the moments


@torch.no_grad()
def _restore(learning: dict[str, nn.Parameter], moments: dict[str, Tensor]) -> None:
    """The latest parameters, where a checkpoint has their mean as the model."""
    for path, tensor in moments.items():
        if path.startswith(_LATEST):
            learning[path.removeprefix(_LATEST)].copy_(tensor)


def learning_parameters(model: GPT, rounding: TrainedRounding | None) -> dict[str, nn.Parameter]:
    """By name, a tied matrix once; what is rounded learns as positions and scales instead."""
    named = dict(model.named_parameters())
    if rounding is None:
        return named
    rounded = set(map(parameter_of, rounding.formats))
    return {n: p for n, p in named.items() if n not in rounded} | rounding.parameters()


def _teacher(run: Run) -> GPT:
    """What a run with distillation learns from: the model that it started from."""
    return load_checkpoint(run.path / TEACHER_FOLDER).frozen()


def compute_dtype(config: TrainConfig, width: int, device: torch.device) -> torch.dtype:
    """The dtype of the products: as configured, or what the hardware gains by."""
    if config.dtype != "auto":
        return torch.bfloat16 if config.dtype == "bfloat16" else torch.float32
    return product_dtype(width, device)
