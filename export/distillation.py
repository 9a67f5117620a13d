"""Learning from a teacher: to predict as it does, and to get there as it does.

What counts is that the predictions diverge little from the teacher's. But of any one weight the
divergence at a few places of a text says mostly chance. So blocks can be held to what the teacher's
give as well, each difference at what it costs on the mean over many texts (`fisher`): that says the
same with less of chance, and once for every block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from gptrt.errors import CheckpointError

from .checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from .files import read_tensors, save_tensors
from .loss import Lesson, state_divergence
from .model import GPT, Attend

TEACHER_FOLDER = "teacher"  # of a run
_COSTS_FILE = "costs.safetensors"


@dataclass(frozen=True)
class Shown:
    """Of a text: what the teacher's head reads, [batch, seq, n_embd], and what each block gives."""

    hidden: Tensor
    outputs: list[Tensor]


@dataclass(frozen=True)
class Teacher:
    """`costs` are the Fisher matrices [n_embd, n_embd] of what each block gives, or none where only
    the predictions are to be learnt."""

    model: GPT
    costs: list[Tensor]

    @classmethod
    def open(cls, run: Path, device: torch.device) -> Teacher:
        """That of a run. Raises CheckpointError."""
        folder = run / TEACHER_FOLDER
        model = load_checkpoint(folder).frozen().to(device)
        file, width = folder / _COSTS_FILE, model.config.n_embd
        if not file.is_file():
            return cls(model, [])
        found = dict(read_tensors(file))
        names = list(map(str, range(len(model.h))))
        if found.keys() != set(names) or any(c.shape != (width, width) for c in found.values()):
            raise CheckpointError(
                f"{len(model.h)} matrices of {width} by {width} in {file}",
                found=", ".join(f"{name} {list(cost.shape)}" for name, cost in found.items()),
                do="restore the run",
            )
        return cls(model, [found[name].to(device) for name in names])

    @torch.no_grad()
    def show(self, ids: Tensor, positions: Tensor | None, attend: Attend | None) -> Shown:
        outputs: list[Tensor] = []
        return Shown(self.model.hidden(ids, positions, attend, outputs), outputs)

    def lesson(self, hidden: Tensor, share: float) -> Lesson:
        """To predict what the teacher does where its head reads `hidden` [tokens, n_embd]."""
        return Lesson(hidden, self.model.lm_head.weight, share)

    def astray(self, outputs: Sequence[Tensor], shown: Shown) -> Tensor:
        """What it costs that blocks give `outputs` instead, nats on the mean over the blocks."""
        return state_divergence(outputs, shown.outputs, self.costs)


def save_teacher(run: Path, checkpoint: Checkpoint) -> None:
    save_checkpoint(checkpoint.alone(), run / TEACHER_FOLDER)


def save_costs(run: Path, costs: Sequence[Tensor]) -> None:
    """Beside a teacher that is there."""
    if costs:
        named = {str(layer): cost for layer, cost in enumerate(costs)}
        save_tensors(named, run / TEACHER_FOLDER / _COSTS_FILE)
