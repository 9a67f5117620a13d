"""Stand-ins for a model and a tokenizer: all of generation without a graph."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import tokenizers
from numpy.typing import NDArray
from tokenizers import decoders, models, pre_tokenizers

from gptrt.testing import EOS, VOCAB, FakeDecoder, Predict, byte_tokenizer
from gptrt.tokenizer import Tokenizer


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


__all__ = ["EOS", "VOCAB", "FakeDecoder", "byte_tokenizer"]
