"""The generator: what an application holds. Ids under pieces of text under the whole text, for one
prompt and for many; the loop beneath them is in `decoding`."""

from __future__ import annotations

import importlib.util
import operator
import os
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from gptrt.architecture import ForeignModel
from gptrt.calls import Call, Calls, Reuse, check_prompt
from gptrt.chat import Message
from gptrt.config import GenerationConfig
from gptrt.decoder import Decoder, Logits
from gptrt.decoding import Continuation, Runner, Slab
from gptrt.engine import Device, import_onnxruntime
from gptrt.errors import BundleError, GptrtError, MemoryLimitError, OptionError, PromptError
from gptrt.format import MANIFEST_FILE, Bundle, check_weights, open_structure
from gptrt.interrupt import Cancellation
from gptrt.memory import MemoryEstimate, estimate
from gptrt.results import Generation
from gptrt.scoring import Perplexity, Pooling, Score, embed, logits_at, perplexity, score
from gptrt.tokenizer import Tokenizer

if TYPE_CHECKING:
    from gptrt.foreign import ForeignDecoder

StrPath = str | os.PathLike[str]
Prompt = str | Sequence[int] | NDArray[np.integer[Any]]
Configs = GenerationConfig | Sequence[GenerationConfig]
T = TypeVar("T")

_EMBEDDED = "tales"
_BATCH_SIZE = 8


class Stream(Iterator[str]):
    """Pieces of text as they come, each as soon as its characters are whole.

    It may be left at any time; `close`, or the end of a `with` block, lets go of what it holds.
    """

    def __init__(self, pieces: Iterator[str], result: Callable[[], Generation]) -> None:
        self._pieces, self._result = pieces, result

    def __next__(self) -> str:
        return next(self._pieces)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """End it here. From another thread use a `Cancellation`."""
        self._pieces.close()  # type: ignore[attr-defined]

    @property
    def result(self) -> Generation:
        """What came so far; at the end, what `complete` gives. A stream that was left before it is
        "cancelled"."""
        return self._result()


