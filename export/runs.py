"""A training run on disk: its configuration, its data, its checkpoints, its log.

RUN/run.json           RunConfig: everything that decides what training computes
RUN/data/*.bin         token ids, memory-mapped
RUN/step-00000400/     checkpoints, each a Hugging Face folder plus the state of training
RUN/checkpoints.json   which of them is the best and which the last
RUN/log.jsonl          one line a step (loss, lr, grad_norm, tok_s), one line an evaluation
RUN/loss.png           the curves
RUN/teacher/           with distillation, the checkpoint to learn from, what its states cost beside
RUN/base/              with an adapter, the checkpoint that it adapts
RUN/.lock              held by the process that trains
"""

from __future__ import annotations

import json
import platform
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import Tokenizer

from gptrt.architecture import ModelConfig
from gptrt.errors import CheckpointError, OptionError, TargetError
from gptrt.schema import bounded, decode, read_json
from gptrt.target import lock
from gptrt.task import Task

from . import data
from .calibration import correct_errors
from .checkpoint import POINTER_FILE, Checkpoint, load_checkpoint, run_pointer, save_checkpoint
from .distillation import save_costs, save_teacher
from .examples import ExamplePlan
from .files import read_tensors, replace_json, write_json, written_whole
from .fisher import OutputCosts
from .lora import (
    ADAPTER_CONFIG_FILE,
    ADAPTER_FILE,
    ADAPTER_FOLDER,
    LoraConfig,
    adapt,
    peft_config,
    to_peft,
)
from .metrics import perplexity
from .model import GPT
from .optimizer import OptimizerConfig
from .progress import Progress, silent
from .projection import project
from .quantize import Recipe
from .tokenization import TokenizerConfig, special_ids, train_tokenizer
from .trained_rounding import TrainedRounding

RUN_FILE, LOG_FILE, PLOT_FILE, DATA_FOLDER = "run.json", "log.jsonl", "loss.png", "data"
BASE_FOLDER, _LOCK_FILE = "base", ".lock"
OPTIMIZER_FILE, STATE_FILE = "optimizer.safetensors", "state.json"
_HELD_OUT = 0.1
_START_TOKENS = 1 << 16  # of training text, to round by before training for rounding begins


@dataclass(frozen=True)
class TrainConfig:
    """How to train. A run ends at `max_steps`, `max_time` seconds or when validation stops gaining.

    `batch_size` windows of `seq_len` tokens make a micro-batch, `grad_accum` micro-batches a step.
    The learning rate rises over `warmup_steps`, then falls along a cosine to `final_lr` of its
    peak.
    """

    seq_len: int = bounded(1, 1 << 20)
    batch_size: int = bounded(1, 1 << 20, default=16)
    grad_accum: int = bounded(1, 1 << 16, default=1)
    max_steps: int = bounded(0, 1 << 40, default=1000)
    max_time: float | None = bounded(0.0, 1e9, default=None)
    warmup_steps: int = bounded(0, 1 << 40, default=50)
    final_lr: float = bounded(0.0, 1.0, default=0.0)
    grad_clip: float = bounded(0.0, 1e9, default=1.0)
    dropout: float = bounded(0.0, 0.99, default=0.0)
    eval_every: int = bounded(1, 1 << 40, default=250)
    eval_tokens: int = bounded(1, 1 << 40, default=1 << 18)
    patience: int | None = bounded(1, 1 << 20, default=None)  # evaluations without a gain
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    compile: bool = False  # by torch.compile: for a card, and where there is a C++ compiler
    seed: int = bounded(0, 1 << 62, default=0)
    distill: float = bounded(0.0, 1e3, default=0.0)  # weight of KL(start || model) in the loss
    distill_states: float = bounded(0.0, 1e3, default=0.0)  # times that: of what blocks give astray
    average: float = bounded(0.0, 0.999999, default=0.0)  # kept of the mean of weights; 0: no mean
    prompt_share: float = bounded(0.0, 1e3, default=0.0)  # of a task: weight of its prompts' loss
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)


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
            lineage["tokens_seen"] = str(state.step * tokens_per_step(self.config.train))
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
                replace_json(self.path / RUN_FILE, _as_json(config))
        return replace(self, config=config)


def tokens_per_step(train: TrainConfig) -> int:
    return train.seq_len * train.batch_size * train.grad_accum


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


@dataclass(frozen=True)
class RunPlan:
    """What a new run is to be.

    `start` is a checkpoint to fine-tune, whose tokenizer is kept, or a shape to train from scratch,
    with a tokenizer that is there or is to be learned. Without `held_out` texts, a tenth of every
    text is held out.
    """

    train: TrainConfig
    start: Checkpoint | ModelConfig
    tokenizer: TokenizerConfig | Tokenizer
    texts: list[Path]
    held_out: list[Path]
    device: Literal["cpu", "cuda"]
    recipe: Recipe | None = None  # to train for the rounding of such a bundle
    examples: ExamplePlan | None = None  # of a task, instead of texts
    lora: LoraConfig | None = None


