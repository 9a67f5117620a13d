"""What users choose by name, and how to train, as plain data: of presets, of runs, of `--set`. It
imports no PyTorch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from gptrt.schema import bounded

Mode = Literal["int8", "int4", "int2"]
Method = Literal["nearest", "k-quant", "hqq", "gptq", "learned"]
Via = Literal["mobius", "optimum"]


@dataclass(frozen=True)
class OptimizerConfig:
    """Learning rates are peaks, reached after warm-up; `matrix_lr` is Muon's, where a
    model is trained for its rounding, `position_lr` is that of its weights in steps of their grid,
    and `scale_lr` that of the logarithms of the scales. `position_pull` draws weights to the middle
    of their integers, by that share of the way a step at the peak rate, so that noise does not
    gather and turn them to and fro (https://arxiv.org/abs/2203.11086 calls it dampening)."""

    kind: Literal["muon", "adamw"] = "muon"
    lr: float = bounded(0.0, 10.0, default=3e-3)
    matrix_lr: float = bounded(0.0, 10.0, default=0.02)
    position_lr: float = bounded(0.0, 10.0, default=0.006)
    scale_lr: float = bounded(0.0, 10.0, default=1e-3)
    position_pull: float = bounded(0.0, 1.0, default=5e-4)
    weight_decay: float = bounded(0.0, 10.0, default=0.1)
    beta1: float = bounded(0.0, 0.999999, default=0.9)
    beta2: float = bounded(0.0, 0.999999, default=0.95)
    momentum: float = bounded(0.0, 1.0, default=0.95)


@dataclass(frozen=True)
class TrainConfig:
    """How to train. A run ends at `max_steps`, `max_time` seconds or when validation stops gaining.

    `batch_size` windows of `seq_len` tokens make a micro-batch, `grad_accum` micro-batches a step.
    The learning rate rises over `warmup_steps`, then falls along a cosine to `final_lr` of its
    peak.
    """

    seq_len: int = bounded(1, 1 << 20)
    batch_size: int = bounded(1, 1 << 20, default=16)
    grad_accum: int = bounded(1, 1 << 16, default=1)
    max_steps: int = bounded(0, 1 << 40, default=1000)
    max_time: float | None = bounded(0.0, 1e9, default=None)
    warmup_steps: int = bounded(0, 1 << 40, default=50)
    final_lr: float = bounded(0.0, 1.0, default=0.0)
    grad_clip: float = bounded(0.0, 1e9, default=1.0)
    dropout: float = bounded(0.0, 0.99, default=0.0)
    eval_every: int = bounded(1, 1 << 40, default=250)
    eval_tokens: int = bounded(1, 1 << 40, default=1 << 18)
    patience: int | None = bounded(1, 1 << 20, default=None)  # evaluations without a gain
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    compile: bool = False  # by torch.compile: for a card, and where there is a C++ compiler
    seed: int = bounded(0, 1 << 62, default=0)
    distill: float = bounded(0.0, 1e3, default=0.0)  # weight of KL(start || model) in the loss
    average: float = bounded(0.0, 0.999999, default=0.0)  # kept of the mean of weights; 0: no mean
    prompt_share: float = bounded(0.0, 1e3, default=0.0)  # of a task: weight of its prompts' loss
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)

    @property
    def tokens_per_step(self) -> int:
        return self.seq_len * self.batch_size * self.grad_accum
