"""A checkpoint behind the runtime's loop: PyTorch in fp32 where a bundle has its graph.

`Generator` then does with a checkpoint all that it does with a bundle, so both are evaluated, and
listened to, in one way.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gptrt.architecture import ModelConfig
from gptrt.cache import KVCache
from gptrt.decoder import Hidden, Ids, Logits, check_capacity
from gptrt.errors import PromptError
from gptrt.generator import Generator
from gptrt.interrupt import Interrupt
from gptrt.tokenizer import Tokenizer

from .checkpoint import Checkpoint
from .model import GPT, CausalAttention, attention_scale, rotary_tables


def open_checkpoint_generator(checkpoint: Checkpoint) -> Generator:
    """A generator over a checkpoint in memory, which it shares. Raises CheckpointError if there is
    no tokenizer."""
    words = tokenizer_of(checkpoint)
    decoder = TorchDecoder(checkpoint.alone().frozen())
    return Generator.from_parts(decoder, words, task=checkpoint.task)


def tokenizer_of(checkpoint: Checkpoint) -> Tokenizer:
    """As the runtime reads it. Raises CheckpointError if there is none."""
    eos, template = checkpoint.special.eos, checkpoint.chat_template
    return Tokenizer(checkpoint.words(), eos, chat_template=template)


class TorchDecoder:
    """A model as `gptrt.reading.Runner`, on the device and in the dtype of its parameters.

    It puts the model into evaluation mode. Unlike a graph it reads several ids at once also where
    rows are filled to different lengths. An interrupt ends a call between passes, not within one.
    """

    def __init__(self, model: GPT) -> None:
        self.model = model.eval()
        self.context = model.config.n_positions
        self.vocab_size = model.config.vocab_size

    @property
    def fingerprint(self) -> str:
        """A hash of shape and parameters, computed when it is asked for: they may be trained on."""
        digest = hashlib.sha256(repr(self.model.config).encode())
        for name, parameter in self.model.named_parameters():
            digest.update(name.encode())
            digest.update(parameter.detach().cpu().numpy().tobytes())
        return digest.hexdigest()

    def new_cache(self, capacity: int, batch: int = 1) -> KVCache:
        """An empty cache for `capacity` positions in each of `batch` rows. Raises PromptError."""
        check_capacity(capacity, self.context)
        config, weight = self.model.config, self.model.wte.weight
        shape = (batch, config.n_kv_head, capacity, config.head_dim)
        # Zeros, for a position that is not seen is multiplied with 0, which no NaN survives.
        values = [weight.new_zeros(shape) for _ in range(2 * config.n_layer)]
        rotary = None
        if config.positions == "rotary":
            cos, sin = rotary_tables(config, capacity)
            rotary = cos.to(weight), sin.to(weight)
        return KVCache.empty(batch, capacity, _Buffers(values, rotary))

    def cache_bytes(self, capacity: int, batch: int = 1) -> int:
        """Of keys and values in `new_cache`."""
        config = self.model.config
        position = config.n_kv_head * config.head_dim * self.model.wte.weight.element_size()
        return 2 * config.n_layer * batch * capacity * position

    def run(
        self,
        ids: Ids | Sequence[Sequence[int]],
        cache: KVCache,
        *,
        keep: int = 1,
        interrupt: Interrupt | None = None,
    ) -> Logits:
        """Read ids [batch, new] after what each row of `cache` holds: logits float32
        [batch, kept, vocab], of the last `keep` positions, all of them where it is 0. Raises
        PromptError, and Interrupted, which leaves the cache as it was."""
        states = self._read(ids, cache, interrupt)[:, -keep:]  # [batch, kept, n_embd]
        with torch.no_grad():
            logits: Logits = self.model.lm_head(self.model.to_head(states)).float().cpu().numpy()
        return logits

    def hidden_states(
        self, ids: Sequence[int], cache: KVCache, *, interrupt: Interrupt | None = None
    ) -> Hidden:
        """Read ids in a cache of one row: the last hidden state of each, float32 [new, n_embd]."""
        hidden: Hidden = self._read([ids], cache, interrupt)[0].float().cpu().numpy()
        return hidden

    @torch.no_grad()
    def _read(
        self, ids: Ids | Sequence[Sequence[int]], cache: KVCache, interrupt: Interrupt | None
    ) -> Tensor:
        """The last hidden states: [batch, new, n_embd]."""
        new = _check_room(ids, cache)
        if interrupt is not None:
            interrupt.check()
        device = self.model.wte.weight.device
        starts = torch.tensor([row.length for row in cache.filled], device=device)
        positions = starts[:, None] + torch.arange(new, device=device)  # [batch, new]
        buffers: _Buffers = cache.buffers  # type: ignore[assignment]
        attend = _CachedAttention(self.model.config, buffers, positions, cache.length + new)
        tokens = torch.from_numpy(np.array(ids, np.int64)).to(device)
        states = self.model.states(self.model.embed(tokens, positions), attend)
        cache.advance(new)
        return states


def _check_room(ids: Ids | Sequence[Sequence[int]], cache: KVCache) -> int:
    """How many ids each row gets. Raises PromptError if they do not fit."""
    counts, room = {len(row) for row in ids}, cache.capacity - cache.length
    if len(ids) != cache.batch or len(counts) != 1 or not 1 <= min(counts) <= room:
        raise PromptError(
            f"1 to {room} more tokens in each of {cache.batch} rows, equally many",
            found=f"{', '.join(str(len(row)) for row in ids)}",
            do="make the cache as large as prompt and new tokens together",
        )
    return counts.pop()


class _Buffers:
    """Keys and values of every layer in turn, [batch, kv_heads, capacity, head_dim] each, and the
    rotary tables [capacity, head_dim / 2] that all rows share."""

    def __init__(self, values: list[Tensor], rotary: tuple[Tensor, Tensor] | None) -> None:
        self.values, self.rotary = values, rotary

    def rows(self, start: int, stop: int) -> _Buffers:
        return _Buffers([tensor[start:stop] for tensor in self.values], self.rotary)

    def copy_row(self, source: _Buffers, start: int, stop: int) -> None:
        for tensor, other in zip(self.values, source.values, strict=True):
            tensor[0, :, start:stop] = other[0, :, start:stop]

    def read(self, length: int) -> bytes:
        parts = (tensor[0, :, :length].cpu().numpy().tobytes() for tensor in self.values)
        return b"".join(parts)

    def write(self, data: bytes, length: int) -> None:
        at = 0
        for tensor in self.values:
            target = tensor[0, :, :length]
            size = target.numel() * target.element_size()
            if at + size > len(data):
                break
            part = torch.frombuffer(bytearray(data[at : at + size]), dtype=tensor.dtype)
            target.copy_(part.view(target.shape))
            at += size
        wanted = sum(t[0, :, :length].numel() * t.element_size() for t in self.values)
        if wanted != len(data):
            raise ValueError(f"{len(data)} bytes instead of {wanted}")


class _CachedAttention(CausalAttention):
    """Attention of new ids over what a cache holds and over themselves.

    Row `n` has its new ids at `positions[n]`, [batch, new]; no row has more than `length`.
    """

    def __init__(
        self, config: ModelConfig, buffers: _Buffers, positions: Tensor, length: int
    ) -> None:
        super().__init__(config)
        self._buffers, self._positions, self._length = buffers, positions, length
        self._rows = torch.arange(len(positions), device=positions.device)[:, None]
        # How far behind the query each key is; negative where it comes later, or is of no one.
        self._behind = positions[..., None] - torch.arange(length, device=positions.device)
        if buffers.rotary is not None:
            cos, sin = (table[positions][:, None] for table in buffers.rotary)
            self._rotary = cos, sin  # [batch, 1, new, head_dim / 2]

    def __call__(self, layer: int, packed: Tensor) -> Tensor:
        query, key, value = self.heads(packed, layer)
        keys, values = (
            self._with_new(cached, new)
            for cached, new in zip(self._buffers.values[2 * layer :], (key, value), strict=False)
        )
        y = F.scaled_dot_product_attention(
            query,
            keys,
            values,
            attn_mask=self._seen(self.config.window_of(layer)),
            scale=attention_scale(self.config),
            enable_gqa=self.config.n_head != self.config.n_kv_head,
        )
        return y.transpose(1, 2).flatten(2)  # [batch, new, n_head * head_dim]

    def _with_new(self, cached: Tensor, new: Tensor) -> Tensor:
        """What is cached, once the new ones [batch, kv_heads, new, head_dim] are in their places:
        [batch, kv_heads, length, head_dim]."""
        cached.transpose(1, 2)[self._rows, self._positions] = new.transpose(1, 2)
        return cached[:, :, : self._length]

    def _seen(self, window: int) -> Tensor:
        """Which keys each query sees, bool [batch, 1, new, length]."""
        seen = self._behind >= 0
        if window:
            seen &= self._behind < window
        return seen[:, None]
