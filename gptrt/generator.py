"""The generator: one loop that gives ids, under a stream of text, under whole texts."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Protocol, Self

import numpy as np

from gptrt.cache import KVCache
from gptrt.config import GenerationConfig
from gptrt.errors import OptionError, PromptError
from gptrt.format import Manifest, open_bundle
from gptrt.sampling import Sampler
from gptrt.session import Device, Ids, Logits, Session
from gptrt.tokenizer import StopStrings, StreamDecoder, Tokenizer

FinishReason = Literal["stop", "length", "time"]
Prompt = str | Sequence[int]

_PREFILL_CHUNK = 512  # tokens of a prompt read at a time: bounds what a long prompt takes of memory


class Runs(Protocol):
    """What the loop asks of a session; a fake of 20 lines can stand in for it."""

    @property
    def manifest(self) -> Manifest: ...

    def new_cache(self, capacity: int, batch: int = 1) -> KVCache: ...

    def run(self, ids: Ids, cache: KVCache, *, keep: int = 1) -> Logits: ...


@dataclass(frozen=True)
class Generation:
    """One finished generation. `ids` are the new ones; `stop_string` is the one that ended it."""

    text: str
    prompt_ids: tuple[int, ...]
    ids: tuple[int, ...]
    finish_reason: FinishReason
    stop_string: str | None = None


@dataclass
class _Progress:
    """What a generation in progress knows about itself; each call has its own."""

    ids: list[int] = field(default_factory=list)
    reason: FinishReason = "length"
    stop_string: str | None = None


class Generator:
    """A bundle, ready to write.

    `path` is a bundle folder; left out, the embedded default serves. `device` is "auto", "cpu" or
    "cuda", `threads` the number of cores to use. Calls share nothing but the read-only weights, so
    threads may call at the same time, and a stream may be left half-read.

    >>> with Generator() as gen:                                             # doctest: +SKIP
    ...     print(gen.generate("Once upon a time", max_new_tokens=20))
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        device: Device = "auto",
        threads: int | None = None,
    ) -> None:
        bundle = open_bundle(path if path is not None else default_bundle())
        self._take(Session(bundle, device=device, threads=threads), Tokenizer.of(bundle))

    @classmethod
    def from_parts(cls, session: Runs, tokenizer: Tokenizer) -> Self:
        """Build from anything that runs; for tests, and for sessions made elsewhere."""
        generator = cls.__new__(cls)
        generator._take(session, tokenizer)
        return generator

    def _take(self, session: Runs, tokenizer: Tokenizer) -> None:
        self._session: Runs | None = session
        self.tokenizer = tokenizer
        self.manifest = session.manifest

    def tokens(
        self, prompt: Prompt, *, config: GenerationConfig | None = None, **options: Any
    ) -> Iterator[int]:
        """New token ids, one by one, as they are computed.

        Options are those of GenerationConfig, by keyword or as one `config`. The closing token is
        not given. Raises OptionError and PromptError at once, before the first id is asked for.
        """
        config = _one_config(config, options)
        return self._loop(self._prompt_ids(prompt), config, _Progress())

    def stream(
        self, prompt: Prompt, *, config: GenerationConfig | None = None, **options: Any
    ) -> Iterator[str]:
        """Pieces of new text: whole characters, never a part of a stop string."""
        config = _one_config(config, options)
        return self._pieces(self._prompt_ids(prompt), config, _Progress())

    def generate(
        self, prompt: Prompt, *, config: GenerationConfig | None = None, **options: Any
    ) -> str:
        """The new text, whole."""
        return self.complete(prompt, config=config, **options).text

    def complete(
        self, prompt: Prompt, *, config: GenerationConfig | None = None, **options: Any
    ) -> Generation:
        """The new text with its ids and why it ended."""
        config, progress = _one_config(config, options), _Progress()
        ids = self._prompt_ids(prompt)
        text = "".join(self._pieces(ids, config, progress))
        new = tuple(progress.ids)
        return Generation(text, tuple(ids), new, progress.reason, progress.stop_string)

    def _pieces(
        self, prompt: list[int], config: GenerationConfig, progress: _Progress
    ) -> Iterator[str]:
        decoder, stops = StreamDecoder(self.tokenizer), StopStrings(config.stop_strings)
        for token in self._loop(prompt, config, progress):
            if piece := stops.feed(decoder.feed(token)):
                yield piece
            if stops.fired is not None:
                progress.reason, progress.stop_string = "stop", stops.fired
                return
        rest = stops.feed(decoder.flush())
        if stops.fired is not None:
            progress.reason, progress.stop_string = "stop", stops.fired
        if last := rest + stops.flush():
            yield last

    def _loop(
        self, prompt: list[int], config: GenerationConfig, progress: _Progress
    ) -> Iterator[int]:
        """The decode loop: run, sample, stop, yield. Prefill is its first pass."""
        session, end = self.session, self.tokenizer.end
        room = self.manifest.cache.max_length - len(prompt)
        limit = min(config.max_new_tokens, room)
        cache = session.new_cache(len(prompt) + limit)
        sampler, seen, ids = Sampler(config, end), list(prompt), progress.ids
        deadline = time.monotonic() + config.max_time if config.max_time else None
        logits = _prefill(session, cache, prompt)
        step = np.empty((1, 1), np.int64)
        while True:
            token = sampler(logits[0, -1], seen, len(ids))
            if token == end:
                progress.reason = "stop"
                return
            ids.append(token)
            seen.append(token)
            yield token
            if len(ids) == limit:
                return
            if deadline is not None and time.monotonic() >= deadline:
                progress.reason = "time"
                return
            step[0, 0] = token
            logits = session.run(step, cache)

    def _prompt_ids(self, prompt: Prompt) -> list[int]:
        """Raises PromptError for a prompt that is empty, unknown or too long."""
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else [int(i) for i in prompt]
        vocabulary, context = self.manifest.model.vocab_size, self.manifest.cache.max_length
        if not ids:
            raise PromptError("a prompt", found="an empty one", do="give at least one character")
        if not 0 <= min(ids) <= max(ids) < vocabulary:
            outside = next(i for i in ids if not 0 <= i < vocabulary)
            raise PromptError(
                f"ids from 0 to {vocabulary - 1}",
                found=str(outside),
                do="use this model's tokenizer",
            )
        if len(ids) >= context:
            raise PromptError(
                f"a prompt of at most {context - 1} tokens (context {context})",
                found=f"{len(ids)} tokens",
                do="shorten it, or use a model with a longer context",
            )
        return ids

    @property
    def session(self) -> Runs:
        """What runs the graph. Raises OptionError after `close()`."""
        if self._session is None:
            raise OptionError("an open generator", found="a closed one", do="make a new Generator")
        return self._session

    def close(self) -> None:
        """Let go of the weights. Streams in progress end well; new calls are refused."""
        self._session = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _prefill(session: Runs, cache: KVCache, prompt: list[int]) -> Logits:
    ids = np.asarray([prompt], np.int64)
    for start in range(0, len(prompt), _PREFILL_CHUNK):
        logits = session.run(ids[:, start : start + _PREFILL_CHUNK], cache)
    return logits


def _one_config(config: GenerationConfig | None, options: dict[str, Any]) -> GenerationConfig:
    if config is None:
        return GenerationConfig.from_options(**options)
    if options:
        raise OptionError(
            "config= or single options", found=f"both ({', '.join(options)})", do="give one of them"
        )
    return config


def default_bundle() -> Path:
    """The embedded default: in the installed package of models, or in this checkout."""
    spec = find_spec("gptrt_models")
    root = (
        Path(spec.origin).parent if spec and spec.origin else Path(__file__).parents[1] / "models"
    )
    return root / "tales"
