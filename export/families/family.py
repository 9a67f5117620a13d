"""What a checkpoint family is: how a Hugging Face folder names and shapes what `GPT` holds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gptrt.architecture import ModelConfig
from gptrt.errors import CheckpointError
from gptrt.schema import decode

State = dict[str, Tensor]
Json = dict[str, Any]

# What each calls its activation functions.
ACTIVATIONS = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu": "gelu_erf",
    "relu": "relu",
}
ACTIVATION_NAMES = {"gelu_tanh": "gelu_new", "gelu_erf": "gelu", "relu": "relu"}


@dataclass(frozen=True)
class Family:
    """Its `model_type`, its `config.json` and its tensors, both ways.

    Tensors that `from_tensors` does not know stay in its result, so that the caller can name them.
    """

    model_type: str
    to_json: Callable[[ModelConfig], Json]
    from_json: Callable[[Json], ModelConfig]
    to_tensors: Callable[[ModelConfig, State], State]
    from_tensors: Callable[[ModelConfig, State], State]


def checked(**values: Any) -> ModelConfig:
    return decode(ModelConfig, values, error=CheckpointError, source="config.json")


def activation_named(name: str) -> str:
    """Ours for theirs. Raises CheckpointError."""
    if name not in ACTIVATIONS:
        raise CheckpointError(
            f"an activation of {', '.join(ACTIVATIONS)} in config.json",
            found=repr(name),
            do="this variant is not supported natively",
        )
    return ACTIVATIONS[name]


def divide(width: Any, heads: Any) -> Any:
    if isinstance(width, int) and isinstance(heads, int) and heads > 0 and width % heads == 0:
        return width // heads
    raise CheckpointError(
        "a width that is a multiple of the number of heads",
        found=f"width {width!r}, heads {heads!r}",
        do="correct config.json",
    )


def refuse(json: Json, **only: Any) -> None:
    """What would change the computation and is not expressed here is refused, never ignored."""
    for key, supported in only.items():
        if json.get(key, supported) not in (supported, None):
            raise CheckpointError(
                f"{key}={supported!r} in config.json",
                found=repr(json[key]),
                do="this variant is not supported natively",
            )


def without_tied_head(config: ModelConfig, tensors: State, head: str = "lm_head.weight") -> State:
    return {k: v for k, v in tensors.items() if not (config.tied and k == head)}


def with_tied_head(config: ModelConfig, state: State) -> State:
    tied = config.tied and "wte.weight" in state
    return state | {"lm_head.weight": state["wte.weight"]} if tied else state


def joined(tensors: State, names: Sequence[str]) -> Tensor | None:
    """The rows of all of them in one, taken out of `tensors`; nothing is taken where one is missing
    or has another width, so that the caller can name them."""
    found = [tensors[name] for name in names if name in tensors]
    fit = all(t.ndim and t.shape[1:] == found[0].shape[1:] for t in found)
    if len(found) < len(names) or not fit:
        return None
    return torch.cat([tensors.pop(name) for name in names])


def renamed(
    modules: dict[str, str], layer_modules: dict[str, str], layers: int, prefix: str
) -> dict[str, str]:
    """Their name of every weight and bias by ours; `prefix` stands before the number of a layer."""
    found = dict(modules)
    for layer in range(layers):
        found |= {f"h.{layer}.{own}": f"{prefix}{layer}.{n}" for own, n in layer_modules.items()}
    return {own + end: n + end for own, n in found.items() for end in (".weight", ".bias")}
