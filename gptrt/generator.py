"""The generator: what an application holds. Ids under pieces of text under the whole text, for one
prompt and for many; the loop beneath them is in `decoding`."""

from __future__ import annotations

import operator
import weakref
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import Any, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from gptrt.answers import Labelled, choice, classify, likeliest_sentence, question, required
from gptrt.asked import (
    Configs,
    check_controls,
    check_several,
    for_each,
    for_one,
    for_stream,
    refuse_many,
)
from gptrt.calls import Call, Calls, Reuse, check_prompt
from gptrt.chat import Message
from gptrt.config import GenerationConfig
from gptrt.decoder import Hidden, Logits
from gptrt.decoding import Continuation
from gptrt.engine import Device
from gptrt.errors import GptrtError, OptionError, PromptError
from gptrt.interrupt import Cancellation, Interrupt
from gptrt.memory import MemoryEstimate, estimate
from gptrt.opening import StrPath, bundle_path, check_same_words, left_for_caches, open_parts
from gptrt.reading import Runner, Slab
from gptrt.results import Generation
from gptrt.scoring import Perplexity, Pooling, Score, embed, logits_at, perplexity, score
from gptrt.stream import Stream
from gptrt.task import Task, Text
from gptrt.tokenizer import Tokenizer

Prompt = str | Sequence[int] | NDArray[np.integer[Any]]
T = TypeVar("T")