class Generator:
    """Continues text with the bundle at `path`, or with the embedded one.

    `path` may also be a decoder that onnxruntime-genai, optimum or transformers.js brought, a
    folder or its .onnx file: it runs unchecked, with a warning, and less fast. `draft` is a smaller
    bundle of the same vocabulary that guesses ahead where one prompt is continued.

    Options of the methods that write are those of `GenerationConfig`, as keywords or as `config=`.
    They also take `cancellation`, and `progress`, a function that is told how many ids of the
    prompt are read, of how many.

    Every call has bindings and a cache of its own, so calls may overlap, in one thread or in
    several, and a stream may be left or closed at any time. What a call has read is kept for the
    next that begins alike: with `reuse` "exact" only what cannot change an id, with "all" also what
    was generated, which is faster and may differ where two ids are as good as equally likely.

    `memory_limit`, in bytes, bounds what `estimate` adds up: what does not fit, a bundle or the
    cache of a call, raises MemoryLimitError before any of it is taken.

    >>> with Generator("models/tales") as generator:
    ...     for piece in generator.stream("The king said"):
    ...         print(piece, end="", flush=True)
    """

    def __init__(
        self,
        path: StrPath | None = None,
        *,
        device: Device = "auto",
        threads: int | None = None,
        draft: StrPath | None = None,
        reuse: Reuse = "exact",
        memory_limit: int | None = None,
    ) -> None:
        if memory_limit is not None:
            memory_limit -= _without_caches(path) + (0 if draft is None else _as_draft(draft))
            _check_limit(memory_limit)
        decoder, tokenizer = _open(path, device=device, threads=threads)
        guesser = None
        if draft is not None:
            guesser, words = _open(draft, device=device, threads=threads)
            _check_same_words(tokenizer, words, decoder, guesser)
        self._set_up(decoder, tokenizer, draft=guesser, reuse=reuse, cache_limit=memory_limit)

    @classmethod
    def from_parts(
        cls,
        decoder: Runner,
        tokenizer: Tokenizer,
        *,
        draft: Runner | None = None,
        reuse: Reuse = "exact",
        cache_limit: int | None = None,
    ) -> Self:
        """A generator over a decoder and a tokenizer that exist already; `cache_limit` bounds the
        bytes of all caches."""
        self = cls.__new__(cls)
        self._set_up(decoder, tokenizer, draft=draft, reuse=reuse, cache_limit=cache_limit)
        return self

    @staticmethod
    def estimate(
        path: StrPath | None = None, *, max_length: int | None = None, batch: int = 1
    ) -> MemoryEstimate:
        """What a process will need that opens the bundle: see `gptrt.memory.estimate`."""
        path = embedded_bundle() if path is None else path
        return estimate(path, max_length=max_length, batch=batch)

    def _set_up(
        self,
        decoder: Runner,
        tokenizer: Tokenizer,
        *,
        draft: Runner | None = None,
        reuse: Reuse = "exact",
        cache_limit: int | None = None,
    ) -> None:
        if reuse not in ("exact", "all", "none"):
            raise OptionError('reuse "exact", "all" or "none"', found=repr(reuse), do="choose one")
        self._tokenizer = tokenizer
        self._calls: Calls | None = Calls(
            decoder, tokenizer, draft=draft, reuse=reuse, limit=cache_limit
        )

    @property
    def tokenizer(self) -> Tokenizer:
        return self._tokenizer

    @property
    def calls(self) -> Calls:
        """Raises GptrtError once the generator is closed."""
        if self._calls is None:
            raise GptrtError(
                "an open Generator", found="one that was closed", do="make a new Generator"
            )
        return self._calls

    @property
    def decoder(self) -> Runner:
        """What runs the model. Raises GptrtError once the generator is closed."""
        return self.calls.decoder

    def close(self) -> None:
        """Let go of the model. Streams that are under way may still be read to their end."""
        self._calls = None

    def cancel(self) -> None:
        """End every call that is under way, from any thread: each gives what it has."""
        if self._calls is not None:
            self._calls.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # --- one prompt -------------------------------------------------------------------------------

    def generate(
        self, prompt: Prompt, *, config: GenerationConfig | None = None, **options: Any
    ) -> str:
        """The text that continues `prompt`, a text or its ids. Raises PromptError, OptionError."""
        return self.complete(prompt, config=config, **options).text

    def complete(
        self, prompt: Prompt, *, config: GenerationConfig | None = None, **options: Any
    ) -> Generation:
        """The same with its ids, why it ended, and what else was asked for."""
        (result,) = self.complete_batch([prompt], config=_alone(config, options), **options)
        return result

    def stream(
        self, prompt: Prompt, *, config: GenerationConfig | None = None, **options: Any
    ) -> Stream:
        """The same text in pieces."""
        calls, call = self._call([prompt], _streamed(config, options), options)
        return _stream(calls, call)

    def tokens(
        self, prompt: Prompt, *, config: GenerationConfig | None = None, **options: Any
    ) -> Iterator[int]:
        """The ids, one by one. Stop strings need text: with them this raises OptionError."""
        calls, call = self._call([prompt], _streamed(config, options), options)
        if call.writers[0].one.config.stop_strings:
            raise OptionError(
                "options that ids can honour", found="stop_strings", do="use stream or generate"
            )
        return (token for _, token in calls.tokens(call))

    # --- many prompts -----------------------------------------------------------------------------

    def generate_batch(
        self, prompts: Sequence[Prompt], *, config: Configs | None = None, **options: Any
    ) -> list[str]:
        """The texts of `complete_batch`."""
        return [result.text for result in self.complete_batch(prompts, config=config, **options)]

    def complete_batch(
        self,
        prompts: Sequence[Prompt],
        *,
        config: Configs | None = None,
        batch_size: int = _BATCH_SIZE,
        **options: Any,
    ) -> list[Generation]:
        """All prompts continued, `batch_size` at a time; the results in the order of the prompts,
        `num_return_sequences` for each. `config` may be one for each.

        Each is as it would be alone, to the bit where the kernels compute rows alike: docs/guide
        says where. Nothing is guessed ahead, the smallest `timeout` ends all, and with `num_beams`
        one prompt is continued at a time.
        """
        if type(batch_size) is not int or batch_size < 1:
            raise OptionError("batch_size of 1 or more", found=repr(batch_size), do="correct it")
        configs = _configs(config, options, len(prompts))
        if not configs:
            return []
        if any(config.num_beams > 1 for config in configs):
            pairs = zip(prompts, configs, strict=True)
            return [result for pair in pairs for result in self._one(*pair, options)]
        calls, call = self._call(prompts, configs, options)
        for _ in calls.pieces(call, rows=batch_size):
            pass
        return [call.result(writer) for writer in call.writers]

    def _one(
        self, prompt: Prompt, config: GenerationConfig, options: dict[str, Any]
    ) -> list[Generation]:
        """One prompt of those of which some are searched for."""
        calls, call = self._call([prompt], [config], options)
        if config.num_beams > 1:
            return calls.beams(call.writers[0].one.prompt, config, call)
        for _ in calls.pieces(call, rows=_BATCH_SIZE):
            pass
        return [call.result(writer) for writer in call.writers]

    # --- scoring ----------------------------------------------------------------------------------

    def score(self, prompt: Prompt, continuations: Sequence[Prompt]) -> list[Score]:
        """How likely each text is to follow `prompt`, which is read once."""
        before = self._checked(self.encode(prompt))
        scores = []
        for continuation in continuations:
            ids = self._checked(self.encode(continuation, whole=False), beside=len(before))
            with self.calls.row_for(before, len(before) + len(ids)) as (reading, row):
                scores.append(score(reading, row, before, ids))
        return scores

    def logits(self, prompt: Prompt, positions: Sequence[int] | None = None) -> Logits:
        """The logits after each of `positions` of the prompt's ids, float32 [positions, vocab]; of
        the last one, if none are given. Raises OptionError for a position that there is not."""
        ids = self._checked(self.encode(prompt))
        wanted = [len(ids) - 1] if positions is None else list(positions)
        if not wanted or not all(type(at) is int and 0 <= at < len(ids) for at in wanted):
            raise OptionError(
                f"positions from 0 to {len(ids) - 1}", found=repr(positions)[:60], do="correct them"
            )
        with self.calls.row_for(ids, len(ids)) as (reading, row):
            return logits_at(reading, row, ids, wanted)

    def embed(
        self, texts: Sequence[Prompt], *, pooling: Pooling = "mean", normalize: bool = True
    ) -> Logits:
        """A vector for each text, float32 [len(texts), n_embd]: the mean of what the head reads, or
        what it reads last; of length 1 if they are normalized.

        Raises BundleError for a bundle that was exported without `--hidden-states`.
        """
        if pooling not in ("mean", "last"):
            raise OptionError('pooling "mean" or "last"', found=repr(pooling), do="choose one")
        if not len(texts):
            raise PromptError("one text or more", found="none", do="give some")
        rows = []
        for text in texts:
            ids = self._checked(self.encode(text))
            with self.calls.row_for(ids, len(ids)) as (reading, row):
                rows.append(embed(reading, row, ids, pooling))
        found = np.array(rows, np.float32)
        return found / np.linalg.norm(found, axis=1, keepdims=True) if normalize else found

    def perplexity(self, text: Prompt, *, stride: int | None = None) -> Perplexity:
        """How well the model predicts a text of any length: see `gptrt.scoring.perplexity`."""
        ids = self.encode(text)
        shelf = self.calls.shelf
        slab = shelf.lend(min(max(1, len(ids)), self.decoder.context))
        try:
            return perplexity(self.decoder, ids, stride=stride, cache=slab.rows[0].cache)
        finally:
            shelf.drop(slab)

    def _checked(self, ids: list[int], *, beside: int = 0) -> list[int]:
        check_prompt(ids, self.decoder.vocab_size)
        room = self.decoder.context - beside
        if len(ids) > room:
            raise PromptError(
                f"at most {room} tokens", found=f"{len(ids)}", do="shorten the text or split it"
            )
        return ids

    # --- asyncio ----------------------------------------------------------------------------------

    async def complete_async(
        self, prompt: Prompt, *, config: GenerationConfig | None = None, **options: Any
    ) -> Generation:
        """`complete` in a thread. Cancelling the task ends it."""
        with _linked(options) as stop:
            return await _in_thread(lambda: self.complete(prompt, config=config, **options), stop)

    async def stream_async(
        self, prompt: Prompt, *, config: GenerationConfig | None = None, **options: Any
    ) -> AsyncIterator[str]:
        """`stream` in a thread. Leaving it, or cancelling the task, ends it."""
        with _linked(options) as stop:
            stream = self.stream(prompt, config=config, **options)
            try:
                while (piece := await _in_thread(lambda: next(stream, None), stop)) is not None:
                    yield piece
            finally:
                stop.cancel()

    # --- conversations ----------------------------------------------------------------------------

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

    # --- how a call begins ------------------------------------------------------------------------

    def stream_into(
        self, slab: Slab, prompt: Prompt, config: GenerationConfig, options: dict[str, Any]
    ) -> tuple[Stream, Continuation]:
        """A stream whose prompt is read into a slab of the caller's, and what it writes: for
        sessions. Of `options` only those that control the call count."""
        refuse_many(config)
        calls, call = self._call([prompt], [config], options)
        return _stream(calls, call, slab), call.writers[0].one

    def encode(self, prompt: Prompt, *, whole: bool = True) -> list[int]:
        """The ids of a prompt, a text or ids already; of what follows another text, if it is not
        `whole`. Raises PromptError."""
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt, whole=whole)
        try:
            return [operator.index(token) for token in prompt]
        except TypeError as e:
            raise PromptError(
                "text or a flat sequence of ids", found=str(e), do="convert it first"
            ) from e

    def _call(
        self,
        prompts: Sequence[Prompt],
        configs: Sequence[GenerationConfig],
        options: dict[str, Any],
    ) -> tuple[Calls, Call]:
        calls = self.calls
        call = calls.prepare(
            [self.encode(prompt) for prompt in prompts],
            configs,
            cancellation=options.get("cancellation"),
            progress=options.get("progress"),
        )
        return calls, call


