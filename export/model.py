"""The model: one decoder-only GPT for training, for fine-tuning and for export.

Parameters bear the names of GPT-2's own checkpoints (`wte`, `c_attn`, `mlp.c_fc` ...), also
where a Llama-like family stores the same matrix in parts: `c_attn` holds query, key and value
one below the other, and with SwiGLU `c_fc` holds gate and up.

What differs between training and export is attention alone, so attention is a value that
`GPT.forward` receives: `CausalAttention` here, the graph's cached attention in `graph.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from gptrt.architecture import ModelConfig

from .rotary import rotary_frequencies

# (layer, query | key | value [batch, seq, (n_head + 2 * n_kv_head) * head_dim])
# -> what the heads gathered: [batch, seq, n_head * head_dim]
Attend = Callable[[int, Tensor], Tensor]


class Attention(nn.Module):
    """Projections around `attend`: one matrix in, one matrix out."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        width, kv_width = config.n_head * config.head_dim, config.n_kv_head * config.head_dim
        biases = _either(config.qkv_bias, config.bias), _either(config.out_bias, config.bias)
        self.c_attn = nn.Linear(config.n_embd, width + 2 * kv_width, bias=biases[0])
        self.c_proj = nn.Linear(width, config.n_embd, bias=biases[1])
        if config.qk_norm:
            eps = config.norm_eps * (config.true_head_dim or config.head_dim) / config.head_dim
            self.q_norm = nn.RMSNorm(config.head_dim, eps=eps)
            self.k_norm = nn.RMSNorm(config.head_dim, eps=eps)

    def forward(self, x: Tensor, attend: Callable[[Tensor], Tensor]) -> Tensor:
        packed = self.c_attn(x)
        if self.config.qk_norm:
            packed = self._normalize_heads(packed)
        projected: Tensor = self.c_proj(attend(packed))
        return projected

    def _normalize_heads(self, packed: Tensor) -> Tensor:
        config = self.config
        heads = packed.view(*packed.shape[:2], -1, config.head_dim)  # [batch, seq, heads, dim]
        counts = [config.n_head, config.n_kv_head, config.n_kv_head]
        query, key, value = torch.split(heads, counts, dim=-2)
        return torch.cat((self.q_norm(query), self.k_norm(key), value), dim=-2).flatten(-2)


class FeedForward(nn.Module):
    """GELU as in GPT-2, ReLU as in OPT, SwiGLU (https://arxiv.org/abs/2002.05202) as in Llama."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.activation = config.activation
        fan_out = 2 * config.n_inner if config.activation == "swiglu" else config.n_inner
        bias = _either(config.mlp_bias, config.bias)
        self.c_fc = nn.Linear(config.n_embd, fan_out, bias=bias)
        self.c_proj = nn.Linear(config.n_inner, config.n_embd, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        projected: Tensor = self.c_proj(self._activate(self.c_fc(x)))
        return projected

    def _activate(self, x: Tensor) -> Tensor:
        if self.activation == "swiglu":
            gate, up = x.chunk(2, dim=-1)  # each [batch, seq, n_inner]
            return F.silu(gate) * up
        if self.activation == "relu":
            return F.relu(x)
        return F.gelu(x, approximate="tanh" if self.activation == "gelu_tanh" else "none")


def _either(own: bool | None, general: bool) -> bool:
    return general if own is None else own


def head_parameter(config: ModelConfig) -> str:
    """The matrix that makes logits, by the name under which it is stored: tied, the embedding's."""
    return "wte.weight" if config.tied else "lm_head.weight"


def make_norm(config: ModelConfig) -> nn.Module:
    if config.norm == "rmsnorm":
        return nn.RMSNorm(config.n_embd, eps=config.norm_eps)
    return nn.LayerNorm(config.n_embd, eps=config.norm_eps, bias=config.bias)


class Block(nn.Module):
    """Pre-norm residual block: attention, then feed-forward, or both side by side."""

    def __init__(self, config: ModelConfig, dropout: float) -> None:
        super().__init__()
        self.parallel = config.parallel
        self.ln_1 = make_norm(config)
        self.attn = Attention(config)
        self.ln_2 = make_norm(config)
        self.mlp = FeedForward(config)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, attend: Callable[[Tensor], Tensor]) -> Tensor:
        attended = x + self.dropout(self.attn(self.ln_1(x), attend))
        read = x if self.parallel else attended
        out: Tensor = attended + self.dropout(self.mlp(self.ln_2(read)))
        return out


