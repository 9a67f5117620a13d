"""The training loss, computed without ever holding the logits of a whole batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -100  # a target that does not count, as everywhere in PyTorch

# Logits at a time: on a processor 8 MB, which stay in its caches; on a card, where the start of a
# kernel costs more than memory does, 256 MB.
_CHUNK_VALUES = {"cpu": 1 << 21, "cuda": 1 << 26}


@dataclass(frozen=True)
class Lesson:
    """Distillation (https://arxiv.org/abs/1503.02531): `share` times the mean KL divergence in nats
    from softmax(x @ head.T) of a teacher, x [tokens, n_embd]. Nothing flows back to it."""

    x: Tensor
    head: Tensor
    share: float


class _LinearCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of `x @ weight.T`, its gradients taken on the way forward.

    The gradient of the loss by the logits is (softmax - one_hot) / count, known as soon as the
    logits are; so a chunk of rows is multiplied, judged, and multiplied back while it is still in
    the cache, instead of writing and reading [tokens, vocab] four times.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        targets: Tensor | None,
        dtype: torch.dtype,
        lesson: Lesson | None,
        shares: Tensor | None,
    ) -> Tensor:
        told = float(targets is not None)  # the weight of what the text says
        if targets is None:
            targets = torch.zeros(len(x), dtype=torch.long, device=x.device)
        if shares is None:
            counts = targets != IGNORED
            shares = counts / counts.sum().clamp(min=1)
        rows = max(1, _CHUNK_VALUES[x.device.type] // weight.shape[0])
        low = weight.to(dtype)
        grad_x, grad_weight = torch.empty_like(x), torch.zeros_like(weight)
        total = torch.zeros((), device=x.device)
        teacher = x if lesson is None else lesson.x
        chunks = (torch.split(tensor, rows) for tensor in (x, targets, shares, grad_x, teacher))
        for part, answer, share, out, shown in zip(*chunks, strict=True):
            part = part.to(dtype)
            log_probs = F.log_softmax((part @ low.T).float(), dim=-1)  # [rows, vocab]
            index = answer.clamp(min=0).unsqueeze(1)
            losses = -told * log_probs.gather(1, index).squeeze(1)
            probs = None
            if lesson is not None:
                wanted = F.log_softmax((shown.to(dtype) @ lesson.head.to(dtype).T).float(), dim=-1)
                probs = wanted.exp()
                losses += lesson.share * (probs * (wanted - log_probs)).sum(-1)
            total += (losses * share).sum()
            grad = log_probs.exp_()
            if lesson is not None and probs is not None:
                grad.mul_(told + lesson.share).sub_(probs, alpha=lesson.share)
            grad.scatter_add_(1, index, torch.full_like(grad[:, :1], -told))
            grad = grad.mul_(share.unsqueeze(1)).to(dtype)
            torch.mm(grad, low, out=out) if out.dtype == dtype else out.copy_(grad @ low)
            if ctx.needs_input_grad[1]:
                grad_weight += grad.T @ part
        ctx.save_for_backward(grad_x, grad_weight)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None, None, None]:
        grad_x, grad_weight = ctx.saved_tensors
        return grad_x * grads[0], grad_weight * grads[0], None, None, None, None


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor | None,
    dtype: torch.dtype,
    lesson: Lesson | None = None,
    shares: Tensor | None = None,
) -> Tensor:
    """Mean negative log-likelihood in nats of targets [tokens] under softmax(x @ weight.T), plus
    what the lesson adds; without targets, that alone.

    x is [tokens, n_embd], weight [vocab, n_embd]; the products run in `dtype`, the softmax in
    fp32. Targets of `IGNORED` do not count. With `shares` [tokens] it is the sum weighted by them
    instead of the mean.
    """
    loss: Tensor = _LinearCrossEntropy.apply(x, weight, targets, dtype, lesson, shares)  # type: ignore[no-untyped-call]
    return loss
