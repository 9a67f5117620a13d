"""Training: from a run's last checkpoint to its end. To start and to resume are the same thing.

What a step computes depends on (seed, step) and the checkpoint alone, and with `max_time` on how
much of that has gone by; so an interrupted run without it that goes on gives the same losses as one
that was never interrupted, bit for bit on a CPU.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TextIO

from .metrics import perplexity
from .plots import LOSS, OBJECTIVE, plot_losses
from .progress import ProgressBar
from .runs import PLOT_FILE, Run, State, truncate_log
from .trainer import Judgement, Metric, Trainer


@dataclass(frozen=True)
class TrainResult:
    """How a run ended. Losses are validation losses in nats a token, `best_metric` is that of the
    task, if the run has one."""

    steps: int
    seconds: float
    best_loss: float | None  # None before the first evaluation
    reason: str  # "max_steps", "max_time", "patience" or "interrupted"
    best_metric: float | None = None


def train(
    run: Run,
    bar: ProgressBar,
    interrupted: Callable[[], bool] = lambda: False,
    metric: Metric | None = None,
) -> TrainResult:
    """Train until a limit, or until `interrupted()`; checkpoints, log and picture are in the run.
    With a `metric` that decides which checkpoint is the best, and when nothing is gained any more.

    Raises TrainingError when the loss is not a finite number; the last checkpoint stays good.
    Raises TargetError if another process trains the run.
    """
    with run.alone():
        trainer = Trainer(run, metric)
        truncate_log(run.log, trainer.state.step)
        if run.config.lora is not None:
            learning = sum(p.numel() for p in trainer.learning.values())
            share = learning / (sum(p.numel() for p in trainer.model.parameters()) - learning)
            bar.say(f"an adapter of {learning:,} parameters learns, {share:.1%} of the model's")
        with run.log.open("a") as log:
            reason = _loop(trainer, log, bar, interrupted)
        plot_losses(run.log, run.path / PLOT_FILE)
    state = trainer.state
    return TrainResult(state.step, state.elapsed_s, state.best_loss, reason, state.best_metric)


def _loop(trainer: Trainer, log: TextIO, bar: ProgressBar, interrupted: Callable[[], bool]) -> str:
    config = trainer.config
    # No nats a token where a teacher's weigh in, or those of prompts.
    what = OBJECTIVE if config.distill or config.prompt_share else LOSS
    if trainer.run.config.fine_tuning and trainer.state.step == 0:
        trainer.judge(_evaluate(trainer, log, bar))
    while not (reason := trainer.finished()):
        took = trainer.step()
        state = trainer.state
        speed = config.tokens_per_step / took.seconds
        bar.update(
            trainer.share(),
            f"step {state.step}  {what} {took.loss:.4f}  {speed:,.0f} tok/s{_best(state)}",
        )
        known = {what: took.loss, "lr": took.rate, "grad_norm": took.grad_norm}
        _write(log, step=state.step, **known, tok_s=round(speed, 1))
        stop = interrupted()
        due = state.step % config.eval_every == 0 or bool(trainer.finished())
        if due:
            found = _evaluate(trainer, log, bar)
            trainer.save(found.loss, best=trainer.judge(found))
        elif stop:
            # Nothing is judged out of turn: it would take its time, and a run that goes on must
            # take the same decisions as one that was never interrupted. But what has learnt is
            # better than what has not.
            trainer.save(None, best=state.best_loss is None)
        if stop:
            return "interrupted"
    return reason


def _evaluate(trainer: Trainer, log: TextIO, bar: ProgressBar) -> Judgement:
    found, step = trainer.evaluate(), trainer.state.step
    known, shown = {"perplexity": perplexity(found.loss)}, ""
    if found.objective is not None:
        known["valid_objective"] = found.objective
        shown += f"  objective {found.objective:.4f}"
    if found.metric is not None:
        known["metric"] = found.metric
        shown += f"  metric {found.metric:.2f}"
    _write(log, step=step, valid_loss=found.loss, **known)
    log.flush()
    bar.say(
        f"step {step}  validation loss {found.loss:.4f}  "
        f"perplexity {known['perplexity']:.2f}{shown}"
    )
    return found


def _write(log: TextIO, **values: Any) -> None:
    log.write(json.dumps(values) + "\n")


def _best(state: State) -> str:
    if state.best_metric is not None:
        return f"  best {state.best_metric:.2f}"
    return f"  best {state.best_loss:.4f}" if state.best_loss is not None else ""
