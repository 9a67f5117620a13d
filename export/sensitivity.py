"""Mixed precision: bits and block size matrix by matrix, from the damage that was measured.

Each matrix alone is stored in each format, and the KL divergence of the model's predictions from
those of the whole model is measured on text. Damages of different matrices nearly add up, so a
plan is a sum: the formats of least total damage within a budget of bits, or of least bits within a
budget of damage. Both are found by exchanging, again and again, damage for bits where a bit buys
the most.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from gptrt.architecture import ModelConfig
from gptrt.errors import OptionError
from gptrt.format import StoredMatrix

from .blocks import BlockFormat, BlockMatrix
from .calibration import Ids, corrected_by_row, costs_of_rows, in_batches, moments_of
from .fisher import OutputCosts
from .model import GPT, head_parameter
from .parts import parameter_of, rows_of
from .progress import Progress, within
from .quantize import Formats, average_bits, matrix_shapes, part_shapes, too_few_bits
from .rounding import Moments, corrected_where_known
from .vocabulary import quick_by_row

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
    shape: tuple[int, int]
    damage: float

    @property
    def weights(self) -> int:
        return math.prod(self.shape)

    @property
    def bits(self) -> float:
        return 8 * self.shape[0] * self.format.row_bytes(self.shape[1])


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
    shapes = part_shapes(model.config)
    corrected = _corrector(model, calibration, progress)
    reference = [F.log_softmax(model(ids), dim=-1) for ids in in_batches(text, _BATCH_TOKENS)]
    twin, options = copy.deepcopy(model).eval(), {}
    for number, (name, shape) in enumerate(shapes.items()):
        progress(number / len(shapes), f"measuring {name}")
        rows, found = twin.get_parameter(parameter_of(name))[rows_of(name)], []
        original = rows.detach().clone()
        formats = list(dict.fromkeys(fmt.within(shape[1]) for fmt in candidates))
        first, last = number / len(shapes), (number + 1) / len(shapes)
        rounding = within(progress, first, last, f"measuring {name}")
        for fmt, matrix in zip(formats, corrected(name, formats, rounding), strict=True):
            rows.copy_(torch.from_numpy(matrix.dequantize()))
            damage = max(0.0, _divergence(twin, text, reference))
            found.append(Option(name, fmt, shape, damage))
        rows.copy_(original)
        options[name] = tuple(found)
    return options


_Corrector = Callable[[str, Sequence[BlockFormat], Progress], list[BlockMatrix]]


def _corrector(model: GPT, calibration: Ids, progress: Progress) -> _Corrector:
    """What rounds any matrix of the model alone, or a part of one, to each of some formats, as an
    export would."""
    outputs = OutputCosts.measure(model, calibration, progress)
    moments = moments_of(model, matrix_shapes(model.config), calibration, outputs)
    costs, head = None, head_parameter(model.config)
    if quick_by_row(model.config):
        costs = costs_of_rows(model, calibration, outputs)
    elif model.config.tied:
        moments[head] = Moments(costs_of_rows(model, calibration, outputs).mean())

    def corrected(
        name: str, formats: Sequence[BlockFormat], progress: Progress
    ) -> list[BlockMatrix]:
        parameter = parameter_of(name)
        weight = model.get_parameter(parameter).detach()
        if costs is not None and parameter == head:
            return corrected_by_row(weight, rows_of(name), formats, costs, progress)
        rows, known = weight[rows_of(name)].numpy(), moments.get(parameter)
        return corrected_where_known(rows, formats, known)

    return corrected


def _divergence(model: GPT, text: Ids, reference: list[Tensor]) -> float:
    """Mean KL divergence of the model's predictions from `reference`, nats a token."""
    total = sum(
        F.kl_div(F.log_softmax(model(ids), dim=-1), wanted, reduction="sum", log_target=True).item()
        for ids, wanted in zip(in_batches(text, _BATCH_TOKENS), reference, strict=True)
    )
    return total / text.size


Plan = dict[str, Option]


def check_budget(config: ModelConfig, bits_per_weight: float) -> None:
    """Raises OptionError if no plan can be that small, before anything is measured."""
    smallest = {
        name: min((fmt.within(columns) for fmt in CANDIDATES), key=lambda f: f.row_bytes(columns))
        for name, (_, columns) in matrix_shapes(config).items()
    }
    least = average_bits(config, smallest)
    if bits_per_weight < least:
        raise too_few_bits(least, bits_per_weight)


def plan_for_bits(config: ModelConfig, options: Options, budget: float) -> Plan:
    """The plan of least damage with at most `budget` bits a weight, over all parameters.

    Raises OptionError where no plan is that small.
    """

    def fits(plan: Plan) -> bool:
        return average_bits(config, formats_of(plan)) <= budget

    plan = _finest(options)
    while not fits(plan):
        cheaper = min(_exchanges(options, plan), key=_price, default=None)
        if cheaper is None:
            least = average_bits(config, formats_of(plan))
            raise too_few_bits(least, budget)
        plan = plan | {cheaper.after.name: cheaper.after}
    return _spend_the_rest(options, plan, fits)


def plan_for_damage(options: Options, budget: float) -> Plan:
    """The smallest plan whose damages add up to at most `budget` nats.

    Raises OptionError where even the formats of least damage cost more.
    """
    plan = _finest(options)
    least = sum(option.damage for option in plan.values())
    if least > budget:
        raise OptionError(
            f"--target-ratio of at least {math.exp(least):.4f}",
            found=f"{math.exp(budget):.4f}",
            do="raise it",
        )
    while True:
        left = budget - sum(option.damage for option in plan.values())
        possible = (e for e in _exchanges(options, plan) if e.damage <= left)
        cheaper = min(possible, key=_price, default=None)
        if cheaper is None:
            return plan
        plan = plan | {cheaper.after.name: cheaper.after}


@dataclass(frozen=True)
class _Exchange:
    """One matrix put into a smaller format."""

    before: Option
    after: Option

    @property
    def damage(self) -> float:
        return self.after.damage - self.before.damage

    @property
    def bits(self) -> float:
        return self.before.bits - self.after.bits


def _price(exchange: _Exchange) -> tuple[float, str]:
    """Damage for each bit that is saved; the name settles a tie."""
    return exchange.damage / exchange.bits, exchange.after.name


def _exchanges(options: Options, plan: Plan) -> Iterator[_Exchange]:
    for name, found in options.items():
        smaller = (option for option in found if option.bits < plan[name].bits)
        yield from (_Exchange(plan[name], option) for option in smaller)


def _spend_the_rest(options: Options, plan: Plan, fits: Callable[[Plan], bool]) -> Plan:
    """What is left of a budget goes where it undoes the most damage."""
    while True:
        better = [
            option
            for name, found in options.items()
            for option in found
            if option.damage < plan[name].damage and fits(plan | {name: option})
        ]
        if not better:
            return plan
        best = max(better, key=lambda o: (plan[o.name].damage - o.damage, o.name))
        plan = plan | {best.name: best}


def _finest(options: Options) -> Plan:
    """The format of least damage for each matrix; of equal ones the smallest."""
    return {n: min(found, key=lambda o: (o.damage, o.bits)) for n, found in options.items()}


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
