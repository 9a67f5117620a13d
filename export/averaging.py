"""The mean of what parameters were of late (https://arxiv.org/abs/1803.05407): a weight that noise
turns to and fro between two integers of its grid is put where it mostly was."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor


class Average:
    """Of some parameters by name; each step keeps `memory` of the mean so far."""

    def __init__(self, learning: Mapping[str, Tensor], memory: float) -> None:
        self._learning, self._memory = learning, memory
        self._mean = {name: tensor.detach().clone() for name, tensor in learning.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the parameters after so many steps; the first ones are soon forgotten."""
        keep = min(self._memory, step / (step + 9))
        for name, mean in self._mean.items():
            mean.lerp_(self._learning[name], 1.0 - keep)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The mean stands in the place of the parameters."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, mean in self._mean.items():
            parameter = self._learning[name]
            latest = parameter.detach().clone()
            parameter.copy_(mean)
            mean.copy_(latest)
