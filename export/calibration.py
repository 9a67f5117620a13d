"""Error-corrected rounding of a whole model, matrix after matrix, over calibration text.

Two streams of activations run side by side through the blocks: one of the model as it was, one of
the model as it is rounded so far. What a matrix reads is the second; what it ought to give is what
it would have made of the first. So later matrices make good what earlier ones have lost. How much
an error in each of its outputs matters, the unrounded model tells (`fisher`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from .blocks import BlockFormat, BlockMatrix
from .fisher import OutputCosts, add_products
from .model import GPT, Attend, CausalAttention, head_parameter
from .parts import parameter_of, parts_of, rows_of
from .progress import Progress, within
from .rounding import Moments, corrected_where_known, error_corrected, without_drift
from .vocabulary import RowCosts, quick_by_row

Ids = NDArray[np.int64]

_BATCH_TOKENS = 4096


@torch.no_grad()
def correct_errors(
    model: GPT,
    formats: Mapping[str, BlockFormat],
    windows: Ids,
    progress: Progress,
    *,
    by_row: bool | None = None,
) -> dict[str, BlockMatrix]:
    """Round every matrix in `formats` for `windows` of calibration text [count, length]; `by_row`
    takes each row of the vocabulary for itself, which is closer and takes longer. Left out, that is
    done where it is quick.

    A tied matrix comes first, as the embedding that all others read through; as the head it is
    corrected for what the unrounded model gives it.
    """
    by_row = quick_by_row(model.config) if by_row is None else by_row
    work = _Correction(model.eval(), formats, progress)
    costs = OutputCosts.measure(model, windows, progress)
    attend, batches = CausalAttention(model.config), in_batches(windows)
    if not model.config.tied:
        work.store_all("wte.weight", None)
    elif by_row:
        work.store_rows("wte.weight", costs_of_rows(model, windows, costs))
    else:
        alike = costs_of_rows(model, windows, costs).mean()
        work.store_all("wte.weight", Moments(alike))
    if model.config.projected and model.config.tied:
        rows = ((work.rounded.wte(ids), model.wte(ids)) for ids in batches)
        work.store_all("project_in.weight", _sum_moments(rows))
    work.store_all("wpe.weight", None)
    x = [work.rounded.embed(ids) for ids in batches]
    reference = [model.embed(ids) for ids in batches]
    for layer, (block, original) in enumerate(zip(work.rounded.h, model.h, strict=True)):
        run = partial(_run, attend, layer)
        whole = {parameter_of(name) for name in formats}
        names = [n for n, _ in block.named_modules() if f"h.{layer}.{n}.weight" in whole]
        wanted: dict[str, list[Tensor]] = {name: [] for name in names}
        with _watching(original, wanted):
            reference = [run(original, b) for b in reference]
        for name in names:
            found = (_input_of(name, block, run, a) for a in x)
            moments = _sum_moments(zip(found, wanted[name], strict=True))
            parameter = f"h.{layer}.{name}.weight"
            work.store_all(parameter, replace(moments, output_costs=costs.products.get(parameter)))
        x = [run(block, a) for a in x]
    pairs = list(zip(x, reference, strict=True))
    if model.config.projected:
        states = ((model.ln_f(a), model.ln_f(b)) for a, b in pairs)
        work.store_all("project_out.weight", _sum_moments(states))
    if not model.config.tied:
        finals = [
            (work.rounded.to_head(model.ln_f(a)), model.to_head(model.ln_f(b))) for a, b in pairs
        ]
        moments = _sum_moments(finals)
        if by_row:
            work.undo_drift("lm_head.weight", moments)
            read = torch.cat([a.flatten(0, 1) for a, _ in finals])
            work.store_rows("lm_head.weight", RowCosts.measure(model.lm_head.weight, read))
        else:
            work.store_all("lm_head.weight", moments)
    return work.matrices


class _Correction:
    """The model on its way: rounded where `matrices` has an entry, as it was elsewhere."""

    def __init__(self, model: GPT, formats: Mapping[str, BlockFormat], progress: Progress) -> None:
        self.rounded = copy.deepcopy(model)
        self.matrices: dict[str, BlockMatrix] = {}
        self._formats, self._progress = formats, progress

    def store_all(self, parameter: str, moments: Moments | None) -> None:
        """The rows of a matrix in parts do not know of each other: they are rounded one by one."""
        for name in parts_of(parameter, self._formats):
            self._progress(len(self.matrices) / len(self._formats), f"rounding {name}")
            rows = self.rounded.get_parameter(parameter)[rows_of(name)]
            own = rows.detach().numpy()
            (matrix,) = corrected_where_known(own, [self._formats[name]], moments)
            self._keep(name, matrix)

    def undo_drift(self, parameter: str, moments: Moments) -> None:
        weight = self.rounded.get_parameter(parameter)
        weight.copy_(without_drift(weight, moments))

    def store_rows(self, parameter: str, costs: RowCosts) -> None:
        """Each row by the errors that its own costs tell."""
        weight = self.rounded.get_parameter(parameter)
        for name in parts_of(parameter, self._formats):
            done, count = len(self.matrices), len(self._formats)
            progress = within(self._progress, done / count, (done + 1) / count, f"rounding {name}")
            own = [self._formats[name]]
            (matrix,) = corrected_by_row(weight, rows_of(name), own, costs, progress)
            self._keep(name, matrix)

    def _keep(self, name: str, matrix: BlockMatrix) -> None:
        rows = self.rounded.get_parameter(parameter_of(name))[rows_of(name)]
        rows.copy_(torch.from_numpy(matrix.dequantize()))
        self.matrices[name] = matrix


def corrected_by_row(
    weight: Tensor,
    rows: slice,
    formats: Sequence[BlockFormat],
    costs: RowCosts,
    progress: Progress,
) -> list[BlockMatrix]:
    """`rows` of a vocabulary matrix in each of `formats`, every row error-corrected by what its own
    errors cost."""
    first, last, _ = rows.indices(len(weight))
    parts = []
    for some, hessian in costs.of(first, last):
        progress((some.start - first) / (last - first), f"row {some.start}")
        own, moments = weight[some].detach().numpy(), Moments(hessian)
        parts.append(error_corrected(own, formats, moments))
    return [BlockMatrix.stack(found) for found in zip(*parts, strict=True)]


@torch.no_grad()
def costs_of_rows(model: GPT, windows: Ids, costs: OutputCosts) -> RowCosts:
    """Of the matrix that makes logits, in the model as it is."""
    contexts = torch.cat([model.hidden(ids).flatten(0, 1) for ids in in_batches(windows)])
    cost = costs.embedded
    if cost is not None and model.config.projected:
        into_stream = model.project_in.weight
        cost = into_stream.T @ cost @ into_stream
    return RowCosts.measure(model.lm_head.weight, contexts, cost)


@torch.no_grad()
def moments_of(
    model: GPT, names: Iterable[str], windows: Ids, costs: OutputCosts
) -> dict[str, Moments]:
    """The moments of each product's inputs in the model as it is, and the costs of its outputs."""
    sums: dict[str, Tensor] = {}
    modules = {name: name.removesuffix(".weight") for name in names}
    modules[head_parameter(model.config)] = "lm_head"
    for ids in in_batches(windows):
        seen: dict[str, list[Tensor]] = {
            module: [] for name, module in modules.items() if module not in ("wte", "wpe")
        }
        with _watching(model, seen):
            model(ids)
        for name, module in modules.items():
            for x in seen.get(module, []):
                add_products(sums, name, x)
    products = costs.products
    return {name: Moments(h, output_costs=products.get(name)) for name, h in sums.items()}


