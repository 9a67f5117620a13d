"""Rounding that is learnt: the forward pass computes with rounded matrices, and both where each
weight lies on its grid and the scales of the grids learn from it.

What is rounded is what a bundle stores (`blocks`), to the bit: a scale in fp16 a block, the
integers of MatMulNBits. A weight is kept as its position on the grid, in steps of it: 2.3 is stored
as 2. So one learning rate suits every block of every model: it says how many steps it takes to turn
an integer. Rounding has no gradient, so the position takes that of its integer (the
straight-through estimator, https://arxiv.org/abs/1308.3432). Scales are learnt by their logarithm:
a step then changes each by a share of itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptrt.errors import CheckpointError, OptionError
from gptrt.schema import decode

from .blocks import BlockFormat, BlockMatrix, Float, Grid, to_blocks, unpack
from .model import GPT, Attend, head_parameter
from .parts import parameter_of, parts_of, rows_of, shape_of

POSITION_PREFIX, SCALE_PREFIX = "positions/", "log_scales/"  # of what learns
_SIGN_PREFIX = "signs/"
_SMALLEST = 1e-9  # a block of zeros has a scale too
_CELL = 0.2  # of a step to either side of an integer: nearer to the edge, noise alone would turn it


class TrainedRounding:
    """The matrices of a model while their rounding learns, by parameter name or part of one.

    `positions` are [rows, columns] in steps of the grid, zero in the middle; `log_scales` and
    `signs` [rows, blocks]. Formats are symmetric.
    """

    def __init__(
        self,
        formats: Mapping[str, BlockFormat],
        positions: Mapping[str, Tensor],
        log_scales: Mapping[str, Tensor],
        signs: Mapping[str, Tensor],
    ) -> None:
        self.formats, self.signs = dict(formats), dict(signs)
        self.positions = {name: nn.Parameter(tensor) for name, tensor in positions.items()}
        self.log_scales = {name: nn.Parameter(tensor) for name, tensor in log_scales.items()}

    @classmethod
    def start(
        cls, matrices: Mapping[str, BlockMatrix], state: Mapping[str, Tensor]
    ) -> TrainedRounding:
        """From matrices that are rounded already, each weight on that side of its integer where
        `state` has it."""
        scales = {name: torch.from_numpy(m.scales) for name, m in matrices.items()}
        positions = {}
        for name, matrix in matrices.items():
            middle = torch.from_numpy(_integers(matrix))
            weights = state[parameter_of(name)].detach()[rows_of(name)]
            steps = scales[name].repeat_interleave(matrix.format.block_size, dim=1)
            exact = weights / steps[:, : matrix.columns]
            exact = torch.where(exact.isfinite(), exact, middle)
            positions[name] = exact.clamp(middle - _CELL, middle + _CELL)
        return cls(
            {name: m.format for name, m in matrices.items()},
            positions,
            {name: s.abs().clamp(min=_SMALLEST).log() for name, s in scales.items()},
            {name: torch.where(s < 0, -1.0, 1.0) for name, s in scales.items()},
        )

    def weights(self) -> dict[str, Tensor]:
        """The rounded matrices by parameter name; gradients reach positions and scales."""
        whole: dict[str, Tensor] = {}
        for parameter in dict.fromkeys(map(parameter_of, self.formats)):
            parts = [self._rounded(name) for name in parts_of(parameter, self.formats)]
            whole[parameter] = parts[0] if len(parts) == 1 else torch.cat(parts)
        return whole

    def _rounded(self, name: str) -> Tensor:
        fmt, positions = self.formats[name], self.positions[name]
        integers: Tensor = _Snap.apply(positions, fmt.zero)  # type: ignore[no-untyped-call]
        scales = _stored(self.log_scales[name].exp() * self.signs[name])
        rows, columns = positions.shape
        padded = F.pad(integers, (0, -columns % fmt.block_size))
        blocks = padded.view(rows, -1, fmt.block_size)
        return (blocks * scales.unsqueeze(-1)).flatten(1)[:, :columns]

    def parameters(self) -> dict[str, nn.Parameter]:
        """What learns, by names of its own."""
        named = {POSITION_PREFIX + name: tensor for name, tensor in self.positions.items()}
        return named | {SCALE_PREFIX + name: tensor for name, tensor in self.log_scales.items()}

    @torch.no_grad()
    def matrices(self) -> dict[str, BlockMatrix]:
        """The matrices that a bundle stores: those that the forward pass computes with."""
        found = {}
        for name, fmt in self.formats.items():
            scales = (self.log_scales[name].exp() * self.signs[name]).cpu().numpy()
            grid = Grid(fmt, scales, np.full(scales.shape, fmt.zero, np.float32))
            integers = self.positions[name].round().clamp(-fmt.zero, fmt.zero - 1).cpu().numpy()
            q = to_blocks(integers, fmt.block_size) + fmt.zero
            found[name] = grid.matrix(q.astype(np.uint8), integers.shape[1])
        return found

    def in_state(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`state` with the rounded matrices in place of its own, also where a tied one has a second
        name."""
        with torch.no_grad():
            rounded = self.weights()
        whole = dict(state) | rounded
        if "lm_head.weight" in state and "lm_head.weight" not in rounded:
            whole["lm_head.weight"] = whole["wte.weight"]
        return whole

    def to(self, device: torch.device) -> TrainedRounding:
        parts = (self.positions, self.log_scales, self.signs)
        moved = ({n: t.detach().to(device) for n, t in part.items()} for part in parts)
        return TrainedRounding(self.formats, *moved)

    # --- on disk: tensors, and the formats as JSON -----------------------------------------------

    def tensors(self) -> dict[str, Tensor]:
        named: dict[str, Tensor] = dict(self.parameters())
        return named | {_SIGN_PREFIX + name: tensor for name, tensor in self.signs.items()}

    def formats_json(self) -> dict[str, Any]:
        return {name: asdict(fmt) for name, fmt in self.formats.items()}

    @classmethod
    def read(
        cls,
        formats: Any,
        tensors: Mapping[str, Tensor],
        weights: Mapping[str, Tensor],
        source: str,
    ) -> TrainedRounding:
        """The inverse of `formats_json` and `tensors`, for a model of these weights.

        Raises CheckpointError with every matrix that does not fit.
        """
        try:
            known = decode(dict[str, BlockFormat], formats, error=CheckpointError, source=source)
        except OptionError as e:  # bits or blocks that there are not
            raise CheckpointError(f"a valid {source}", found=str(e), do=_RESTORE) from e
        parts = [{n: tensors.get(prefix + n) for n in known} for prefix in _PREFIXES]
        matrices = {n: w for n in known if (w := weights.get(parameter_of(n))) is not None}
        faults = [f"{name} is unknown" for name in known.keys() - matrices.keys()]
        faults += [f"{name} is unknown" for name in tensors if name.partition("/")[2] not in known]
        for name, weight in matrices.items():
            if not _fit([part[name] for part in parts], name, weight, known[name]):
                faults.append(f"the positions or scales of {name} do not fit")
        if faults:
            raise CheckpointError(
                f"positions and scales for the matrices in {source}",
                found="; ".join(sorted(faults)),
                do=_RESTORE,
            )
        found = ({n: t for n, t in part.items() if t is not None} for part in parts)
        return cls(known, *found)


