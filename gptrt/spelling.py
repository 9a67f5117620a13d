"""The bytes that ids stand for in the middle of a text, and the ids of bytes, in every kind of
tokenizer."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, Protocol

_SPECIAL = b"\xff"  # llguidance's mark of tokens that no text spells
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class SpellsIds(Protocol):
    """What a guide needs of a tokenizer: that of `gptrt.tokenizer`."""

    eos_token_ids: tuple[int, ...]
    _inner: Any  # a tokenizers.Tokenizer

    @property
    def token_bytes(self) -> Callable[[int], bytes]: ...


class Spelling:
    """The bytes of ids and the ids of bytes, in the middle of a text, for llguidance to ask."""

    bos_token_id = None

    def __init__(self, tokenizer: SpellsIds, size: int, eos: frozenset[int]) -> None:
        self._encode = tokenizer._inner.encode
        names, special = _names(tokenizer._inner, size)
        self.special_token_ids = sorted(special | eos)
        self.eos_token_id = min(eos, default=None)
        self.tokens = _token_bytes(tokenizer, names)
        # Ids without bytes are never written, and of those with the same bytes only one is.
        texts = ((t, b) for t, b in enumerate(self.tokens) if b and t not in special | eos)
        self.ids = {spelled: token for token, spelled in texts}
        self._longest = max(map(len, self.ids), default=0)
        for token in self.special_token_ids:
            self.tokens[token] = _SPECIAL + names[token].encode()

    def __call__(self, text: bytes) -> list[int]:
        """The ids as the tokenizer gives them, if they mean the same in the middle of a text."""
        try:
            ids: list[int] = self._encode(text.decode(), add_special_tokens=False).ids
            if b"".join(self.tokens[token] for token in ids) == text:
                return ids
        except Exception:  # the library raises no narrower class
            pass
        return self._longest_first(text)

    def sorted(self, key: Callable[[bytes], Any]) -> list[int]:
        """The ids that can be written, by a key of their bytes."""
        return sorted(self.ids.values(), key=lambda token: (key(self.tokens[token]), token))

    def _longest_first(self, text: bytes) -> list[int]:
        """As far as there are ids at all."""
        ids: list[int] = []
        at = 0
        while at < len(text):
            parts = (text[at : at + n] for n in range(self._longest, 0, -1))
            part = next((part for part in parts if part in self.ids), None)
            if part is None:
                break
            ids.append(self.ids[part])
            at += len(part)
        return ids


def _token_bytes(tokenizer: SpellsIds, names: Sequence[str]) -> list[bytes]:
    """What each id adds to a text; nothing for the special, the unknown and the parts of
    characters that no name tells."""
    from tokenizers.decoders import ByteLevel

    inner = tokenizer._inner
    if isinstance(inner.decoder, ByteLevel):
        return [tokenizer.token_bytes(token) for token in range(len(names))]
    before = _anchor(inner, len(names))
    start = len(inner.decode(before))
    texts = inner.decode_batch([[*before, token] for token, name in enumerate(names) if name])
    found = iter(texts)
    return [_spelled(name, next(found)[start:]) if name else b"" for name in names]


def _anchor(inner: Any, size: int) -> list[int]:
    """An id that keeps its text whatever follows, to put others into the middle of a text."""
    for token in range(size):
        text = inner.decode([token])
        if text.isalnum() and inner.decode([token, token]).startswith(text):
            return [token]
    return []


def _spelled(name: str, text: str) -> bytes:
    return fallback_byte(name, text) or (b"" if _REPLACEMENT in text else text.encode())


def fallback_byte(name: str, text: str) -> bytes:
    """What a token like <0xE2> stands for where a tokenizer falls back on bytes, and so gives
    another `text` for it; nothing for any other token."""
    byte = re.fullmatch(r"<0x([0-9A-F]{2})>", name)
    return bytes.fromhex(byte[1]) if byte and text != name else b""


def _names(inner: Any, size: int) -> tuple[list[str], set[int]]:
    """The names of ids, "" where there is none, and those that are special."""
    names = [inner.id_to_token(token) or "" for token in range(size)]
    added = inner.get_added_tokens_decoder()
    return names, {token for token, t in added.items() if t.special and token < size}
