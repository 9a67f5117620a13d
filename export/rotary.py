"""Rotary frequencies, and how a longer context than the trained one changes them.

Every type but the plain one maps the frequencies theta^(-2i/d) to others, and may scale the
vectors that it turns. Contexts are fixed at export, so a type that looks at the length of the text
("dynamic" NTK) is the plain one within the trained context, and LongRoPE is its short form.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from gptrt.architecture import ModelConfig, RopeScaling


def rotary_frequencies(config: ModelConfig) -> tuple[Tensor, float]:
    """Radians a position of each pair, float64 [rotary_dim / 2], and what cosine and sine are
    multiplied with."""
    dim = config.rotary_dim or config.head_dim
    exponents = torch.arange(0, dim, 2, dtype=torch.float64) / dim
    plain = config.rope_theta**-exponents
    if config.rope_scaling is None:
        return plain, 1.0
    return _SCALINGS[config.rope_scaling.rope_type](plain, config.rope_theta, config.rope_scaling)


def _linear(plain: Tensor, theta: float, scaling: RopeScaling) -> tuple[Tensor, float]:
    """Positions are squeezed (https://arxiv.org/abs/2306.15595)."""
    del theta
    return plain / scaling.factor, scaling.attention_factor or 1.0


def _llama3(plain: Tensor, theta: float, scaling: RopeScaling) -> tuple[Tensor, float]:
    """Slow frequencies are squeezed, fast ones kept, those between blended
    (https://arxiv.org/abs/2407.21783)."""
    del theta
    turns = scaling.original_max_position_embeddings * plain / (2 * math.pi)  # in the context
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - kept) * plain / scaling.factor + kept * plain, scaling.attention_factor or 1.0


def _yarn(plain: Tensor, theta: float, scaling: RopeScaling) -> tuple[Tensor, float]:
    """The same, blended linearly over the pairs (https://arxiv.org/abs/2309.00071)."""
    pairs = len(plain)

    def pair_that_turns(times: float) -> float:
        context = scaling.original_max_position_embeddings
        return 2 * pairs * math.log(context / (times * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair_that_turns(scaling.beta_fast), pair_that_turns(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * pairs - 1)
    width = high - low or 0.001
    squeezed = ((torch.arange(pairs, dtype=torch.float64) - low) / width).clamp(0, 1)
    return plain / scaling.factor * squeezed + plain * (1 - squeezed), _yarn_factor(scaling)


def _yarn_factor(scaling: RopeScaling) -> float:
    if scaling.attention_factor is not None:
        return scaling.attention_factor

    def temperature(mscale: float) -> float:
        return 1.0 if scaling.factor <= 1 else 0.1 * mscale * math.log(scaling.factor) + 1.0

    if scaling.mscale and scaling.mscale_all_dim:
        return temperature(scaling.mscale) / temperature(scaling.mscale_all_dim)
    return temperature(1.0)


def _longrope(plain: Tensor, theta: float, scaling: RopeScaling) -> tuple[Tensor, float]:
    """A divisor for each pair, found by search (https://arxiv.org/abs/2402.13753)."""
    del theta
    factor = scaling.attention_factor
    if factor is None:
        context = scaling.original_max_position_embeddings
        longer = scaling.factor > 1
        factor = math.sqrt(1 + math.log(scaling.factor) / math.log(context)) if longer else 1.0
    return plain / torch.tensor(scaling.short_factor, dtype=torch.float64), factor


_SCALINGS: dict[str, Callable[[Tensor, float, RopeScaling], tuple[Tensor, float]]] = {
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}