class GPT(nn.Module):
    """Decoder-only transformer; `config` says which family."""

    def __init__(self, config: ModelConfig, dropout: float = 0.0) -> None:
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        if config.positions == "learned":
            self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.h = nn.ModuleList(Block(config, dropout) for _ in range(config.n_layer))
        self.ln_f = make_norm(config)
        if config.projected:
            self.project_out = nn.Linear(config.n_embd, config.n_embd, bias=False)
            if config.tied:
                self.project_in = nn.Linear(config.n_embd, config.n_embd, bias=False)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.dropout = nn.Dropout(dropout)
        if config.tied:
            self.lm_head.weight = self.wte.weight
        self._initialize()

    @classmethod
    def outline(cls, config: ModelConfig) -> GPT:
        """Names and shapes alone: its parameters hold no numbers (PyTorch's meta device)."""
        with torch.device("meta"), _Unfilled():
            return cls(config)

    def forward(
        self, ids: Tensor, positions: Tensor | None = None, attend: Attend | None = None
    ) -> Tensor:
        """Logits [batch, seq, vocab] for ids [batch, seq]."""
        logits: Tensor = self.lm_head(self.hidden(ids, positions, attend))
        return logits

    def hidden(
        self, ids: Tensor, positions: Tensor | None = None, attend: Attend | None = None
    ) -> Tensor:
        """What the head reads: [batch, seq, n_embd]. Positions count from 0 if not given."""
        return self.to_head(self.states(self.embed(ids, positions), attend))

    def states(self, x: Tensor, attend: Attend | None = None) -> Tensor:
        """The last hidden states [batch, seq, n_embd], in the model's own basis, of what the first
        block reads."""
        attend = attend or CausalAttention(self.config)
        for layer, block in enumerate(self.h):
            x = block(x, partial(attend, layer))
        normed: Tensor = self.ln_f(x)
        return normed

    def to_head(self, states: Tensor) -> Tensor:
        """What the head reads, of the last hidden states."""
        read: Tensor = self.project_out(states) if self.config.projected else states
        return read

    def embed(self, ids: Tensor, positions: Tensor | None = None) -> Tensor:
        """What the first block reads: [batch, seq, n_embd]."""
        x: Tensor = self.wte(ids)
        if self.config.projected and self.config.tied:
            x = self.project_in(x)
        if self.config.positions == "learned":
            if positions is None:
                positions = torch.arange(ids.shape[1], device=ids.device)
            x = x + self.wpe(positions)
        dropped: Tensor = self.dropout(x)
        return dropped

    def _initialize(self) -> None:
        """GPT-2's initialization: N(0, 0.02), projections into the residual stream scaled down
        by the square root of how many of them add up."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        for name, parameter in self.named_parameters():
            if name.endswith("c_proj.weight"):
                nn.init.normal_(parameter, std=0.02 / (2 * self.config.n_layer) ** 0.5)


@lru_cache(maxsize=64)  # an outline takes milliseconds, and whoever plans asks for every plan
def parameter_shapes(config: ModelConfig) -> Mapping[str, torch.Size]:
    """The shape of every parameter of such a model by its name, of a tied one once."""
    named = GPT.outline(config).named_parameters()
    return MappingProxyType({name: parameter.shape for name, parameter in named})


class _Unfilled(TorchFunctionMode):
    """Leaves out what fills parameters, which takes its time, and PyTorch's compiler, even where
    there is nothing to fill."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == nn.init.__name__:
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


class CausalAttention:
    """Attention over the sequence itself: PyTorch's kernel, rotary positions where wanted."""

    def __init__(self, config: ModelConfig, segments: Tensor | None = None) -> None:
        """`segments` [batch, seq] number the texts that stand in a row: none sees another."""
        self.config = config
        self._segments = segments
        self._rotary: tuple[Tensor, Tensor] | None = None  # the same for every layer
        self._masks: dict[int, Tensor] = {}  # by window

    def __call__(self, layer: int, packed: Tensor) -> Tensor:
        query, key, value = self.heads(packed, layer)
        mask = self._mask(query, self.config.window_of(layer))
        y = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            is_causal=mask is None,
            scale=attention_scale(self.config),
            enable_gqa=self.config.n_head != self.config.n_kv_head,
        )
        return y.transpose(1, 2).flatten(2)  # [batch, seq, n_head * head_dim]

    def _mask(self, query: Tensor, window: int) -> Tensor | None:
        """Which positions see which, [seq, seq] or [batch, 1, seq, seq]; None: all before them."""
        if not window and self._segments is None:
            return None
        if window not in self._masks:
            mask = window_mask(query, window or query.shape[2])
            if self._segments is not None:
                same = self._segments[:, :, None] == self._segments[:, None, :]
                mask = (mask & same)[:, None]
            self._masks[window] = mask
        return self._masks[window]

    def heads(self, packed: Tensor, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value, rotated where wanted, each [batch, heads, seq, head_dim]."""
        config = self.config
        heads = packed.view(*packed.shape[:2], -1, config.head_dim).transpose(1, 2)
        counts = [config.n_head, config.n_kv_head, config.n_kv_head]
        query, key, value = torch.split(heads, counts, dim=1)
        if config.positions == "rotary" and layer not in config.unrotated:
            cos, sin = self._tables(query)
            query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        return query, key, value

    def _tables(self, query: Tensor) -> tuple[Tensor, Tensor]:
        if self._rotary is None:
            cos, sin = rotary_tables(self.config, query.shape[2])
            self._rotary = cos.to(query), sin.to(query)
        return self._rotary


def attention_scale(config: ModelConfig) -> float:
    """What products of query and key are multiplied with."""
    return 1 / math.sqrt(config.true_head_dim or config.head_dim)


def window_mask(query: Tensor, window: int) -> Tensor:
    """Which positions [seq, seq] see which: `window` of them, itself the last."""
    seq = query.shape[2]
    at = torch.arange(seq, device=query.device)
    behind = at[:, None] - at
    return (behind >= 0) & (behind < window)


def rotary_tables(config: ModelConfig, length: int) -> tuple[Tensor, Tensor]:
    """Cosine and sine [length, head_dim / 2] of RoPE (https://arxiv.org/abs/2104.09864).

    Pairs beyond `rotary_dim` have frequency 0: they are turned by nothing.
    """
    frequencies, factor = rotary_frequencies(config)
    padded = F.pad(frequencies, (0, config.head_dim // 2 - len(frequencies)))
    angles = torch.outer(torch.arange(length, dtype=torch.float64), padded)
    turned = torch.arange(config.head_dim // 2) < len(frequencies)
    scale = torch.where(turned, factor, 1.0)
    return (angles.cos() * scale).float(), (angles.sin() * scale).float()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (i, i + head_dim/2) of x [batch, head, seq, dim], as Llama stores them."""
    left, right = x.chunk(2, dim=-1)
    return torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1)