_PREFIXES = (POSITION_PREFIX, SCALE_PREFIX, _SIGN_PREFIX)
_RESTORE = "restore the checkpoint"


def _fit(tensors: Iterable[Tensor | None], name: str, weight: Tensor, fmt: BlockFormat) -> bool:
    """Whether there is a number for each weight and two for each block, all finite, and the blocks
    are symmetric."""
    if weight.ndim != 2 or not fmt.symmetric:
        return False
    rows, columns = shape_of(name, (weight.shape[0], weight.shape[1]))
    blocks = (rows, -(-columns // fmt.block_size))
    wanted = ((rows, columns), blocks, blocks)
    return all(
        tensor is not None and tensor.shape == shape and bool(tensor.isfinite().all())
        for tensor, shape in zip(tensors, wanted, strict=True)
    )


def _integers(matrix: BlockMatrix) -> Float:
    """The integers of a symmetric matrix [rows, columns], zero in the middle."""
    values = unpack(matrix.packed, matrix.format.bits).astype(np.float32) - matrix.format.zero
    rows: Float = values.reshape(len(values), -1)[:, : matrix.columns]
    return rows


def _stored(scales: Tensor) -> Tensor:
    """What a `Grid` makes of them; gradients pass as if they were the scales themselves."""
    largest, plain = torch.finfo(torch.float16).max, scales.detach()
    return scales + (plain.clamp(-largest, largest).half().float() - plain)


class _Snap(torch.autograd.Function):
    """Positions to the integers from -zero to zero - 1; beyond them nothing pulls."""

    @staticmethod
    def forward(ctx: Any, positions: Tensor, zero: int) -> Tensor:
        ctx.save_for_backward((positions >= -zero - 0.5) & (positions <= zero - 0.5))
        return positions.round().clamp_(-zero, zero - 1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (inside,) = ctx.saved_tensors
        return grads[0] * inside, None


def hidden_and_head(
    model: GPT,
    rounding: TrainedRounding | None,
    ids: Tensor,
    positions: Tensor | None = None,
    attend: Attend | None = None,
) -> tuple[Tensor, Tensor]:
    """`model.hidden(...)` and the matrix that makes logits of it, as rounding leaves them."""
    if rounding is None:
        return model.hidden(ids, positions, attend), model.lm_head.weight
    weights = rounding.weights()
    named = {f"model.{name}": weight for name, weight in weights.items()}
    hidden: Tensor = torch.func.functional_call(_Hidden(model), named, (ids, positions, attend))
    return hidden, weights.get(head_parameter(model.config), model.lm_head.weight)


class _Hidden(nn.Module):
    """`GPT.hidden` as a module's forward, which is what functional_call can call."""

    def __init__(self, model: GPT) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, positions: Tensor | None, attend: Attend | None) -> Tensor:
        return self.model.hidden(ids, positions, attend)
