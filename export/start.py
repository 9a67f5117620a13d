"""From what a user asks for to the plan of a run: every input is checked before work begins."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import Tokenizer

from gptrt.architecture import ModelConfig
from gptrt.errors import DeviceError, OptionError
from gptrt.format import MANIFEST_FILE
from gptrt.schema import decode

from .checkpoint import Checkpoint, load_checkpoint
from .data import find_texts
from .heads import check_unpadded
from .new_run import RunPlan
from .presets import Preset, load_preset, preset_names
from .quantize import Recipe
from .settings import Mode, OptimizerConfig, TrainConfig
from .tokenization import TokenizerConfig, open_tokenizer

_FINE_TUNING_CONTEXT = 256
_TRAINED_BLOCK = 128


def plan_run(
    preset: str | None,
    checkpoint: Path | None,
    texts: list[Path],
    held_out: list[Path],
    device: str,
    settings: dict[str, str],
    tokenizer: Path | None = None,
    recipe: Recipe | None = None,
) -> RunPlan:
    """Raises a GptrtError for a preset, checkpoint, text, device or setting that is not there."""
    if preset is None and checkpoint is None:
        names = ", ".join(preset_names())
        raise OptionError(f"--preset ({names}) or --from", found="neither", do="give one of them")
    if not texts:
        raise OptionError("--data FILES to train on", found="none", do="give text files or folders")
    chosen = load_preset(preset) if preset else None
    if checkpoint and tokenizer:
        raise OptionError(
            "--tokenizer for a model from scratch", found="--from as well", do="leave one out"
        )
    if recipe is not None and checkpoint is None:
        raise OptionError(
            "--from, a trained model to make ready for rounding", found="none", do="train it first"
        )
    start = load_checkpoint_or_bundle(checkpoint) if checkpoint else None
    model = start.config if start else chosen.model if chosen else None
    assert model is not None
    train = chosen.train if chosen and not start else fine_tuning(model)
    train = train if recipe is None else for_rounding(train)
    train = with_settings(train, settings)
    check_context(train, model)
    if recipe is not None and start is not None:
        check_unpadded(model)
        if recipe.projection is False:  # also of what an earlier training has given it
            start = start.alone().plain()
            model = start.config
        recipe.check(model)
    if train.prompt_share:
        raise OptionError(
            "prompt_share for a task, whose examples have prompts", found="texts", do="leave it out"
        )
    if train.distill and start is None:
        raise OptionError(
            "--from, the model to learn from", found="distill without it", do="leave distill out"
        )
    if train.compile and recipe is not None:
        raise OptionError(
            "--quantize without compile=true", found="both", do="leave one of them out"
        )
    on = choose_device(device)
    if train.compile:
        check_compiler(on)
    return RunPlan(
        train=train,
        start=start or model,
        tokenizer=_tokenizer(tokenizer, chosen),
        texts=find_texts(texts),
        held_out=find_texts(held_out) if held_out else [],
        device=on,
        recipe=recipe,
    )


def load_checkpoint_or_bundle(path: Path) -> Checkpoint:
    """What `--from` takes: a run, a Hugging Face folder, or a bundle of ours, made plain: what is
    trained is kept as other software knows it."""
    if not (path / MANIFEST_FILE).is_file():
        return load_checkpoint(path)
    from .reopen import load_bundle  # ONNX, which other checkpoints need not wait for

    return load_bundle(path).plain()


def recipe_to_train(
    mode: Mode | None,
    block_size: int | None,
    head_bits: int | None,
    projection: bool | None = None,
    bits_per_weight: float | None = None,
) -> Recipe | None:
    """Training can afford what rounding alone cannot: blocks of 128 in narrow models too."""
    if mode is None:
        if any(part is not None for part in (block_size, head_bits, projection, bits_per_weight)):
            raise OptionError(
                "--quantize int8, int4 or int2",
                found="--block-size, --head-bits, --projection or --bits-per-weight without it",
                do="add it or leave them out",
            )
        return None
    size = _TRAINED_BLOCK if block_size is None else block_size
    return Recipe(
        mode,
        block_size=size,
        head_bits=head_bits,
        projection=projection,
        bits_per_weight=bits_per_weight,
    )


def _tokenizer(path: Path | None, preset: Preset | None) -> TokenizerConfig | Tokenizer:
    if path is not None:
        return open_tokenizer(path)
    return preset.tokenizer if preset else TokenizerConfig("bpe")


def fine_tuning(model: ModelConfig) -> TrainConfig:
    """A trained model is moved gently: a few percent of the rates that train one from scratch."""
    return TrainConfig(
        seq_len=min(_FINE_TUNING_CONTEXT, model.n_positions),
        batch_size=8,
        max_steps=1000,
        warmup_steps=10,
        eval_every=50,
        eval_tokens=1 << 14,
        patience=5,
        optimizer=OptimizerConfig(lr=5e-4, matrix_lr=3e-3),
    )


def for_rounding(train: TrainConfig) -> TrainConfig:
    """A trained model knows what it is to predict; only what rounding changed is to be undone. So
    nearly all of the loss is the divergence from what it was, and nothing shrinks. It is steps that
    count, more than tokens, so that each takes few."""
    optimizer = replace(train.optimizer, lr=3e-4, weight_decay=0.0)
    return replace(
        train,
        batch_size=4,
        distill=100.0,
        average=0.99,
        patience=None,
        eval_every=200,
        optimizer=optimizer,
    )


def with_settings(train: TrainConfig, settings: dict[str, str]) -> TrainConfig:
    """`train` with some values replaced: {"batch_size": "4", "optimizer.lr": "0.001"}."""
    values: dict[str, Any] = asdict(train)
    for key, text in settings.items():
        target, _, name = key.rpartition(".")
        group = values.get(target) if target else values
        if not isinstance(group, dict) or name not in group or isinstance(group[name], dict):
            known = [k for k in values if k != "optimizer"]
            known += [f"optimizer.{k}" for k in values["optimizer"]]
            raise OptionError(f"a setting of {', '.join(known)}", found=key, do="correct --set")
        group[name] = _parse(text)
    return decode(TrainConfig, values, error=OptionError, source="--set", do="correct the value")


def check_context(train: TrainConfig, model: ModelConfig) -> None:
    """Raises OptionError for rows that are longer than what the model can read."""
    if train.seq_len > model.n_positions:
        raise OptionError(
            f"seq_len of at most {model.n_positions}, the model's context",
            found=str(train.seq_len),
            do="set it lower",
        )


def _parse(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def choose_device(device: str) -> Literal["cpu", "cuda"]:
    """auto takes a CUDA device if PyTorch finds one. Raises DeviceError."""
    available = torch.cuda.is_available()
    if device == "cuda" and not available:
        raise DeviceError(
            "a CUDA device that PyTorch can use",
            found="none",
            do="use --device cpu, or install PyTorch's CUDA build",
        )
    return "cuda" if device != "cpu" and available else "cpu"


def check_compiler(device: str) -> None:
    """Raises OptionError where torch.compile lacks what it compiles with."""
    try:
        torch.compile(torch.neg)(torch.ones(1, device=device))
    except RuntimeError as e:
        raise OptionError(
            "torch.compile, which needs a C++ compiler, and Triton on a card, for compile=true",
            found=str(e).partition("\n")[0],
            do="install it or leave compile out",
        ) from e
