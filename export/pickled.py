"""Checkpoints that PyTorch pickled: nanoGPT's `ckpt.pt`, minGPT's and makemore's `model.pt`.

Read with `weights_only`, which builds tensors and plain values and runs no code of the file. All
three name their parameters as GPT-2 does, and store matrices [out, in].
"""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptrt.architecture import ModelConfig
from gptrt.errors import CheckpointError, first_line
from gptrt.format import CONFIG_FILE
from gptrt.schema import decode, read_json

PICKLED_FILES = ("ckpt.pt", "model.pt")
_BUFFERS = re.compile(r"\.attn\.(masked_)?bias$")
_PREFIXES = ("_orig_mod.", "transformer.")  # of a compiled model, and of everything but the head

# minGPT's names of shapes, and their heads.
_MINGPT_HEADS = {
    "openai-gpt": 12,
    "gpt2": 12,
    "gpt2-medium": 16,
    "gpt2-large": 20,
    "gpt2-xl": 25,
    "gopher-44m": 16,
    "gpt-mini": 6,
    "gpt-micro": 4,
    "gpt-nano": 3,
}


def pickled_file(path: Path) -> Path | None:
    """The pickled checkpoint that `path` is, or that lies in the folder `path`."""
    if path.is_file():
        return path
    return next((path / name for name in PICKLED_FILES if (path / name).is_file()), None)


def read_pickled(file: Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Shape and parameters, by the names of `GPT`. Raises CheckpointError."""
    content = load_pickled(file)
    arguments = content.get("model_args")
    raw = content.get("model", content) if isinstance(arguments, dict) else content
    state = {_own_name(name): value for name, value in raw.items() if isinstance(value, Tensor)}
    state = {name: tensor for name, tensor in state.items() if not _BUFFERS.search(name)}
    if not {"wte.weight", "wpe.weight"} <= state.keys():
        raise CheckpointError(
            f"a checkpoint of nanoGPT, minGPT or makemore in {file}",
            found=f"{len(state)} tensors, none of them wte.weight and wpe.weight",
            do="convert it to a Hugging Face folder first",
        )
    if isinstance(arguments, dict):
        return _nanogpt(arguments, state, file), state
    return _mingpt(state, file), state


def load_pickled(file: Path) -> dict[str, Any]:
    """The tensors and plain values of a file. Raises CheckpointError."""
    try:
        with warnings.catch_warnings():  # what is wrong, the error says
            warnings.simplefilter("ignore")
            content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as e:  # of a file that is no checkpoint it raises all kinds
        raise CheckpointError(
            f"tensors and plain values in {file}",
            found=first_line(e),
            do="save its state_dict alone with torch.save",
        ) from e
    if not isinstance(content, dict):
        raise CheckpointError(f"a state_dict in {file}", found=type(content).__name__, do="save it")
    return content


def _own_name(name: str) -> str:
    for prefix in _PREFIXES:
        name = name.removeprefix(prefix)
    return name


def _nanogpt(arguments: dict[str, Any], state: dict[str, Tensor], file: Path) -> ModelConfig:
    """nanoGPT keeps the arguments of its model; its GELU is the exact one, its head is tied."""
    tied = {"activation": "gelu_erf", "bias": arguments.get("bias", True), "tied": True}
    return _shape(state, arguments.get("n_head"), file, **tied)


def _mingpt(state: dict[str, Tensor], file: Path) -> ModelConfig:
    """minGPT writes a `config.json` beside its weights; makemore writes nothing of its heads."""
    path = file.parent / CONFIG_FILE
    json = read_json(path, error=CheckpointError) if path.is_file() else {}
    model = json.get("model") if isinstance(json, dict) else None
    if not isinstance(model, dict):
        model = {}
    heads = model.get("n_head") or _MINGPT_HEADS.get(str(model.get("model_type")))
    return _shape(state, heads, file, activation="gelu_tanh", tied=False)


def _shape(state: dict[str, Tensor], heads: Any, file: Path, **rest: Any) -> ModelConfig:
    """What the tensors say, and how many heads, which they do not."""
    vocab_size, n_embd = state["wte.weight"].shape
    if type(heads) is not int or heads < 1 or n_embd % heads:
        raise CheckpointError(
            f"the number of heads of {file}, a divisor of {n_embd}",
            found=repr(heads),
            do=f'write {{"model": {{"n_head": N}}}} into {CONFIG_FILE} beside it',
        )
    layers = {int(found[1]) for name in state if (found := re.match(r"h\.(\d+)\.", name))}
    inner = state.get("h.0.mlp.c_fc.weight")
    values = {
        "vocab_size": vocab_size,
        "n_positions": len(state["wpe.weight"]),
        "n_layer": len(layers),
        "n_head": heads,
        "n_kv_head": heads,
        "n_embd": n_embd,
        "head_dim": n_embd // heads,
        "n_inner": len(inner) if inner is not None else 4 * n_embd,
    }
    return decode(ModelConfig, values | rest, error=CheckpointError, source=str(file))
