"""The weights of a checkpoint folder: in which files they are, and whether they fit a model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from gptrt.architecture import ModelConfig
from gptrt.errors import CheckpointError
from gptrt.schema import decode, read_json

from .files import read_tensors
from .model import GPT
from .pickled import load_pickled
from .tokenization import ids_without_rows

WEIGHTS_FILE = "model.safetensors"
PICKLED_WEIGHTS_FILE = "pytorch_model.bin"
INDEX_SUFFIX = ".index.json"  # after either, where the weights are in shards


def has_weights(folder: Path, weights: str) -> bool:
    """Whether a folder has them in a file of this name, or in shards of it."""
    return any((folder / name).is_file() for name in (weights, weights + INDEX_SUFFIX))


def read_weights(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """All tensors of a folder, by their names in its files. Raises CheckpointError."""
    for file in _weight_files(folder):
        if file.suffix == ".safetensors":
            yield from read_tensors(file)
        else:
            yield from ((k, v) for k, v in load_pickled(file).items() if isinstance(v, Tensor))


def _weight_files(folder: Path) -> list[Path]:
    """Those that no code can be in, if they are there."""
    pickled = has_weights(folder, PICKLED_WEIGHTS_FILE) and not has_weights(folder, WEIGHTS_FILE)
    weights = folder / (PICKLED_WEIGHTS_FILE if pickled else WEIGHTS_FILE)
    index_file = weights.with_name(weights.name + INDEX_SUFFIX)
    if index_file.is_file():
        index = read_json(index_file, error=CheckpointError)
        names = decode(
            dict[str, str],
            index.get("weight_map") if isinstance(index, dict) else index,
            error=CheckpointError,
            source=f"weight_map in {index_file}",
        )
        files = [folder / Path(name).name for name in sorted(set(names.values()))]
    else:
        files = [weights]
    if missing := [file.name for file in files if not file.is_file()]:
        raise CheckpointError(
            f"the weights in {folder}", found=f"no {', '.join(missing)}", do="copy all files again"
        )
    return files


def fitting(
    config: ModelConfig, tensors: dict[str, Tensor], tokenizer: Tokenizer | None, folder: Path
) -> dict[str, Tensor]:
    """The parameters in fp32. Every fault at once: what is missing, what is left over, what has
    another shape or holds no numbers, and tokens that no row of the matrix is for."""
    state = {
        name: tensor.float().contiguous() if tensor.is_floating_point() else tensor
        for name, tensor in tensors.items()
    }
    wanted = {name: tensor.shape for name, tensor in GPT.outline(config).state_dict().items()}
    faults = [f"{name} is missing" for name in wanted.keys() - state.keys()]
    faults += [
        f"{name} is unknown, its shape {list(state[name].shape)}"
        for name in state.keys() - wanted.keys()
    ]
    faults += [
        f"{name} has shape {list(state[name].shape)}, wanted {list(wanted[name])}"
        for name in wanted.keys() & state.keys()
        if state[name].shape != wanted[name]
    ]
    faults += [
        f"{name} holds {tensor.dtype}, wanted floats"
        for name, tensor in state.items()
        if not tensor.is_floating_point()
    ]
    faults += [
        f"{name} holds values that are infinite or no numbers"
        for name, tensor in state.items()
        if tensor.is_floating_point() and not torch.isfinite(tensor).all()
    ]
    faults += ids_without_rows(tokenizer, config.vocab_size)
    if faults:
        raise CheckpointError(
            f"weights and a tokenizer in {folder} that fit its configuration",
            found="; ".join(sorted(faults)),
            do="restore all files from the same model",
        )
    return state
