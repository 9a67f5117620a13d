"""A training run on disk: its configuration, its data, its checkpoints, its log.

RUN/run.json           RunConfig: everything that decides what training computes
RUN/data/*.bin         token ids, memory-mapped
RUN/step-00000400/     checkpoints, each a Hugging Face folder plus the state of training
RUN/checkpoints.json   which of them is the best and which the last
RUN/log.jsonl          one line a step (loss, lr, grad_norm, tok_s), one line an evaluation
RUN/loss.png           the curves
RUN/teacher/           with distillation, the checkpoint to learn from
RUN/base/              with an adapter, the checkpoint that it adapts
RUN/.lock              held by the process that trains
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from gptrt.architecture import ModelConfig
from gptrt.disk import lock, replaced
from gptrt.errors import CheckpointError, OptionError
from gptrt.schema import bounded, decode, read_json
from gptrt.task import Task

from . import data
from .checkpoint import POINTER_FILE, Checkpoint, load_checkpoint, run_pointer, save_checkpoint
from .files import read_tensors, replace_json
from .lora import ADAPTER_CONFIG_FILE, ADAPTER_FILE, ADAPTER_FOLDER, LoraConfig, peft_config
from .metrics import perplexity
from .settings import TrainConfig

RUN_FILE, LOG_FILE, PLOT_FILE, DATA_FOLDER = "run.json", "log.jsonl", "loss.png", "data"
TEACHER_FOLDER, BASE_FOLDER, _LOCK_FILE = "teacher", "base", ".lock"
OPTIMIZER_FILE, STATE_FILE = "optimizer.safetensors", "state.json"


@dataclass(frozen=True)
class RunConfig:
    """`run.json`."""

    model: ModelConfig
    train: TrainConfig
    device: Literal["cpu", "cuda"]
    lineage: dict[str, str]
    fine_tuning: bool = False  # then what it starts from is a candidate for the best
    task: Task | None = None  # then the data are examples
    class_weights: tuple[float, ...] = ()  # of the task's labels; all alike if empty
    lora: LoraConfig | None = None  # then an adapter learns, and `base/` stays as it is


@dataclass(frozen=True)
class State:
    """Where training stands: with the weights and the moments, all that `--resume` needs."""

    step: int = bounded(0, 1 << 40, default=0)
    elapsed_s: float = bounded(0.0, 1e12, default=0.0)
    best_loss: float | None = None  # of the best checkpoint: validation, nats a token
    best_objective: float | None = None  # what made it the best, where a teacher weighs in
    best_metric: float | None = None  # of a task; the higher the better
    stale: int = bounded(0, 1 << 40, default=0)  # evaluations since there was a better one


@dataclass(frozen=True)
class Run:
    path: Path
    config: RunConfig

    @property
    def train_ids(self) -> Path:
        return self.path / DATA_FOLDER / data.TRAIN_IDS

    @property
    def valid_ids(self) -> Path:
        return self.path / DATA_FOLDER / data.VALID_IDS

    @property
    def log(self) -> Path:
        return self.path / LOG_FILE

    @property
    def last_folder(self) -> Path:
        return self.path / run_pointer(self.path)["last"]

    def adapter(self) -> dict[str, torch.Tensor]:
        """The tensors of the last adapter, in PEFT's format. Raises CheckpointError."""
        return dict(read_tensors(self.last_folder / ADAPTER_FOLDER / ADAPTER_FILE))

    def last(self) -> tuple[Checkpoint, dict[str, torch.Tensor], State]:
        """Weights, optimizer moments and state of the last checkpoint. Raises CheckpointError."""
        folder = self.last_folder
        value = read_json(folder / STATE_FILE, error=CheckpointError)
        state = decode(State, value, error=CheckpointError, source=str(folder / STATE_FILE))
        moments = dict(read_tensors(folder / OPTIMIZER_FILE)) if state.step else {}
        return load_checkpoint(folder), moments, state

    def save(
        self,
        checkpoint: Checkpoint,
        moments: dict[str, torch.Tensor],
        state: State,
        *,
        best: bool,
        valid_loss: float | None = None,
        adapter: dict[str, torch.Tensor] | None = None,
    ) -> None:
        """Add a checkpoint, its lineage that of the run, point at it, and only then remove those
        that nothing points at, and what a kill left half-written. Of an `adapter` (PEFT's names)
        the checkpoint is merged already."""
        name = f"step-{state.step:08d}"
        lineage = self.config.lineage | {
            "steps": str(state.step),
            "training_seconds": f"{state.elapsed_s:.0f}",
        }
        if self.config.task is None:
            lineage["tokens_seen"] = str(state.step * self.config.train.tokens_per_step)
        if valid_loss is not None:
            lineage["validation_perplexity"] = f"{perplexity(valid_loss):.2f}"
        checkpoint = replace(checkpoint, lineage=lineage)
        extra: dict[str, Any] = {STATE_FILE: asdict(state)}
        if moments:
            extra[OPTIMIZER_FILE] = moments
        if adapter is not None and (lora := self.config.lora) is not None:
            about = peft_config(self.config.model, lora, str(Path("..") / ".." / BASE_FOLDER))
            extra[f"{ADAPTER_FOLDER}/{ADAPTER_FILE}"] = adapter
            extra[f"{ADAPTER_FOLDER}/{ADAPTER_CONFIG_FILE}"] = about
        save_checkpoint(checkpoint, self.path / name, extra)
        pointer = run_pointer(self.path) or {"best": name}
        pointer |= {"last": name} | ({"best": name} if best else {})
        replace_json(self.path / POINTER_FILE, pointer)
        for old in (*self.path.glob("step-*"), *self.path.glob(".step-*")):
            if old.name not in pointer.values():
                shutil.rmtree(old, ignore_errors=True)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """While this process is to be the only one that writes the run. Raises TargetError if
        another does."""
        with (self.path / _LOCK_FILE).open("ab") as stream:
            with suppress(OSError):  # some file systems know no locks
                lock(stream, self.path)
            yield

    def continued(
        self,
        *,
        max_steps: int | None = None,
        max_time: float | None = None,
        device: Literal["cpu", "cuda"] | None = None,
    ) -> Run:
        """The same run, to another end or on another device from now on. Raises OptionError for a
        limit that there is not, TargetError if another process trains it."""
        train = self.config.train
        if max_steps is not None:
            train = replace(train, max_steps=max_steps)
        if max_time is not None:
            train = replace(train, max_time=max_time)
        config = replace(self.config, train=train, device=device or self.config.device)
        if config != self.config:
            with self.alone():
                replace_json(self.path / RUN_FILE, as_json(config))
        return replace(self, config=config)


def open_run(path: Path) -> Run:
    """An existing run. Raises CheckpointError."""
    if not (path / RUN_FILE).is_file() or not run_pointer(path):
        raise CheckpointError(
            f"a training run in {path}",
            found="nothing to resume",
            do="start one with `gptrt-export train --preset NAME --data FILES --out RUN`",
        )
    value = read_json(path / RUN_FILE, error=CheckpointError)
    config = decode(RunConfig, value, error=CheckpointError, source=str(path / RUN_FILE))
    return Run(path, config)


def as_json(config: RunConfig) -> Any:
    """As `run.json` has it. Raises OptionError for what `open_run` would not read back."""
    value = json.loads(json.dumps(asdict(config)))
    decode(RunConfig, value, error=OptionError, source="run", do="correct the option")
    return value


def truncate_log(path: Path, step: int) -> None:
    """Drop the lines that an interrupted process wrote after its last checkpoint."""
    if not path.is_file():
        return
    lines = path.read_text().splitlines() if step else []
    kept = [line for line in lines if _step_of(line) <= step]
    with replaced(path, path.with_suffix(".partial")) as stream:
        stream.write("".join(line + "\n" for line in kept).encode())


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")  # a line cut off by a kill
