"""Heads of a size that onnxruntime's attention takes: others are padded with zeros, which changes
nothing that the model computes."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from gptrt.architecture import ModelConfig
from gptrt.errors import CheckpointError, OptionError

from .checkpoint import Checkpoint


def with_padded_heads(checkpoint: Checkpoint) -> Checkpoint:
    """The same model with a head_dim that is a multiple of 8, or of 16 where pairs are turned.

    Raises CheckpointError for a model that was trained for the rounding of the blocks it has.
    """
    config = checkpoint.config
    size = _padded_size(config)
    if size == config.head_dim:
        return checkpoint
    if checkpoint.rounding is not None:
        raise CheckpointError(
            f"a head_dim that is a multiple of {_multiple(config)}, to store blocks as trained",
            found=str(config.head_dim),
            do="convert the checkpoint that it was trained from",
        )
    turned = config.rotary_dim or config.head_dim if config.positions == "rotary" else 0
    padded = replace(config, head_dim=size, true_head_dim=config.head_dim, rotary_dim=turned)
    at = _places(config, size)
    state = {
        name: _pad(name, tensor, config, at, size) for name, tensor in checkpoint.state.items()
    }
    return replace(checkpoint, config=padded, state=state)


def check_unpadded(config: ModelConfig) -> None:
    """Raises OptionError for a model whose blocks would not be stored as they were trained."""
    if _padded_size(config) != config.head_dim:
        raise OptionError(
            f"a head_dim that is a multiple of {_multiple(config)}, to train for the rounding",
            found=str(config.head_dim),
            do="leave --quantize out: `convert` rounds such a model as it is",
        )


def _padded_size(config: ModelConfig) -> int:
    """The head_dim that such a model has in a bundle."""
    return -(-config.head_dim // _multiple(config)) * _multiple(config)


def _multiple(config: ModelConfig) -> int:
    return 16 if config.positions == "rotary" else 8


def _places(config: ModelConfig, size: int) -> Tensor:
    """Where each value of a head goes: pairs that are turned stay half a head apart."""
    at = torch.arange(config.head_dim)
    if config.positions == "rotary":
        half = config.head_dim // 2
        at = torch.where(at < half, at, at - half + size // 2)
    return at


def _pad(name: str, tensor: Tensor, config: ModelConfig, at: Tensor, size: int) -> Tensor:
    if ".attn.c_attn." in name:  # [heads of query, key and value * head_dim, ...]
        rows = tensor.unflatten(0, (-1, config.head_dim))  # type: ignore[no-untyped-call]
        return _spread(rows, 1, at, size).flatten(0, 1)
    if name.endswith("attn.c_proj.weight"):  # [n_embd, n_head * head_dim]
        columns = tensor.unflatten(1, (-1, config.head_dim))  # type: ignore[no-untyped-call]
        return _spread(columns, 2, at, size).flatten(1)
    if name.endswith(("q_norm.weight", "k_norm.weight")):  # its mean is now over more values
        return _spread(tensor, 0, at, size) * math.sqrt(config.head_dim / size)
    return tensor


def _spread(tensor: Tensor, dim: int, at: Tensor, size: int) -> Tensor:
    shape = list(tensor.shape)
    shape[dim] = size
    return torch.zeros(shape, dtype=tensor.dtype).index_copy(dim, at, tensor)
