"""Mixed precision: bits and block size matrix by matrix, from the damage that was measured.

Each matrix alone is stored in each format, and the KL divergence of the model's predictions from
those of the whole model is measured on text. Damages of different matrices nearly add up, so a
plan is a sum: the formats of least total damage within a budget of bits, or of least bits within a
budget of damage. Both are found by exchanging, again and again, damage for bits where a bit buys
the most.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from gptrt.errors import OptionError
from gptrt.format import ModelConfig, StoredMatrix

from .blocks import BlockFormat
from .calibration import Ids, Progress, moments_of
from .model import GPT
from .quantize import Formats, average_bits, matrix_shapes
from .rounding import error_corrected, nearest

CANDIDATES = (
    BlockFormat(4, 128),
    BlockFormat(4, 64),
    BlockFormat(4, 32),
    BlockFormat(8, 128),
)
_BATCH_TOKENS = 2048


@dataclass(frozen=True)
class Option:
    """One matrix in one format, and the damage of that alone: mean KL in nats a token."""

    name: str
    format: BlockFormat
    weights: int
    damage: float

    @property
    def bits(self) -> float:
        return self.weights * self.format.bits_per_weight


Options = dict[str, tuple[Option, ...]]


@torch.no_grad()
def measure_damage(
    model: GPT,
    calibration: Ids,
    text: Ids,
    progress: Progress,
    candidates: tuple[BlockFormat, ...] = CANDIDATES,
) -> Options:
    """Every matrix in every candidate format, rounded for `calibration` and judged on `text`,
    both windows [count, length]."""
    shapes = matrix_shapes(model.config)
    moments = moments_of(model, shapes, calibration)
    reference = [F.log_softmax(model(ids), dim=-1) for ids in _batches(text)]
    twin, options = copy.deepcopy(model).eval(), {}
    for number, (name, (rows, columns)) in enumerate(shapes.items()):
        progress(number / len(shapes), f"measuring {name}")
        parameter, found = twin.get_parameter(name), []
        original = parameter.detach().clone()
        for fmt in dict.fromkeys(fmt.within(columns) for fmt in candidates):
            weight = original.numpy()
            known = moments.get(name)
            matrix = error_corrected(weight, fmt, known) if known else nearest(weight, fmt)
            parameter.copy_(torch.from_numpy(matrix.dequantize()))
            damage = max(0.0, _divergence(twin, text, reference))
            found.append(Option(name, fmt, rows * columns, damage))
        parameter.copy_(original)
        options[name] = tuple(found)
    return options


def _batches(text: Ids) -> tuple[Tensor, ...]:
    return torch.split(torch.from_numpy(text), max(1, _BATCH_TOKENS // text.shape[1]))


def _divergence(model: GPT, text: Ids, reference: list[Tensor]) -> float:
    """Mean KL divergence of the model's predictions from `reference`, nats a token."""
    total = sum(
        F.kl_div(F.log_softmax(model(ids), dim=-1), wanted, reduction="sum", log_target=True).item()
        for ids, wanted in zip(_batches(text), reference, strict=True)
    )
    return total / text.size


Plan = dict[str, Option]


def plan_for_bits(config: ModelConfig, options: Options, budget: float) -> Plan:
    """The plan of least damage with at most `budget` bits a weight, over all parameters.

    Raises OptionError where no plan is that small.
    """
    return _shrink(
        options,
        lambda plan: average_bits(config, formats_of(plan)) <= budget,
        f"--bits-per-weight of at least {_least_bits(config, options):.3f}",
        f"{budget}",
    )


def plan_for_damage(options: Options, budget: float) -> Plan:
    """The smallest plan whose damages add up to at most `budget` nats.

    Raises OptionError where even the largest formats cost more.
    """
    plan = _finest(options)
    least = sum(option.damage for option in plan.values())
    if least > budget:
        raise OptionError(
            f"--target-ratio of at least {1 + least:.4f}", found=f"{1 + budget:.4f}", do="raise it"
        )
    while (cheaper := _best_exchange(options, plan)) is not None:
        trial = plan | {cheaper.name: cheaper}
        if sum(option.damage for option in trial.values()) > budget:
            break
        plan = trial
    return plan


def _shrink(options: Options, fits: Callable[[Plan], bool], wanted: str, found: str) -> Plan:
    plan = _finest(options)
    while not fits(plan):
        cheaper = _best_exchange(options, plan)
        if cheaper is None:
            raise OptionError(wanted, found=found, do="raise the budget")
        plan = plan | {cheaper.name: cheaper}
    return plan


def _finest(options: Options) -> Plan:
    """The format of least damage for each matrix; of equal ones the smallest."""
    return {n: min(found, key=lambda o: (o.damage, o.bits)) for n, found in options.items()}


def _best_exchange(options: Options, plan: Plan) -> Option | None:
    """Of all smaller formats the one that adds the least damage for each bit that it saves."""
    exchanges = [
        ((option.damage - plan[name].damage) / (plan[name].bits - option.bits), name, option)
        for name, found in options.items()
        for option in found
        if option.bits < plan[name].bits
    ]
    return min(exchanges, key=lambda e: e[:2])[2] if exchanges else None


def _least_bits(config: ModelConfig, options: Options) -> float:
    smallest = {n: min(found, key=lambda o: o.bits).format for n, found in options.items()}
    return average_bits(config, smallest)


def formats_of(plan: Mapping[str, Option]) -> Formats:
    return {name: option.format for name, option in plan.items()}


def table_of(plan: Plan) -> tuple[StoredMatrix, ...]:
    """For the manifest."""
    return tuple(
        StoredMatrix(o.name, o.format.bits, o.format.block_size, o.weights, round(o.damage, 8))
        for o in plan.values()
    )


def explain(plan: Plan) -> str:
    """The table that the exporter prints: the most damaging first."""
    lines = [f"{'matrix':28} {'bits':>4} {'block':>5} {'weights':>11} {'damage (nats)':>13}"]
    for o in sorted(plan.values(), key=lambda o: -o.damage):
        fmt = o.format
        lines.append(
            f"{o.name:28} {fmt.bits:4} {fmt.block_size:5} {o.weights:11,} {o.damage:13.6f}"
        )
    return "\n".join(lines)
