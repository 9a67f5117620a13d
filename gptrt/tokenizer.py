"""Text to ids and back, and text that leaves whole: no half character, no half stop string."""

from __future__ import annotations

import codecs
import copy
from collections.abc import Container, Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from gptrt.chat import ChatTemplate
from gptrt.errors import BundleError, PromptError
from gptrt.format import CONFIG_FILE, GENERATION_CONFIG_FILE, TOKENIZER_FILE, Bundle
from gptrt.schema import read_json
from gptrt.spelling import fallback_byte

if TYPE_CHECKING:
    import tokenizers

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class StreamDecoder(Protocol):
    """Turns ids into text one by one. The pieces and the flush joined are `decode` of all ids; but
    where bytes follow one another that are no text together, `decode` may give up all of them, and
    here the characters that were whole have left already."""

    def push(self, token: int) -> str:
        """The text that is whole now; "" where a character is still incomplete."""

    def flush(self) -> str:
        """What is left at the end; an incomplete character becomes U+FFFD."""


class Tokenizer:
    """A `tokenizer.json`. `eos_token_ids` end a text; they are never part of it.

    It never changes after it is made: threads may share one. `token_bytes(id)` gives the bytes
    that a byte-level token stands for.
    """

    def __init__(
        self,
        inner: tokenizers.Tokenizer,
        eos_token_ids: Iterable[int] = (),
        chat_template: ChatTemplate | None = None,
    ) -> None:
        inner.no_truncation()
        inner.no_padding()
        self._inner = inner
        self.eos_token_ids = tuple(eos_token_ids)
        self.chat_template = chat_template
        added = inner.get_added_tokens_decoder()
        self._special = frozenset(i for i, token in added.items() if token.special)
        self.token_bytes = cache(self._spelled)  # a stream asks for the same few again and again

    @classmethod
    def open(cls, bundle: Bundle) -> Tokenizer:
        """The tokenizer of a bundle. Raises BundleError if its file cannot be read."""
        listed = bundle.manifest.files
        return cls.read(bundle.file(TOKENIZER_FILE), _read_eos_token_ids(bundle), listed)

    @classmethod
    def read(
        cls, path: Path, eos_token_ids: Iterable[int], listed: Container[str] | None = None
    ) -> Tokenizer:
        """A `tokenizer.json`, with the chat template beside it, if that is `listed`. Raises
        BundleError if it cannot be read."""
        from tokenizers import Tokenizer as Inner

        try:
            inner = Inner.from_file(str(path))
        except BaseException as e:
            _pass_on(e)
            raise BundleError(
                f"a tokenizer in {path}", found=str(e), do="export the bundle again"
            ) from e
        return cls(inner, eos_token_ids, ChatTemplate.read(path.parent, listed))

    def endless(self) -> Tokenizer:
        """The same, with no id that ends a text: for measuring and for comparing ids."""
        return self.ending_with(())

    @property
    def end(self) -> int | None:
        """The id that training closes a text with."""
        return next(iter(self.eos_token_ids), None)

    def ending_with(self, eos_token_ids: Iterable[int]) -> Tokenizer:
        """The same, with other ids that end a text."""
        twin = copy.copy(self)
        twin.eos_token_ids = tuple(eos_token_ids)
        return twin

    @property
    def vocab_size(self) -> int:
        return self._inner.get_vocab_size()

    def words(self) -> dict[str, int]:
        """Every entry of the vocabulary with its id."""
        return self._inner.get_vocab()

    def encode(self, text: str, *, whole: bool = True) -> list[int]:
        """The ids of a text. Raises PromptError if a character has none.

        A `whole` text gets what its tokenizer puts around texts; what is written already, or is
        only a part, must not.
        """
        try:
            return self._inner.encode(text, add_special_tokens=whole).ids
        except BaseException as e:
            _pass_on(e)
            raise PromptError(
                "text that this tokenizer knows", found=str(e), do="leave such characters out"
            ) from e

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, special tokens left out."""
        return self._inner.decode(ids)

    def stream_decoder(self) -> StreamDecoder:
        """A decoder for one text."""
        from tokenizers.decoders import ByteLevel

        return _ByteStream(self) if isinstance(self._inner.decoder, ByteLevel) else _Window(self)

    def fallback_byte(self, token: int) -> bytes:
        """The byte that a token like <0xE2> stands for; nothing for any other token."""
        name = self._inner.id_to_token(token)
        if name is None or not name.startswith("<0x"):
            return b""
        return fallback_byte(name, self._inner.decode([token]))

    def _spelled(self, token: int) -> bytes:
        """The bytes that a byte-level token stands for; none for a special or unknown one."""
        name = None if token in self._special else self._inner.id_to_token(token)
        if name is None:
            return b""
        values = byte_values()
        try:
            return bytes([values[character] for character in name])
        except KeyError:  # an added token, spelled as it is
            return name.encode()


class _ByteStream:
    """For byte-level tokenizers: a token is bytes, and UTF-8 says when they are whole."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._token_bytes = tokenizer.token_bytes
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        return self._utf8.decode(self._token_bytes(token))

    def flush(self) -> str:
        return self._utf8.decode(b"", final=True)


