"""The beginning of a run: its data, its tokenizer and its first checkpoint, from a plan."""

from __future__ import annotations

import platform
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import torch
from tokenizers import Tokenizer

from gptrt.architecture import ModelConfig
from gptrt.errors import TargetError

from . import data
from .calibration import correct_errors
from .checkpoint import Checkpoint, save_checkpoint
from .examples import ExamplePlan
from .files import write_json, written_whole
from .lora import LoraConfig, adapt, to_peft
from .model import GPT
from .progress import Progress, silent
from .projection import project
from .quantize import Recipe
from .runs import (
    BASE_FOLDER,
    DATA_FOLDER,
    RUN_FILE,
    TEACHER_FOLDER,
    Run,
    RunConfig,
    State,
    as_json,
    open_run,
)
from .settings import TrainConfig
from .tokenization import TokenizerConfig, rows_for, special_ids, train_tokenizer
from .trained_rounding import TrainedRounding

_HELD_OUT = 0.1
_START_TOKENS = 1 << 16  # of training text, to round by before training for rounding begins


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
    tokenizer = base.words() if base else _tokenizer(plan, progress)
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
        model = replace(plan.start, vocab_size=rows_for(tokenizer))
        torch.manual_seed(plan.train.seed)
        weights = GPT(model).state_dict()
    lineage = _lineage(base, plan, counts)
    task = plan.examples.task if plan.examples else base.task if base else None
    config = RunConfig(model, plan.train, plan.device, lineage, base is not None, lora=plan.lora)
    if plan.examples is not None:
        config = replace(config, task=task, class_weights=plan.examples.class_weights)
    run = Run(folder, config)
    write_json(folder / RUN_FILE, as_json(config))
    if plan.train.distill and base is not None:
        save_checkpoint(base.alone(), folder / TEACHER_FOLDER)
    rounding = base.rounding if base else None
    if plan.recipe is not None:
        rounding = _start_rounding(run, weights, tokenizer, plan.recipe, progress)
        weights = rounding.in_state(weights)
    template = base.chat_template if base else None
    first = Checkpoint(model, weights, tokenizer, {}, rounding, special, template, task)
    adapter = None
    if plan.lora is not None:
        save_checkpoint(first.alone(), folder / BASE_FOLDER)
        torch.manual_seed(plan.train.seed)
        adapter = to_peft(model, adapt(first.model(), plan.lora))
    run.save(first, {}, State(), best=True, adapter=adapter)


def _start_rounding(
    run: Run,
    weights: dict[str, torch.Tensor],
    tokenizer: Tokenizer,
    recipe: Recipe,
    progress: Progress,
) -> TrainedRounding:
    """Training for rounding begins where error correction ends."""
    config, ids = run.config.model, data.open_ids(run.train_ids)
    windows = data.spread_windows(ids, run.config.train.seq_len, _START_TOKENS)
    counts = None
    if recipe.bits_per_weight is not None:
        counts = _expected(ids, tokenizer, config.vocab_size)
    formats = recipe.formats(config, counts)
    model = Checkpoint(config, weights, None, {}).model()
    matrices = correct_errors(model, formats, windows, progress, by_row=True)
    return TrainedRounding.start(matrices, weights)


def _expected(ids: data.StoredIds, tokenizer: Tokenizer, vocab_size: int) -> data.Ids:
    """How often each token is to be expected: what this text lacks, another may have; and those
    that text never has, that end it or mark who speaks, count as its most frequent."""
    counts = data.count_each(ids, vocab_size) + 1
    added = [token for token in tokenizer.get_added_tokens_decoder() if token < vocab_size]
    counts[added] = counts.max()
    return counts


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