@contextmanager
def _watching(parent: nn.Module, seen: Mapping[str, list[Tensor]]) -> Iterator[None]:
    """What the modules named in `seen` read is added to their lists."""
    handles = [
        parent.get_submodule(name).register_forward_pre_hook(partial(_remember, inputs))
        for name, inputs in seen.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _remember(inputs: list[Tensor], _module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
    inputs.append(arguments[0])


class _SeenEnough(Exception):
    pass


def _input_of(
    name: str, block: nn.Module, run: Callable[[nn.Module, Tensor], Tensor], x: Tensor
) -> Tensor:
    """What the module `name` of `block` reads when the block reads x."""
    seen: list[Tensor] = []

    def stop(_module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        seen.append(arguments[0])
        raise _SeenEnough

    handle = block.get_submodule(name).register_forward_pre_hook(stop)
    try:
        run(block, x)
    except _SeenEnough:
        pass
    finally:
        handle.remove()
    return seen[0]


def _run(attend: Attend, layer: int, block: nn.Module, x: Tensor) -> Tensor:
    out: Tensor = block(x, partial(attend, layer))
    return out


def in_batches(windows: Ids, tokens: int = _BATCH_TOKENS) -> list[Tensor]:
    """Windows [count, length], as many at a time as make so many tokens."""
    size = max(1, tokens // windows.shape[1])
    return list(torch.split(torch.from_numpy(windows), size))


def _sum_moments(inputs: Iterable[tuple[Tensor, Tensor | None]]) -> Moments:
    """Of pairs of inputs, as they are and as the reference has them."""
    hessian: Tensor | None = None
    drift: Tensor | None = None
    for x, reference in inputs:
        flat = x.flatten(0, -2)  # [tokens, in]
        part = flat.T @ flat
        hessian = part if hessian is None else hessian + part
        if reference is not None:
            part = (reference.flatten(0, -2) - flat).T @ flat
            drift = part if drift is None else drift + part
    assert hessian is not None, "text of one window at least"
    return Moments(hessian, drift)