class _Window:
    """For any other tokenizer: what a few ids add to the text of the few before them.

    A token's text may depend on its neighbour (a space at the very beginning, bytes of one
    character), so the text of the last piece is decoded again with each new id, and no more.
    Whether a character is whole is said by its bytes, where tokens stand for single ones; U+FFFD
    may be a character of the text.
    """

    _LONGEST = 4  # tokens that one character can take: its bytes in UTF-8

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._decode, self._byte = tokenizer.decode, tokenizer.fallback_byte
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._before: list[int] = []
        self._new: list[int] = []
        self._whole = 0  # of the new ones, those before a character that is not whole

    def push(self, token: int) -> str:
        self._new.append(token)
        if byte := self._byte(token):
            self._utf8.decode(byte)
            if self._utf8.getstate()[0]:
                return ""
        else:
            self._utf8.reset()
        text, tokens = self._added(), len(self._new) - self._whole
        if text.endswith(_REPLACEMENT) and not byte and tokens < self._LONGEST:
            return ""
        self._whole = len(self._new)
        if text:
            self._before, self._new, self._whole = self._new, [], 0
        return text

    def flush(self) -> str:
        return self._added() if self._new else ""

    def _added(self) -> str:
        return self._decode(self._before + self._new)[len(self._decode(self._before)) :]


class StopStrings:
    """Ends a text before the first of `stops`, wherever the borders of its pieces are.

    Text that could be the beginning of a stop string is held back until that is decided, so no
    part of one ever leaves. `fired` names the one that ended the text.

    >>> stop = StopStrings(["END"])
    >>> [stop.push("one E"), stop.push("N"), stop.push("D two")], stop.fired
    (['one ', '', ''], 'END')
    """

    def __init__(self, stops: Iterable[str]) -> None:
        self._stops = tuple(stops)
        self._longest = max(map(len, self._stops), default=0)
        self._held = ""
        self.fired: str | None = None

    def push(self, text: str) -> str:
        """The part of the text so far that is free to leave now."""
        if not self._stops:
            return text
        text, self._held = self._held + text, ""
        # The first to be complete; of two complete at once, the longer.
        ends = [(at + len(s), at, s) for s in self._stops if (at := text.find(s)) >= 0]
        if ends:
            _, start, self.fired = min(ends)
            return text[:start]
        free = len(text) - self._undecided(text)
        self._held = text[free:]
        return text[:free]

    def flush(self) -> str:
        """What was held back in vain."""
        held, self._held = self._held, ""
        return held

    def _undecided(self, text: str) -> int:
        """The length of the longest end of `text` that begins a stop string."""
        lengths = range(min(len(text), self._longest - 1), 0, -1)
        return next((n for n in lengths if any(s.startswith(text[-n:]) for s in self._stops)), 0)


def _pass_on(error: BaseException) -> None:
    """What is not the library's. It raises no class narrower than Exception, and a panic in Rust
    is not even that."""
    if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
        raise error


@cache
def byte_values() -> dict[str, int]:
    """The bytes that GPT-2 spells as characters: printable ones as themselves, others from U+0100.

    https://github.com/openai/gpt-2/blob/master/src/encoder.py
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


def _read_eos_token_ids(bundle: Bundle) -> tuple[int, ...]:
    """`eos_token_id` of generation_config.json, else of config.json: none, one, or several."""
    for name in (GENERATION_CONFIG_FILE, CONFIG_FILE):
        if name in bundle.manifest.files:
            value = _eos_token_id(bundle.file(name))
            if value is not None:
                ids = value if isinstance(value, list) else [value]
                return tuple(_checked(i, bundle, name) for i in ids)
    return ()


def _eos_token_id(path: Path) -> Any:
    config = read_json(path, error=BundleError)
    return config.get("eos_token_id") if isinstance(config, dict) else None


def _checked(token: Any, bundle: Bundle, name: str) -> int:
    vocab_size = bundle.manifest.model.vocab_size
    if type(token) is not int or not 0 <= token < vocab_size:
        raise BundleError(
            f"eos_token_id in {bundle.file(name)} from 0 to {vocab_size - 1}",
            found=repr(token),
            do="export the bundle again",
        )
    return token