_CONTROLS = ("cancellation", "progress")  # of a call, not of what is generated


def config_of(config: GenerationConfig | None, options: dict[str, Any]) -> GenerationConfig:
    """What a call asks for. Raises OptionError."""
    given = {name: value for name, value in options.items() if name not in _CONTROLS}
    if config is None:
        return GenerationConfig.from_options(**given)
    if given:
        raise OptionError("config= or options", found="both", do="put all into the config")
    return config


def _alone(config: GenerationConfig | None, options: dict[str, Any]) -> GenerationConfig | None:
    """Raises OptionError where there would be several results."""
    _refuse_several(config_of(config, options))
    return config


def _streamed(
    config: GenerationConfig | None, options: dict[str, Any]
) -> Sequence[GenerationConfig]:
    """Raises OptionError for what is only known at the end."""
    found = config_of(config, options)
    refuse_many(found)
    return [found]


def refuse_many(config: GenerationConfig) -> None:
    _refuse_several(config)
    if config.num_beams > 1:
        raise OptionError(
            "options that a stream can honour",
            found="num_beams: what a search finds is known at its end",
            do="use complete",
        )


def _refuse_several(config: GenerationConfig) -> None:
    if config.num_return_sequences > 1:
        raise OptionError(
            "one sequence",
            found=f"num_return_sequences={config.num_return_sequences}",
            do="use complete_batch or generate_batch",
        )


