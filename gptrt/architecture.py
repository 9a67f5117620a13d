"""The shape of a model, as checkpoints, the factory and the manifest of a bundle say it.

Standard library only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from gptrt.schema import bounded

MAX_COUNT = 1 << 24  # no vocabulary, width or context comes near it


@dataclass(frozen=True)
class RopeScaling:
    """Rotary frequencies for a context longer than the one that was trained, under the names that
    Hugging Face's `rope_parameters` give them; what a type does not use stays as it is here.

    `factor` is how many times longer, `original_max_position_embeddings` what was trained.
    `attention_factor` multiplies cosine and sine; None computes it as the type's paper does.
    """

    rope_type: Literal["linear", "llama3", "yarn", "longrope"]
    factor: float = bounded(1e-6, 1e6)
    original_max_position_embeddings: int = bounded(1, MAX_COUNT)
    low_freq_factor: float = bounded(1e-6, 1e6, default=1.0)  # llama3
    high_freq_factor: float = bounded(1e-6, 1e6, default=4.0)
    beta_fast: float = bounded(1e-6, 1e6, default=32.0)  # yarn
    beta_slow: float = bounded(1e-6, 1e6, default=1.0)
    mscale: float | None = bounded(0.0, 1e6, default=None)
    mscale_all_dim: float | None = bounded(0.0, 1e6, default=None)
    truncate: bool = True
    short_factor: tuple[float, ...] = ()  # longrope, a divisor for each frequency
    attention_factor: float | None = bounded(0.0, 1e6, default=None)


@dataclass(frozen=True)
class ModelConfig:
    """One decoder-only GPT: the GPT-2 family, GPT-NeoX, OPT and the Llama-like families.

    Widths are in numbers of values: `n_embd` of the residual stream, `n_inner` of the
    feed-forward layer, `head_dim` of one attention head. `n_kv_head` < `n_head` is
    grouped-query attention (https://arxiv.org/abs/2305.13245).

    `bias` is of every linear layer and LayerNorm; the three after it overrule it for query, key and
    value, for attention's output, and for the feed-forward layer. `parallel` blocks feed attention
    and feed-forward the same input (https://arxiv.org/abs/2204.06745). `qk_norm` normalizes the
    heads of query and key. Of `rotary_dim` values of a head pairs are turned, of all where it is 0;
    layers in `unrotated` have no positions at all. A position sees `window` positions, itself the
    last of them, or all before it where that is 0 and in the layers of `unwindowed`. Where heads
    were padded with zeros for the kernels, `true_head_dim` is what they were: it scales attention.
    `projected` models have their vocabulary in a basis of its own: a matrix [n_embd, n_embd] leads
    there before the head, and back after the embedding where that is `tied` to the head.
    """

    vocab_size: int = bounded(1, MAX_COUNT)
    n_positions: int = bounded(1, MAX_COUNT)
    n_layer: int = bounded(1, 1024)
    n_head: int = bounded(1, 1024)
    n_kv_head: int = bounded(1, 1024)
    n_embd: int = bounded(1, 1 << 18)
    head_dim: int = bounded(1, 4096)
    n_inner: int = bounded(1, 1 << 20)
    positions: Literal["learned", "rotary"] = "learned"
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    activation: Literal["gelu_tanh", "gelu_erf", "relu", "swiglu"] = "gelu_tanh"
    bias: bool = True
    qkv_bias: bool | None = None
    out_bias: bool | None = None
    mlp_bias: bool | None = None
    parallel: bool = False
    qk_norm: bool = False
    tied: bool = True
    projected: bool = False
    norm_eps: float = bounded(0.0, 1.0, default=1e-5)
    rope_theta: float = bounded(1.0, 1e12, default=10000.0)
    rope_scaling: RopeScaling | None = None
    rotary_dim: int = bounded(0, 4096, default=0)
    unrotated: tuple[int, ...] = ()
    window: int = bounded(0, MAX_COUNT, default=0)
    unwindowed: tuple[int, ...] = ()
    true_head_dim: int = bounded(0, 4096, default=0)

    def window_of(self, layer: int) -> int:
        """How many positions a position of this layer sees; 0 is all."""
        return 0 if layer in self.unwindowed or self.window >= self.n_positions else self.window

    def faults(self) -> list[str]:
        """What the bounds of single fields cannot say."""
        found = []
        if self.n_head % self.n_kv_head:
            found.append(f"n_head {self.n_head} is not a multiple of n_kv_head {self.n_kv_head}")
        if self.positions == "rotary" and (self.head_dim % 2 or self.rotary_dim % 2):
            found.append(
                f"head_dim {self.head_dim} or rotary_dim {self.rotary_dim} is odd, rotary "
                "positions need pairs"
            )
        if self.rotary_dim > self.head_dim:
            found.append(f"rotary_dim {self.rotary_dim} is above head_dim {self.head_dim}")
        layers = range(self.n_layer)
        if strange := [n for n in (*self.unrotated, *self.unwindowed) if n not in layers]:
            found.append(f"layers {strange} are not among {self.n_layer}")
        scaling = self.rope_scaling
        pairs = (self.rotary_dim or self.head_dim) // 2
        if scaling and scaling.rope_type == "longrope" and len(scaling.short_factor) != pairs:
            found.append(f"rope_scaling has {len(scaling.short_factor)} factors, wanted {pairs}")
        return found


@dataclass(frozen=True)
class ForeignModel:
    """A decoder whose graph another library built: `architecture` is its `model_type`, `made_with`
    that library and its version."""

    architecture: str
    made_with: str
    vocab_size: int = bounded(1, MAX_COUNT)
    n_positions: int = bounded(1, MAX_COUNT)
