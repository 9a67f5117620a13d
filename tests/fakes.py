"""Stand-ins for a model and a tokenizer: all of generation without a graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import tokenizers
from numpy.typing import NDArray
from tokenizers import decoders, models, pre_tokenizers

from gptrt.cache import KVCache
from gptrt.tokenizer import Tokenizer

EOS = 256
VOCAB = 257  # bytes and the end of text

Predict = Callable[[list[int]], NDArray[np.float32]]


class FakeDecoder:
    """A model that is a function: `predict(ids read so far)` gives the logits of the next id."""

    def __init__(self, predict: Predict, *, context: int = 64) -> None:
        self.predict = predict
        self.context, self.vocab_size = context, VOCAB
        self.passes: list[int] = []  # how many ids each run took

    def new_cache(self, capacity: int, batch: int = 1) -> KVCache:
        return KVCache(batch, capacity, buffers=[])

    def run(
        self, ids: Sequence[Sequence[int]], cache: KVCache, *, keep: int = 1
    ) -> NDArray[np.float32]:
        seen: list[int] = cache.buffers
        del seen[cache.length :]
        seen.extend(int(token) for token in ids[0])
        cache.length = len(seen)
        assert cache.length <= cache.capacity, "the cache is too small for the request"
        self.passes.append(len(ids[0]))
        kept = range(cache.length - (keep or len(ids[0])), cache.length)
        return np.stack([self.predict(seen[: i + 1]) for i in kept])[None]


def favouring(token: int, lead: float = 10.0) -> NDArray[np.float32]:
    """Logits of 0, and of `lead` for one id."""
    logits = np.zeros(VOCAB, np.float32)
    logits[token] = lead
    return logits


def by_heart(text: Sequence[int]) -> Predict:
    """A model that knows one text, prompt included, and then ends it."""
    return lambda seen: favouring([*text, EOS][min(len(seen), len(text))])


def noise(seen: list[int]) -> NDArray[np.float32]:
    """A model without a clear favourite, different after every history."""
    logits = np.random.default_rng(seen).standard_normal(VOCAB).astype(np.float32)
    logits[EOS] = -20
    return logits


def byte_tokenizer(eos_token_ids: Sequence[int] = (EOS,)) -> Tokenizer:
    """Byte-level, one token a byte, the byte's value its id."""
    return Tokenizer(_inner_byte_tokenizer(), eos_token_ids)


def character_tokenizer(characters: str) -> Tokenizer:
    """One token a character, no bytes anywhere."""
    inner = tokenizers.Tokenizer(models.WordLevel({c: i for i, c in enumerate(characters)}))
    inner.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
    inner.decoder = decoders.Fuse()
    return Tokenizer(inner)


def byte_fallback_tokenizer() -> Tokenizer:
    """As Llama's: a space is written U+2581, unknown characters are spelled in bytes."""
    words = ["<unk>", *(f"<0x{b:02X}>" for b in range(256)), *"▁abcdefgh", "▁a"]
    vocabulary = {w: i for i, w in enumerate(words)}
    inner = tokenizers.Tokenizer(
        models.BPE(vocabulary, [("▁", "a")], unk_token="<unk>", byte_fallback=True)
    )
    inner.normalizer = tokenizers.normalizers.Replace(" ", "▁")
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    inner.decoder = decoders.Sequence(steps)
    return Tokenizer(inner)


def unigram_tokenizer() -> Tokenizer:
    """As SentencePiece's Unigram models are kept: pieces with scores, bytes for the rest, a mark
    for each space and one before the text."""
    pieces = [("<unk>", 0.0), *((f"<0x{b:02X}>", -20.0) for b in range(256))]
    pieces += [(c, -5.0) for c in "▁abcdefgh"] + [("▁ab", -6.0), ("ba", -7.0)]
    inner = tokenizers.Tokenizer(models.Unigram(pieces, 0, byte_fallback=True))
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    steps = [decoders.ByteFallback(), decoders.Metaspace()]
    inner.decoder = decoders.Sequence(steps)
    return Tokenizer(inner)


def _inner_byte_tokenizer() -> tokenizers.Tokenizer:
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = (b for b in range(256) if b not in printable)
    vocabulary = {chr(b): b for b in printable}
    vocabulary |= {chr(256 + i): b for i, b in enumerate(others)}
    inner = tokenizers.Tokenizer(models.BPE(vocabulary, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(["<|endoftext|>"])
    return inner