def _configs(
    config: Configs | None, options: dict[str, Any], count: int
) -> Sequence[GenerationConfig]:
    """One for each prompt."""
    if config is None or isinstance(config, GenerationConfig):
        return [config_of(config, options)] * count
    configs = [config_of(each, options) for each in config]
    if len(configs) != count:
        raise OptionError(
            f"a config for each of {count} prompts", found=f"{len(configs)}", do="give as many"
        )
    return configs


def _stream(calls: Calls, call: Call, slab: Slab | None = None) -> Stream:
    (writer,) = call.writers
    return Stream(
        (piece for _, piece in calls.pieces(call, slab=slab)), lambda: call.result(writer)
    )


@contextmanager
def _linked(options: dict[str, Any]) -> Iterator[Cancellation]:
    """A cancellation of one's own in `options`, which that of the caller's ends too."""
    stop, given = Cancellation(), options.get("cancellation")
    options["cancellation"] = stop
    if given is not None:
        given.link(stop.stop)
    try:
        yield stop
    finally:
        if given is not None:
            given.unlink(stop.stop)


async def _in_thread(function: Callable[[], T], stop: Cancellation) -> T:
    """What a function gives, called beside the event loop; a cancelled task stops it and waits."""
    import asyncio  # an import that most applications need not wait for

    task = asyncio.ensure_future(asyncio.to_thread(function))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        stop.cancel()
        await asyncio.wait([task])
        raise