_BATCH_SIZE = 8
_OF_TEXTS = ("stop_strings", "logprobs", "top_logprobs")  # options that ids alone cannot show


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

    With `cuda_graphs`, on CUDA, the kernels of a step are started all at once after a few steps, if
    that gives what they give one by one, which is checked.

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
        cuda_graphs: bool = False,
    ) -> None:
        if memory_limit is not None:
            memory_limit = left_for_caches(memory_limit, path, draft)
        opened = partial(open_parts, device=device, threads=threads, cuda_graphs=cuda_graphs)
        parts, guesser = opened(path), None
        if draft is not None:
            other = opened(draft)
            check_same_words(parts, other)
            guesser = other.decoder
        self._set_up(
            *(parts.decoder, parts.tokenizer),
            task=parts.task,
            draft=guesser,
            reuse=reuse,
            cache_limit=memory_limit,
        )

    @classmethod
    def from_parts(
        cls,
        decoder: Runner,
        tokenizer: Tokenizer,
        *,
        task: Task | None = None,
        draft: Runner | None = None,
        reuse: Reuse = "exact",
        cache_limit: int | None = None,
    ) -> Self:
        """A generator over a decoder and a tokenizer that exist already; `cache_limit` bounds the
        bytes of all caches."""
        self = cls.__new__(cls)
        self._set_up(
            decoder, tokenizer, task=task, draft=draft, reuse=reuse, cache_limit=cache_limit
        )
        return self

    @staticmethod
    def estimate(
        path: StrPath | None = None, *, max_length: int | None = None, batch: int = 1
    ) -> MemoryEstimate:
        """What a process will need that opens the bundle: see `gptrt.memory.estimate`."""
        return estimate(bundle_path(path), max_length=max_length, batch=batch)

    def _set_up(
        self,
        decoder: Runner,
        tokenizer: Tokenizer,
        *,
        task: Task | None = None,
        draft: Runner | None = None,
        reuse: Reuse = "exact",
        cache_limit: int | None = None,
    ) -> None:
        if task is not None and (faults := task.faults()):
            raise OptionError("a task without faults", found="; ".join(faults), do="correct it")
        if reuse not in ("exact", "all", "none"):
            raise OptionError('reuse "exact", "all" or "none"', found=repr(reuse), do="choose one")
        self._tokenizer, self._task = tokenizer, task
        calls = Calls(decoder, tokenizer, draft=draft, reuse=reuse, limit=cache_limit)
        self._calls: Calls | None = calls
        self._under_way = weakref.ref(calls)  # what streams that outlive `close` belong to

    @property
    def tokenizer(self) -> Tokenizer:
        return self._tokenizer

    @property
    def task(self) -> Task | None:
        """What the bundle was fine-tuned for, if for anything."""
        return self._task

    @property
    def calls(self) -> Calls:
        """Raises GptrtError once the generator is closed."""
        calls = self._calls  # once: another thread may close the generator meanwhile
        if calls is None:
            raise GptrtError(
                "an open Generator", found="one that was closed", do="make a new Generator"
            )
        return calls

    @property
    def decoder(self) -> Runner:
        """What runs the model. Raises GptrtError once the generator is closed."""
        return self.calls.decoder

    def close(self) -> None:
        """Let go of the model. Streams that are under way may still be read to their end."""
        self._calls = None

    def cancel(self) -> None:
        """End every call that is under way, from any thread: each gives what it has; those that
        would give a part of nothing, as `classify` and `score`, raise CancelledError."""
        calls = self._under_way()
        if calls is not None:
            calls.cancel()

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
        (result,) = self.complete_batch([prompt], config=for_one(config, options), **options)
        return result

    def stream(
        self, prompt: Prompt, *, config: GenerationConfig | None = None, **options: Any
    ) -> Stream:
        """The same text in pieces."""
        calls, call = self._call([prompt], for_stream(config, options), options)
        return _stream(calls, call)

    def tokens(
        self, prompt: Prompt, *, config: GenerationConfig | None = None, **options: Any
    ) -> Iterator[int]:
        """The ids, one by one. Raises OptionError for stop strings, which need text, and for log
        probabilities, which would be lost."""
        calls, call = self._call([prompt], for_stream(config, options), options)
        config = call.writers[0].one.config
        lost = [name for name in _OF_TEXTS if getattr(config, name)]
        if lost:
            raise OptionError(
                "options that ids can honour", found=", ".join(lost), do="use complete or stream"
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
        check_several("prompts", prompts)
        configs = for_each(config, options, len(prompts))
        if not configs:
            return []
        if all(config.num_beams == 1 for config in configs):
            return self._written(prompts, configs, options, batch_size)
        # One prompt after the other, and `cancel` ends them all.
        check_controls(options.get("cancellation"), options.get("progress"))
        whole = Interrupt(linked=options.get("cancellation"))
        controls = options | {"cancellation": whole}
        with self.calls.under_way(whole):
            return [
                result
                for prompt, one in zip(prompts, configs, strict=True)
                for result in self._written([prompt], [one], controls, batch_size)
            ]

    def _written(
        self,
        prompts: Sequence[Prompt],
        configs: Sequence[GenerationConfig],
        options: dict[str, Any],
        rows: int,
    ) -> list[Generation]:
        """All prompts, `rows` side by side; of a search there is one."""
        calls, call = self._call(prompts, configs, options)
        if configs[0].num_beams > 1:
            return calls.beams(call.writers[0].one.prompt, configs[0], call)
        for _ in calls.pieces(call, rows=rows):
            pass
        return [call.result(writer) for writer in call.writers]

    # --- tasks ------------------------------------------------------------------------------------

    def classify(
        self,
        text: Text,
        labels: Sequence[str] | None = None,
        *,
        prompt: str | None = None,
        calibrate: bool = True,
    ) -> Labelled:
        """The labels with their probabilities, the most probable first: `classify_batch` of one."""
        return self.classify_batch([text], labels, prompt=prompt, calibrate=calibrate)[0]

    def classify_batch(
        self,
        texts: Sequence[Text],
        labels: Sequence[str] | None = None,
        *,
        prompt: str | None = None,
        calibrate: bool = True,
    ) -> list[Labelled]:
        """For each text the labels with their probabilities, which sum to 1.

        A bundle that was fine-tuned for classification knows its labels and how to ask; `labels`
        are some of them then, among which the probability is shared out. Any other bundle, and any
        with a `prompt`, is asked for `labels` of the caller's: "{text}\nThis review is". A text
        is that of the only field in braces, or a mapping of all; one that is too long loses words
        at its end.

        The score of a label is the sum of the log-probabilities of its ids after the prompt
        (`gptrt.task.label_ids` says which); of the scores, calibrated unless `calibrate` is False,
        the softmax is taken (`gptrt.answers.classify`). Raises OptionError, PromptError.
        """
        check_several("texts", texts)
        asked = choice(self._task, labels, prompt)
        return classify(self.calls, self.encode, asked, texts, calibrate=calibrate)

    def answer(
        self, text: Text, *, config: GenerationConfig | None = None, **options: Any
    ) -> Generation:
        """What a bundle that was fine-tuned for a task answers to a text: `answer_batch` of one."""
        return self.answer_batch([text], config=for_one(config, options), **options)[0]

    def answer_batch(
        self,
        texts: Sequence[Text],
        *,
        config: Configs | None = None,
        batch_size: int = _BATCH_SIZE,
        **options: Any,
    ) -> list[Generation]:
        """`complete_batch` with the prompts of the task, which leave room for `max_new_tokens`, by
        default the task's; the texts that come back are stripped.

        A text is that of the only field, or a mapping of all; one that is too long loses words at
        its end. Raises OptionError for a bundle without a task, PromptError.
        """
        check_several("texts", texts)
        task = required(self._task)
        if config is None and options.get("max_new_tokens") is None:
            options["max_new_tokens"] = task.max_new_tokens
        prompts = [
            question(self.calls, self.encode, task, text, each.max_new_tokens)
            for text, each in zip(texts, for_each(config, options, len(texts)), strict=True)
        ]
        results = self.complete_batch(prompts, config=config, batch_size=batch_size, **options)
        return [replace(result, text=result.text.strip()) for result in results]

    def translate(self, text: Text, **options: Any) -> str:
        """The translation by a bundle that was fine-tuned for it. Raises OptionError for another,
        PromptError."""
        required(self._task, "translation")
        return self.answer(text, **options).text

    def summarize(self, text: Text, *, extract: bool = False, **options: Any) -> str:
        """The summary by a bundle that was fine-tuned for it; with `extract` the sentence of the
        text that is likeliest as its summary, so that nothing is said which the text does not say.
        Raises OptionError for another bundle, PromptError."""
        task = required(self._task, "summarization")
        if not extract:
            return self.answer(text, **options).text
        if options:
            raise OptionError(
                "no options of generation, for nothing is generated",
                found=", ".join(options),
                do="leave them out, or extract=True",
            )
        return likeliest_sentence(self.calls, self.encode, task, text)

    # --- scoring ----------------------------------------------------------------------------------

    def score(self, prompt: Prompt, continuations: Sequence[Prompt]) -> list[Score]:
        """How likely each text is to follow `prompt`, which is read once."""
        check_several("continuations", continuations)
        before = self._checked(self.encode(prompt))
        found = [
            self._checked(self.encode(continuation, whole=False), beside=len(before))
            for continuation in continuations
        ]
        longest = max(map(len, found), default=0)
        capacity, calls = len(before) + longest, self.calls
        with calls.whole() as stop, calls.row_for(before, capacity, stop) as (reading, row):
            return [score(reading, row, before, ids) for ids in found]

    def logits(self, prompt: Prompt, positions: Sequence[int] | None = None) -> Logits:
        """The logits after each of `positions` of the prompt's ids, float32 [positions, vocab]; of
        the last one, if none are given. Raises OptionError for a position that there is not."""
        ids = self._checked(self.encode(prompt))
        wanted: list[int] = []
        with suppress(TypeError):  # of what is no list of whole numbers
            wanted = [len(ids) - 1] if positions is None else list(map(operator.index, positions))
        if not wanted or not all(0 <= at < len(ids) for at in wanted):
            raise OptionError(
                f"positions from 0 to {len(ids) - 1}", found=repr(positions)[:60], do="correct them"
            )
        calls = self.calls
        with calls.whole() as stop, calls.row_for(ids, len(ids), stop) as (reading, row):
            return logits_at(reading, row, ids, wanted)

    def embed(
        self, texts: Sequence[Prompt], *, pooling: Pooling = "mean", normalize: bool = True
    ) -> Logits:
        """A vector for each text, float32 [len(texts), n_embd]: the mean of the last hidden
        states of its ids, or that of the last id; of length 1 if they are normalized.

        Raises BundleError for a bundle that was exported without `--hidden-states`.
        """
        if pooling not in ("mean", "last"):
            raise OptionError('pooling "mean" or "last"', found=repr(pooling), do="choose one")
        check_several("texts", texts)
        if not len(texts):
            raise PromptError("one text or more", found="none", do="give some")
        rows, calls = list[Hidden](), self.calls
        with calls.whole() as stop:
            for text in texts:
                ids = self._checked(self.encode(text))
                with calls.row_for(ids, len(ids), stop) as (reading, row):
                    rows.append(embed(reading, row, ids, pooling))
        found = np.array(rows, np.float32)
        return found / np.linalg.norm(found, axis=1, keepdims=True) if normalize else found

    def perplexity(self, text: Prompt, *, stride: int | None = None) -> Perplexity:
        """How well the model predicts a text of any length: see `gptrt.scoring.perplexity`."""
        ids = self.encode(text)
        calls, decoder = self.calls, self.decoder
        slab = calls.shelf.lend(min(max(1, len(ids)), decoder.context))
        cache = slab.rows[0].cache
        try:
            with calls.whole() as stop:
                return perplexity(decoder, ids, stride=stride, cache=cache, interrupt=stop)
        finally:
            calls.shelf.drop(slab)

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
            if isinstance(prompt, bytes | bytearray):
                raise TypeError("bytes, which are numbers but no ids")
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


def _stream(calls: Calls, call: Call, slab: Slab | None = None) -> Stream:
    (writer,) = call.writers
    return Stream(
        (piece for _, piece in calls.pieces(call, slab=slab)), lambda: call.result(writer)
    )


@contextmanager
def _linked(options: dict[str, Any]) -> Iterator[Cancellation]:
    """A cancellation of one's own in `options`, which that of the caller's ends too."""
    stop, given = Cancellation(), options.get("cancellation")
    check_controls(given, options.get("progress"))
    options["cancellation"] = stop
    if given is not None:
        given.link(stop.stop)
    try:
        yield stop
    finally:
        if given is not None:
            given.unlink(stop.stop)


async def _in_thread(function: Callable[[], T], stop: Cancellation) -> T:
    """What a function gives, called beside the event loop. A cancelled task stops it and waits for
    it, but not for a thread to become free, where it has not begun."""
    import asyncio  # an import that most applications need not wait for

    begun = False

    def call() -> T:
        nonlocal begun
        begun = True
        return function()

    task = asyncio.ensure_future(asyncio.to_thread(call))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        stop.cancel()
        if begun:
            await asyncio.wait([task])
        else:
            task.cancel()
        raise
