"""Low-rank adaptation (https://arxiv.org/abs/2106.09685): a matrix W learns as W + (alpha / r) B A,
with A [r, in] and B [out, r]; W itself stays as it is.

An adapter is kept in the format of PEFT, under the names that the family has in Hugging Face's
folders. Where they have several matrices for one of ours, all of them get the same A and their rows
of B; `merge` makes a plain model of it, whose graph is that of the base.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptrt.architecture import ModelConfig
from gptrt.errors import CheckpointError, OptionError
from gptrt.schema import bounded

from .families import family_for
from .model import GPT

Target = Literal["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
ALL_TARGETS: tuple[Target, ...] = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")

ADAPTER_FOLDER = "adapter"
ADAPTER_FILE, ADAPTER_CONFIG_FILE = "adapter_model.safetensors", "adapter_config.json"
_PREFIX = "base_model.model."  # of every name in an adapter of PEFT's


@dataclass(frozen=True)
class LoraConfig:
    """`targets` are the matrices of each block that learn; `dropout` is on what A reads."""

    rank: int = bounded(1, 4096, default=8)
    alpha: float = bounded(0.0, 1e6, default=16.0)
    dropout: float = bounded(0.0, 0.99, default=0.0)
    targets: tuple[Target, ...] = ALL_TARGETS

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def faults(self) -> list[str]:
        unique = set(self.targets)
        return [] if unique and len(unique) == len(self.targets) else ["targets are not different"]


class LoraLinear(nn.Linear):
    """A linear map with an adapter; only the adapter learns."""

    def __init__(self, base: nn.Linear, config: LoraConfig) -> None:
        nn.Module.__init__(self)  # its own tensors would be made for nothing
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias = base.weight, base.bias
        self.lora_a = nn.Parameter(torch.empty(config.rank, base.in_features))
        self.lora_b = nn.Parameter(torch.zeros(base.out_features, config.rank))
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))
        self.scale, self.dropout = config.scale, config.dropout

    def forward(self, x: Tensor) -> Tensor:
        low = F.linear(F.dropout(x, self.dropout, self.training), self.lora_a)
        return F.linear(x, self.weight, self.bias) + self.scale * F.linear(low, self.lora_b)


def adapt(model: GPT, config: LoraConfig) -> dict[str, nn.Parameter]:
    """Give the targets of every block an adapter that changes nothing yet, and let nothing else
    learn: the parameters that do, by name."""
    model.requires_grad_(False)
    learning = {}
    for layer, block in enumerate(model.h):
        for target in config.targets:
            parent_name, name = target.split(".")
            parent = getattr(block, parent_name)
            adapted = LoraLinear(getattr(parent, name), config)
            setattr(parent, name, adapted)
            learning[f"h.{layer}.{target}.lora_a"] = adapted.lora_a
            learning[f"h.{layer}.{target}.lora_b"] = adapted.lora_b
    return learning


@torch.no_grad()
def merged_state(model: GPT) -> dict[str, Tensor]:
    """The state of a model without adapters that computes the same."""
    state = {n: t for n, t in model.state_dict().items() if not n.endswith((".lora_a", ".lora_b"))}
    for name, module in model.named_modules():
        if isinstance(module, LoraLinear):
            state[f"{name}.weight"] = module.weight + module.scale * module.lora_b @ module.lora_a
    return state


# --- on disk, as PEFT has it --------------------------------------------------------------------


def to_peft(config: ModelConfig, learning: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of `adapt` by the names that PEFT gives them."""
    found = {}
    for name, b in learning.items():
        if not name.endswith(".lora_b"):
            continue
        own = name.removesuffix(".lora_b")
        for module, rows in _their_rows(config, own, b.detach()).items():
            found[f"{_PREFIX}{module}.lora_A.weight"] = learning[f"{own}.lora_a"].detach().clone()
            found[f"{_PREFIX}{module}.lora_B.weight"] = rows
    return found


def from_peft(
    config: ModelConfig, tensors: Mapping[str, Tensor], learning: Mapping[str, nn.Parameter]
) -> None:
    """Take up what `to_peft` gave for the same model. Raises CheckpointError for what does not
    fit."""
    wanted = to_peft(config, learning)
    if shapes(wanted) != shapes(tensors):
        raise CheckpointError(
            "the adapter that belongs to this run",
            found="other matrices or another rank",
            do="restore the checkpoint",
        )
    with torch.no_grad():
        for name, parameter in learning.items():
            own, _, part = name.rpartition(".")
            modules = list(_their_rows(config, own, learning[f"{own}.lora_b"].detach()))
            if part == "lora_a":
                parameter.copy_(tensors[f"{_PREFIX}{modules[0]}.lora_A.weight"])
            else:
                rows = {f"{m}.weight": tensors[f"{_PREFIX}{m}.lora_B.weight"] for m in modules}
                parameter.copy_(_our_rows(config, own, rows))


def shapes(tensors: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in tensors.items()}


def peft_config(config: ModelConfig, lora: LoraConfig, base: str) -> dict[str, Any]:
    """`adapter_config.json`. `base` names the model that it is for."""
    modules = {
        module.partition(".0.")[2]
        for target in lora.targets
        for module in _their_rows(config, f"h.0.{target}", torch.zeros(_rows(config, target), 1))
    }
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "target_modules": sorted(modules),
        "fan_in_fan_out": _is_turned(config),
        "bias": "none",
        "inference_mode": True,
    }


def _rows(config: ModelConfig, target: Target) -> int:
    """Of the matrix, its outputs."""
    outline = GPT.outline(replace(config, n_layer=1))
    return int(outline.get_parameter(f"h.0.{target}.weight").shape[0])


def _is_turned(config: ModelConfig) -> bool:
    """Whether the family stores matrices as [in, out]."""
    probe = family_for(config).to_tensors(config, {"h.0.mlp.c_proj.weight": torch.zeros(2, 1)})
    return next(iter(probe.values())).shape == (1, 2)


def _their_rows(config: ModelConfig, module: str, b: Tensor) -> dict[str, Tensor]:
    """The rows of B by the modules that they belong to in Hugging Face's model."""
    turned = _is_turned(config)
    tensors = family_for(config).to_tensors(config, {f"{module}.weight": b})
    return {
        name.removesuffix(".weight"): (rows.T if turned else rows).contiguous()
        for name, rows in tensors.items()
    }


def _our_rows(config: ModelConfig, module: str, rows: Mapping[str, Tensor]) -> Tensor:
    """B of the rows that `_their_rows` gave."""
    turned = _is_turned(config)
    theirs = {name: part.T if turned else part for name, part in rows.items()}
    untied = replace(config, tied=False)  # no head is among them
    return family_for(config).from_tensors(untied, theirs)[f"{module}.weight"]


def lora_config(
    rank: int | None, alpha: float | None, dropout: float, targets: tuple[str, ...]
) -> LoraConfig | None:
    """Of what a user asks for; None where no adapter is asked for. Raises OptionError."""
    if rank is None:
        if alpha is not None or dropout or targets:
            raise OptionError(
                "--lora-rank", found="other options of an adapter without it", do="add it"
            )
        return None
    if unknown := [name for name in targets if name not in ALL_TARGETS]:
        raise OptionError(
            f"--lora-target {', '.join(ALL_TARGETS)}", found=", ".join(unknown), do="correct it"
        )
    chosen = tuple(target for target in ALL_TARGETS if target in targets) or ALL_TARGETS
    return LoraConfig(rank, 2.0 * rank if alpha is None else alpha, dropout, chosen)
