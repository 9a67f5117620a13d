"""Text to ids and back; in a stream, only whole characters leave, and no part of a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from gptrt.errors import BundleError, PromptError
from gptrt.format import GENERATION_CONFIG_FILE, TOKENIZER_FILE, Bundle, read_json

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # what a decoder writes for half a character


class Tokenizer:
    """A `tokenizer.json`, and the id that ends a text, if there is one."""

    def __init__(self, path: Path, end: int | None = None) -> None:
        from tokenizers import Tokenizer as Backend  # 40 ms that `import gptrt` must not cost

        try:
            self._backend = Backend.from_str(path.read_text(encoding="utf-8"))
        except Exception as e:  # the library raises plain Exception
            raise BundleError(f"a tokenizer in {path}", found=str(e), do="restore the file") from e
        self.end = end

    @classmethod
    def of(cls, bundle: Bundle) -> Tokenizer:
        """The tokenizer of a bundle."""
        path = bundle.file(GENERATION_CONFIG_FILE)
        config = read_json(path, error=BundleError) if path.is_file() else {}
        end = config.get("eos_token_id") if isinstance(config, dict) else None
        return cls(bundle.file(TOKENIZER_FILE), end if isinstance(end, int) else None)

    @property
    def vocab_size(self) -> int:
        size: int = self._backend.get_vocab_size()
        return size

    def encode(self, text: str) -> list[int]:
        """Ids of a text. Raises PromptError for characters that the tokenizer does not know."""
        try:
            ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        except Exception as e:  # the library raises plain Exception
            raise PromptError(
                "text in characters that the model knows",
                found=f"{text[:40]!r} ({e})",
                do="leave the others out",
            ) from e
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, special tokens left out."""
        text: str = self._backend.decode(list(ids), skip_special_tokens=True)
        return text


class StreamDecoder:
    """Ids in, text out, as soon as it is certain: whole characters only.

    Decodes a short window of ids that starts at a point where the text was whole, so the cost of
    an id does not grow with the text, and takes what the window adds to what was given before.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []  # the last whole part, for context, and what came after it
        self._whole = 0  # how many of _ids are that part
        self._before = ""  # its text

    def feed(self, token: int) -> str:
        """The text that `token` completes, often its own, sometimes none."""
        self._ids.append(token)
        text = self._tokenizer.decode(self._ids)
        if text.endswith(_UNFINISHED):
            return ""
        piece = text[len(self._before) :]
        self._ids = self._ids[self._whole :]
        self._whole = len(self._ids)
        self._before = self._tokenizer.decode(self._ids)
        return piece

    def flush(self) -> str:
        """What is left at the end, half characters as replacement characters."""
        return self._tokenizer.decode(self._ids)[len(self._before) :]


class StopStrings:
    """Holds back text that may be the beginning of a stop string."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.fired: str | None = None

    def feed(self, piece: str) -> str:
        """The text that can leave; once `fired` is set, nothing more may be fed."""
        text = self._held + piece
        found = [(at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            at, self.fired = min(found, key=lambda hit: hit[0])
            self._held = ""
            return text[:at]
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` begin `stop`."""
    return next(
        (n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0
    )
