"""The generator: ids under pieces of text under the whole text, and one loop beneath them."""

from __future__ import annotations

import importlib.util
import operator
import os
import time
from collections import abc
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from gptrt.architecture import ForeignModel
from gptrt.cache import KVCache
from gptrt.chat import Message
from gptrt.config import GenerationConfig
from gptrt.decoder import Decoder, Ids, Logits
from gptrt.engine import Device, import_onnxruntime
from gptrt.errors import BundleError, GptrtError, OptionError, PromptError
from gptrt.format import MANIFEST_FILE, Bundle, check_weights, open_structure
from gptrt.sampling import Sampler
from gptrt.tokenizer import StopStrings, Tokenizer

if TYPE_CHECKING:
    from gptrt.foreign import ForeignDecoder

FinishReason = Literal["stop", "length", "time"]
Prompt = str | Sequence[int] | NDArray[np.integer[Any]]

_EMBEDDED = "tales"
_LONGEST_PASS = 256  # ids in one run: attention over a pass takes memory by its square


class Runner(Protocol):
    """What a generator needs of a decoder: the seam at which tests put a fake."""

    @property
    def context(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...
    def new_cache(self, capacity: int, batch: int = 1) -> KVCache: ...
    def run(
        self, ids: Ids | Sequence[Sequence[int]], cache: KVCache, *, keep: int = 1
    ) -> Logits: ...


@dataclass(frozen=True)
class Generation:
    """What a prompt was continued with. `ids` are without the one that ends a text.

    `finish_reason`: "stop" at the end of the text or at `stop_string`, "length" at
    `max_new_tokens` or where the context is full, "time" at `max_time`.
    """

    text: str
    prompt_ids: tuple[int, ...]
    ids: tuple[int, ...]
    finish_reason: FinishReason
    stop_string: str | None = None


@dataclass
class _Call:
    """All that changes while a prompt is continued: nothing of it is shared between calls."""

    prompt: list[int]
    config: GenerationConfig
    room: int  # for new ids
    ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason = "length"
    stop_string: str | None = None


class Generator:
    """Continues text with the bundle at `path`, or with the embedded one.

    `path` may also be a decoder that onnxruntime-genai, optimum or transformers.js brought, a
    folder or its .onnx file: it runs unchecked, with a warning, and less fast.

    Options of all methods are those of `GenerationConfig`, as keywords or as `config=`. Every call
    has a cache and bindings of its own, so calls may overlap, in one thread or in several, and a
    stream may be left or closed at any time.

    >>> with Generator("models/tales") as generator:
    ...     for piece in generator.stream("The king said"):
    ...         print(piece, end="", flush=True)
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        device: Device = "auto",
        threads: int | None = None,
    ) -> None:
        if path is not None and not (Path(path) / MANIFEST_FILE).is_file():
            from gptrt import foreign  # an import that bundles need not wait for

            if foreign.is_foreign(path):
                self._set_up(*foreign.open_parts(path, device=device, threads=threads))
                return
        # Hashing, opening and reading the tokenizer do not need each other.
        bundle = open_structure(embedded_bundle() if path is None else path)
        with ThreadPoolExecutor(2) as beside:
            hashing = beside.submit(check_weights, bundle)
            import_onnxruntime()
            opening = beside.submit(open_decoder, bundle, device=device, threads=threads)
            tokenizer = Tokenizer.open(bundle)
            hashing.result()
            self._set_up(opening.result(), tokenizer)

    @classmethod
    def from_parts(cls, decoder: Runner, tokenizer: Tokenizer) -> Self:
        """A generator over a decoder and a tokenizer that exist already."""
        self = cls.__new__(cls)
        self._set_up(decoder, tokenizer)
        return self

    def _set_up(self, decoder: Runner, tokenizer: Tokenizer) -> None:
        self._decoder: Runner | None = decoder
        self.tokenizer = tokenizer

    @property
    def decoder(self) -> Runner:
        """Raises GptrtError once the generator is closed."""
        if self._decoder is None:
            raise GptrtError(
                "an open Generator", found="one that was closed", do="make a new Generator"
            )
        return self._decoder

    def close(self) -> None:
        """Let go of the model. Streams that are under way may still be read to their end."""
        self._decoder = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def generate(
        self, prompt: Prompt, *, config: GenerationConfig | None = None, **options: Any
    ) -> str:
        """The text that continues `prompt`, a text or its ids. Raises PromptError, OptionError."""
        return self.complete(prompt, config=config, **options).text

    def complete(
        self, prompt: Prompt, *, config: GenerationConfig | None = None, **options: Any
    ) -> Generation:
        """The same with its ids and why it ended."""
        call = self._call(prompt, config, options)
        text = "".join(self._pieces(call))
        ids = tuple(call.ids)
        return Generation(text, tuple(call.prompt), ids, call.finish_reason, call.stop_string)

    def stream(
        self, prompt: Prompt, *, config: GenerationConfig | None = None, **options: Any
    ) -> abc.Generator[str, None, None]:
        """The same text in pieces, each as soon as its characters are whole."""
        return self._pieces(self._call(prompt, config, options))

    def tokens(
        self, prompt: Prompt, *, config: GenerationConfig | None = None, **options: Any
    ) -> abc.Generator[int, None, None]:
        """The ids, one by one. Stop strings need text: with them this raises OptionError."""
        call = self._call(prompt, config, options)
        if call.config.stop_strings:
            raise OptionError(
                "options that ids can honour", found="stop_strings", do="use stream or generate"
            )
        return self._tokens(call)

    def chat(
        self,
        messages: Sequence[Message],
        *,
        config: GenerationConfig | None = None,
        **options: Any,
    ) -> str:
        """The answer to a conversation: `generate` on `chat_prompt`."""
        return self.generate(self.chat_prompt(messages), config=config, **options)

    def chat_prompt(self, messages: Sequence[Message], **variables: Any) -> list[int]:
        """The ids of `[{"role": "user", "content": "..."}, ...]`, written as the model was taught,
        up to where its answer begins; a prompt for `stream` and the others.

        `variables` go to the chat template. Raises PromptError if there is none, or if it refuses
        the messages; DependencyError without jinja2.
        """
        template = self.tokenizer.chat_template
        if template is None:
            raise PromptError(
                "a model with a chat template in its tokenizer_config.json",
                found="none",
                do="write the conversation as the model was trained to read it, and use generate",
            )
        return self.tokenizer.encode(template.render(messages, **variables), whole=False)

    def _pieces(self, call: _Call) -> abc.Generator[str, None, None]:
        decoder, stops = self.tokenizer.stream_decoder(), StopStrings(call.config.stop_strings)
        for token in self._tokens(call):
            if piece := stops.push(decoder.push(token)):
                yield piece
            if stops.fired:
                break
        else:
            if piece := stops.push(decoder.flush()) + stops.flush():
                yield piece
        if stops.fired:
            call.finish_reason, call.stop_string = "stop", stops.fired

    def _tokens(self, call: _Call) -> abc.Generator[int, None, None]:
        """The loop: run, sample, stop, yield."""
        decoder, eos, ids, room = self.decoder, self.tokenizer.eos_token_ids, call.ids, call.room
        cache = decoder.new_cache(len(call.prompt) + room)
        sampler = Sampler(call.config, call.prompt, eos, room=room)
        deadline = time.monotonic() + call.config.max_time if call.config.max_time else None
        *earlier, step = _passes(call.prompt)  # [1, new] each
        for part in earlier:
            decoder.run(part, cache)
        while len(ids) < room:
            token = sampler.next(decoder.run(step, cache))
            if token in eos:
                call.finish_reason = "stop"
                return
            ids.append(token)
            yield token
            if deadline is not None and time.monotonic() >= deadline:
                call.finish_reason = "time"
                return
            step = [[token]]

    def _call(
        self, prompt: Prompt, config: GenerationConfig | None, options: dict[str, Any]
    ) -> _Call:
        """Refuse what cannot be done before anything runs."""
        if config is None:
            config = GenerationConfig.from_options(**options)
        elif options:
            raise OptionError("config= or options", found="both", do="put all into the config")
        decoder = self.decoder
        _check_words(config, decoder.vocab_size)
        ids = self._ids(prompt)
        _check_prompt(ids, decoder)
        return _Call(ids, config, min(config.max_new_tokens, decoder.context - len(ids)))

    def _ids(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt)
        try:
            return [operator.index(token) for token in prompt]
        except TypeError as e:
            raise PromptError(
                "text or a flat sequence of ids", found=str(e), do="convert it first"
            ) from e


def open_decoder(
    bundle: Bundle, *, device: Device = "auto", threads: int | None = None
) -> Decoder | ForeignDecoder:
    """The decoder that runs a bundle: ours, or where another library built the graph, one for any
    decoder. Raises what `Decoder` does."""
    if isinstance(bundle.manifest.model, ForeignModel):
        from gptrt import foreign

        return foreign.ForeignDecoder(foreign.folder_of(bundle), device=device, threads=threads)
    return Decoder(bundle, device=device, threads=threads)


def _passes(prompt: list[int]) -> Iterator[list[list[int]]]:
    """The prompt as [1, new], in pieces of a bounded length."""
    for start in range(0, len(prompt), _LONGEST_PASS):
        yield [prompt[start : start + _LONGEST_PASS]]


def _check_prompt(ids: Sequence[int], decoder: Runner) -> None:
    if not ids:
        raise PromptError("a prompt of one token or more", found="none", do="give some text")
    if not 0 <= min(ids) <= max(ids) < decoder.vocab_size:
        raise PromptError(
            f"ids from 0 to {decoder.vocab_size - 1}",
            found=f"{min(ids)} to {max(ids)}",
            do="encode the prompt with the tokenizer of this bundle",
        )
    if len(ids) >= decoder.context:
        raise PromptError(
            f"a prompt of at most {decoder.context - 1} tokens, in a context of {decoder.context}",
            found=f"{len(ids)} tokens",
            do="shorten the prompt",
        )


def _check_words(config: GenerationConfig, vocab_size: int) -> None:
    largest = max((token for word in config.bad_words_ids for token in word), default=0)
    if largest >= vocab_size:
        raise OptionError(
            f"bad_words_ids below {vocab_size}", found=str(largest), do="use this bundle's ids"
        )


def embedded_bundle() -> Path:
    """Where the default bundle is: in the installed data package, or in the source tree.

    Raises BundleError if it is in neither.
    """
    spec = importlib.util.find_spec("gptrt_models")
    roots = [Path(p) for p in (spec.submodule_search_locations or [])] if spec else []
    roots.append(Path(__file__).parents[1] / "models")
    for folder in (root / _EMBEDDED for root in roots):
        if (folder / MANIFEST_FILE).is_file():
            return folder
    raise BundleError(
        "the embedded default bundle", found="none installed", do="give the folder of a bundle"
    )