def create_run(path: Path, plan: RunPlan, progress: Progress = silent) -> Run:
    """Prepare data, tokenizer and the first checkpoint of a run at `path`, all of it or nothing.

    Raises TargetError if something else is there already.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise TargetError(
            f"a new or empty folder {path}",
            found="something there already",
            do="choose another --out, or go on with --resume",
        )
    with written_whole(path) as folder:
        _fill(folder, plan, progress)
    return open_run(path)


def _fill(folder: Path, plan: RunPlan, progress: Progress) -> None:
    base = plan.start if isinstance(plan.start, Checkpoint) else None
    tokenizer = base.tokenizer if base else _tokenizer(plan, progress)
    if tokenizer is None:
        raise CheckpointError("a tokenizer.json beside the weights", found="none", do="add it")
    special = base.special if base else special_ids(tokenizer)
    (folder / DATA_FOLDER).mkdir()
    if plan.examples is not None:
        length = plan.train.seq_len
        counts = plan.examples.write(folder / DATA_FOLDER, tokenizer, special, length)
    else:
        counts = _write_data(folder / DATA_FOLDER, tokenizer, special.end, plan, progress)
        for count in counts:
            data.check_count(count, plan.train.seq_len)
    if isinstance(plan.start, Checkpoint):
        model, weights = plan.start.config, plan.start.state
        if plan.recipe is not None and plan.recipe.projects(model):
            model, weights = project(model, weights)
    else:
        model = replace(plan.start, vocab_size=tokenizer.get_vocab_size())
        torch.manual_seed(plan.train.seed)
        weights = GPT(model).state_dict()
    lineage = _lineage(base, plan, counts)
    task = plan.examples.task if plan.examples else base.task if base else None
    config = RunConfig(model, plan.train, plan.device, lineage, base is not None, lora=plan.lora)
    if plan.examples is not None:
        config = replace(config, task=task, class_weights=plan.examples.class_weights)
    run = Run(folder, config)
    write_json(folder / RUN_FILE, _as_json(config))
    if plan.train.distill and base is not None:
        save_teacher(folder, base)
    rounding = base.rounding if base else None
    if plan.recipe is not None:
        rounding = _start_rounding(run, weights, plan.recipe, progress)
        weights = rounding.in_state(weights)
    template = base.chat_template if base else None
    first = Checkpoint(model, weights, tokenizer, {}, rounding, special, template, task)
    adapter = None
    if plan.lora is not None:
        save_checkpoint(first.alone(), folder / BASE_FOLDER)
        torch.manual_seed(plan.train.seed)
        adapter = to_peft(model, adapt(first.model(), plan.lora))
    run.save(first, {}, State(), best=True, adapter=adapter)


def _as_json(config: RunConfig) -> Any:
    """As `run.json` has it. Raises OptionError for what `open_run` would not read back."""
    value = json.loads(json.dumps(asdict(config)))
    decode(RunConfig, value, error=OptionError, source="run", do="correct the option")
    return value


def _start_rounding(
    run: Run, weights: dict[str, torch.Tensor], recipe: Recipe, progress: Progress
) -> TrainedRounding:
    """Training for rounding begins where error correction ends."""
    config, train = run.config.model, run.config.train
    windows = data.spread_windows(data.open_ids(run.train_ids), train.seq_len, _START_TOKENS)
    model = Checkpoint(config, weights, None, {}).model()
    costs = OutputCosts.measure(model, windows, progress)
    if train.distill * train.distill_states:
        save_costs(run.path, costs.of_blocks())
    formats = recipe.formats(config)
    matrices = correct_errors(model, formats, windows, progress, by_row=True, costs=costs)
    return TrainedRounding.start(matrices, weights)


def _tokenizer(plan: RunPlan, progress: Progress) -> Tokenizer:
    if isinstance(plan.tokenizer, Tokenizer):
        return plan.tokenizer
    pieces = data.read_all(plan.texts, progress, "learning a tokenizer")
    return train_tokenizer(plan.tokenizer, pieces)


def _write_data(
    folder: Path, tokenizer: Tokenizer, end: int | None, plan: RunPlan, progress: Progress
) -> tuple[int, int]:
    """Token counts (train, valid); named validation files win over a share held out."""
    train, valid = folder / data.TRAIN_IDS, folder / data.VALID_IDS
    tokenize = partial(data.tokenize, tokenizer=tokenizer, end=end, progress=progress)
    if plan.held_out:
        trained, _ = tokenize(plan.texts, target=train)
        return trained, tokenize(plan.held_out, target=valid)[0]
    trained, tail = tokenize(plan.texts, target=train, held_out=_HELD_OUT)
    data.save_ids(tail, valid)
    return trained, len(tail)


def _lineage(base: Checkpoint | None, plan: RunPlan, counts: tuple[int, int]) -> dict[str, str]:
    texts = plan.examples.sources if plan.examples else plan.texts
    names = [path.name for path in texts]
    shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    before = {f"base_{key}": value for key, value in base.lineage.items()} if base else {}
    return before | {
        "data": shown,
        "train_tokens": str(counts[0]),
        "valid_tokens": str(counts[1]),
        "optimizer": plan.train.optimizer.kind,
        "seed": str(plan.train.seed),
        "started": datetime.now(UTC).date().isoformat(),
        "torch": version("torch"),
        "machine": platform.machine(),
    }


def truncate_log(path: Path, step: int) -> None:
    """Drop the lines that an interrupted process wrote after its last checkpoint."""
    if not path.is_file():
        return
    lines = path.read_text().splitlines() if step else []
    kept = [line for line in lines if _step_of(line) <= step]
    half = path.with_suffix(".partial")
    half.write_text("".join(line + "\n" for line in kept))
    half.replace(path)


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")  # a line cut off by a kill