# --- opening ------------------------------------------------------------------------------------


def _open(
    path: StrPath | None, *, device: Device, threads: int | None
) -> tuple[Decoder | ForeignDecoder, Tokenizer]:
    """What runs the bundle or the foreign decoder at `path`, and its tokenizer."""
    if path is not None and not (Path(path) / MANIFEST_FILE).is_file():
        from gptrt import foreign  # an import that bundles need not wait for

        if foreign.is_foreign(path):
            return foreign.open_parts(path, device=device, threads=threads)
    # Hashing, opening and reading the tokenizer do not need each other.
    bundle = open_structure(embedded_bundle() if path is None else path)
    hashing = _Beside(lambda: check_weights(bundle))
    beside: list[_Beside[Any]] = [hashing]
    try:
        import_onnxruntime()
        opening = _Beside(lambda: open_decoder(bundle, device=device, threads=threads))
        beside.append(opening)
        tokenizer = Tokenizer.open(bundle)
        hashing.result()
    finally:
        for thread in beside:  # a process that ends while onnxruntime opens a graph aborts
            thread.join()
    return opening.result(), tokenizer


def _without_caches(path: StrPath | None) -> int:
    """What a bundle takes before it continues anything; of a foreign decoder the file alone."""
    if path is not None and not (Path(path) / MANIFEST_FILE).is_file():
        from gptrt import foreign

        if foreign.is_foreign(path):
            return foreign.open_foreign(path).graph.stat().st_size
    needs = Generator.estimate(path)
    return needs.total - needs.cache


def _as_draft(path: StrPath) -> int:
    """What a draft takes beside the bundle that it guesses for, its cache included."""
    needs = Generator.estimate(path)
    return needs.total - needs.runtime


def _check_limit(left: int) -> None:
    if left <= 0:
        raise MemoryLimitError(
            "memory_limit to leave room beside weights and libraries",
            found=f"{-left:,} bytes too few",
            do="raise it, or use a smaller bundle",
        )


class _Beside(threading.Thread, Generic[T]):
    """A function in a thread of its own, from now on."""

    def __init__(self, function: Callable[[], T]) -> None:
        super().__init__(daemon=True)
        self._function = function
        self._error: BaseException | None = None
        self._value: list[T] = []
        self.start()

    def run(self) -> None:
        try:
            self._value.append(self._function())
        except BaseException as e:
            self._error = e

    def result(self) -> T:
        """What it gives or raises, once it does."""
        self.join()
        if self._error is not None:
            raise self._error
        return self._value.pop()


def open_decoder(
    bundle: Bundle, *, device: Device = "auto", threads: int | None = None
) -> Decoder | ForeignDecoder:
    """The decoder that runs a bundle: ours, or where another library built the graph, one for any
    decoder. Raises what `Decoder` does."""
    if isinstance(bundle.manifest.model, ForeignModel):
        from gptrt import foreign

        return foreign.ForeignDecoder(foreign.folder_of(bundle), device=device, threads=threads)
    return Decoder(bundle, device=device, threads=threads)


def _check_same_words(ours: Tokenizer, theirs: Tokenizer, decoder: Runner, draft: Runner) -> None:
    """Raises OptionError for a draft whose ids mean something else."""
    sizes = (decoder.vocab_size, draft.vocab_size)
    if sizes[0] != sizes[1] or ours.words() != theirs.words():
        raise OptionError(
            f"a draft with the vocabulary of the bundle, {sizes[0]} entries",
            found=f"{sizes[1]} entries" if sizes[0] != sizes[1] else "other entries",
            do="use a draft that was trained with the same tokenizer",
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
