"""From prompts and options to continuations, and from these to text: what every call does.

All checks are made before anything runs. What a call needs is its own; what calls share is here,
behind locks: caches to begin from, and the list of those under way, so that they can be ended.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from gptrt.asked import check_controls
from gptrt.beams import Beam, BeamSearch
from gptrt.config import GenerationConfig
from gptrt.decoding import Continuation, search, write
from gptrt.draft import DraftModel
from gptrt.errors import BundleError, CancelledError, OptionError, PromptError
from gptrt.guide import Guide
from gptrt.interrupt import Cancellation, Interrupt, Interrupted
from gptrt.reading import Progress, Reading, Row, Runner, Slab
from gptrt.results import Generation, Timings
from gptrt.sampler import Sampler, fresh_seed
from gptrt.shelf import Shelf
from gptrt.speculation import Drafter, Forced, PromptLookup
from gptrt.tokenizer import StopStrings, StreamDecoder, Tokenizer

Reuse = Literal["exact", "all", "none"]


@dataclass
class Writer:
    """A continuation and its text."""

    one: Continuation
    tokenizer: Tokenizer
    stops: StopStrings
    pieces: list[str] = field(default_factory=list)
    first_token: float | None = None  # by time.monotonic()

    @cached_property
    def decoder(self) -> StreamDecoder:
        """Made when text is asked for: ids need no tokenizer."""
        return self.tokenizer.stream_decoder()

    def push(self, token: int) -> str:
        """The text that is free to leave now."""
        return self._keep(self.stops.push(self.decoder.push(token)))

    def flush(self) -> str:
        """What was held back, unless a stop string has ended the text."""
        if self.stops.fired:
            return ""
        piece = self.stops.push(self.decoder.flush())
        return self._keep(piece + ("" if self.stops.fired else self.stops.flush()))

    def _keep(self, piece: str) -> str:
        if self.stops.fired and self.one.finish_reason != "stop":
            self.one.end("stop")
        if piece:
            self.pieces.append(piece)
        return piece


@dataclass
class Call:
    """All that changes while prompts are continued: nothing of it is shared between calls."""

    writers: list[Writer]
    interrupt: Interrupt
    progress: Progress | None = None
    began: float = field(default_factory=lambda: time.monotonic())

    def result(self, writer: Writer) -> Generation:
        """What there is, whether it is at its end or not."""
        one = writer.one
        asked = one.config.logprobs or one.config.top_logprobs
        return Generation(
            text="".join(writer.pieces),
            prompt_ids=tuple(one.prompt),
            ids=tuple(one.ids),
            finish_reason=one.finish_reason or self.interrupt.reason or "cancelled",
            stop_string=writer.stops.fired,
            logprobs=tuple(one.logprobs) if asked else None,
            top_logprobs=tuple(one.top_logprobs) if one.config.top_logprobs else None,
            timings=self._timings(writer),
        )

    def _timings(self, writer: Writer) -> Timings:
        one, first = writer.one, writer.first_token
        return Timings(
            first_token=None if first is None else first - self.began,
            total=(one.ended or time.monotonic()) - self.began,
            prompt_tokens=len(one.prompt),
            new_tokens=len(one.ids),
            reused_tokens=one.reused,
            guessed_tokens=one.guessed,
            accepted_tokens=one.accepted,
        )


class Calls:
    """A decoder, its tokenizer, and what calls to them share; `listed` are those under way. Raises
    BundleError for two that do not go together."""

    def __init__(
        self,
        decoder: Runner,
        tokenizer: Tokenizer,
        *,
        draft: Runner | None = None,
        reuse: Reuse = "exact",
        limit: int | None = None,
    ) -> None:
        last = max(tokenizer.eos_token_ids, default=0)
        if last >= decoder.vocab_size:
            raise BundleError(
                f"ids that end a text below {decoder.vocab_size}, as many as the model has",
                found=str(last),
                do="correct eos_token_id",
            )
        self.decoder, self.tokenizer = decoder, tokenizer
        self.shelf = Shelf(decoder, limit=limit, keep=reuse != "none")
        self._draft, self._reuse = draft, reuse
        self._lock = threading.RLock()  # a stream that is collected ends in any thread
        self.listed: set[Interrupt] = set()

    # --- before -----------------------------------------------------------------------------------

    def prepare(
        self,
        prompts: Sequence[Sequence[int]],
        configs: Sequence[GenerationConfig],
        *,
        cancellation: Cancellation | None = None,
        progress: Progress | None = None,
    ) -> Call:
        """Refuse what cannot be done before anything runs. Raises PromptError, OptionError."""
        check_controls(cancellation, progress)
        for config in configs:
            _check_ids_of(config, self.decoder.vocab_size)
        pairs = list(zip(prompts, configs, strict=True))
        checked = [(self._checked(ids, config), config) for ids, config in pairs]
        timeouts = [config.timeout for config in configs if config.timeout is not None]
        interrupt = Interrupt(min(timeouts, default=None), linked=cancellation)
        alone = len(pairs) == 1 and configs[0].num_return_sequences == 1
        call = Call([], interrupt, progress)
        for ids, config in checked:
            seed = fresh_seed() if config.seed is None else config.seed
            for number in range(config.num_return_sequences):
                one = self._continuation(ids, config, seed, number, call.began)
                if alone:
                    one.drafter = self._drafter(one, interrupt)
                stops = StopStrings(config.stop_strings)
                call.writers.append(Writer(one, self.tokenizer, stops))
        return call

    def _checked(self, ids: Sequence[int], config: GenerationConfig) -> list[int]:
        """A prompt that fits, or what of it the policy for a full context leaves."""
        prompt = list(ids)
        check_prompt(prompt, self.decoder.vocab_size)
        context = self.decoder.context
        if len(prompt) < context:
            return prompt
        if config.context_overflow == "slide":
            return prompt[-(context // 2) :]
        raise PromptError(
            f"a prompt of at most {context - 1} tokens, in a context of {context}",
            found=f"{len(prompt)} tokens",
            do="shorten the prompt, or let its beginning go with context_overflow='slide'",
        )

    def _room(self, prompt: Sequence[int], config: GenerationConfig) -> int:
        if config.context_overflow == "slide":
            return config.max_new_tokens
        return min(config.max_new_tokens, self.decoder.context - len(prompt))

    def _continuation(
        self, prompt: list[int], config: GenerationConfig, seed: int, number: int, began: float
    ) -> Continuation:
        eos, room = self.tokenizer.eos_token_ids, self._room(prompt, config)
        guide = None
        if config.constraint is not None:
            guide = Guide.compile(config.constraint, self.tokenizer, self.decoder.vocab_size)
        sampler = Sampler(config, prompt, eos, room=room, seed=seed, sequence=number, guide=guide)
        deadline = None if config.max_time is None else began + config.max_time
        return Continuation(prompt, config, sampler, eos, room, deadline=deadline)

    def _drafter(self, one: Continuation, interrupt: Interrupt) -> Drafter | None:
        config, guide = one.config, one.sampler.guide
        other: Drafter | None = None
        if config.prompt_lookup_num_tokens is not None:
            other = PromptLookup(config.prompt_lookup_num_tokens)
        elif self._draft is not None and guide is None:
            other = DraftModel(
                self._draft,
                one.sampler,
                capacity=len(one.prompt) + one.room,
                longest=config.num_assistant_tokens,
                interrupt=interrupt,
            )
        return other if guide is None else Forced(guide.forced, other)

    # --- running ----------------------------------------------------------------------------------

    def tokens(
        self, call: Call, *, rows: int = 1, slab: Slab | None = None
    ) -> Iterator[tuple[Writer, int]]:
        """Each id with what it belongs to, as it is chosen; so many prompts at a time.

        With a `slab` of one row the only prompt is read into that. However it ends, every
        continuation has a finish reason after it.
        """
        writers = {id(writer.one): writer for writer in call.writers}
        reading = self.reading(call.interrupt, call.progress)
        ones = [writer.one for writer in call.writers]
        with self.under_way(call.interrupt):
            try:
                with self._slab(ones, min(rows, len(ones)), slab, reading) as own:
                    for one, token in write(reading, ones, own):
                        writer = writers[id(one)]
                        if writer.first_token is None:
                            writer.first_token = time.monotonic()
                        yield writer, token
            except Interrupted:
                pass
            finally:
                for one in ones:
                    if one.finish_reason is None:
                        one.end(call.interrupt.reason or "cancelled")

    def pieces(
        self, call: Call, *, rows: int = 1, slab: Slab | None = None
    ) -> Iterator[tuple[Writer, str]]:
        """The same as text: each piece when its characters are whole."""
        for writer, token in self.tokens(call, rows=rows, slab=slab):
            if piece := writer.push(token):
                yield writer, piece
        for writer in call.writers:
            if piece := writer.flush():
                yield writer, piece

    def reading(self, interrupt: Interrupt, progress: Progress | None = None) -> Reading:
        """How a call reads."""
        return Reading(self.decoder, interrupt, progress, exact=self._reuse != "all")

    @contextmanager
    def whole(self) -> Iterator[Interrupt]:
        """A call that gives all or nothing. Raises CancelledError where `cancel` ends it."""
        interrupt = Interrupt()
        try:
            with self.under_way(interrupt):
                yield interrupt
        except Interrupted as e:
            raise CancelledError(
                "this call to go on", found="Generator.cancel()", do="call again for its result"
            ) from e

    @contextmanager
    def row_for(
        self, ids: Sequence[int], capacity: int, interrupt: Interrupt
    ) -> Iterator[tuple[Reading, Row]]:
        """A row to read a text into, with what is known of it already, and how to read."""
        reading = self.reading(interrupt)
        slab = self.shelf.lend_for(ids, capacity, reading)
        try:
            yield reading, slab.rows[0]
        finally:
            self.shelf.take_back(slab)

    def beams(self, prompt: list[int], config: GenerationConfig, call: Call) -> list[Generation]:
        """The results of a beam search, the best first."""
        reading = self.reading(call.interrupt, call.progress)
        deadline = None if config.max_time is None else call.began + config.max_time
        room = self._room(prompt, config)
        beams = BeamSearch(config, prompt, self.tokenizer.eos_token_ids, room=room)
        with self.under_way(call.interrupt):
            slab = self.shelf.lend(len(prompt) + room, config.num_beams)
            try:
                found = search(reading, prompt, beams, slab, deadline)
            except Interrupted:
                reason = call.interrupt.reason or "cancelled"
                found = beams.result(config.num_return_sequences, reason)
            finally:
                self.shelf.take_back(slab)
        return [self._generation(prompt, beam, call) for beam in found]

    def cancel(self) -> None:
        """End every call that is under way."""
        with self._lock:
            under_way = list(self.listed)
        for interrupt in under_way:
            interrupt.cancel()

    def _generation(self, prompt: list[int], beam: Beam, call: Call) -> Generation:
        total = time.monotonic() - call.began
        return Generation(
            text=self.tokenizer.decode(beam.ids),
            prompt_ids=tuple(prompt),
            ids=beam.ids,
            finish_reason=beam.finish_reason or "length",
            score=beam.score,
            timings=Timings(None, total, len(prompt), len(beam.ids)),
        )

    @contextmanager
    def under_way(self, interrupt: Interrupt) -> Iterator[None]:
        """What `cancel` ends."""
        with self._lock:
            self.listed.add(interrupt)
        try:
            interrupt.begin()
            yield
        finally:
            with self._lock:
                self.listed.discard(interrupt)
            interrupt.close()

    @contextmanager
    def _slab(
        self, ones: Sequence[Continuation], rows: int, given: Slab | None, reading: Reading
    ) -> Iterator[Slab]:
        if given is not None:
            yield given
            return
        context = self.decoder.context
        capacity = min(context, max(len(one.prompt) + one.room for one in ones))
        if rows > 1:
            slab = self.shelf.lend(capacity, rows)
        elif self._reuse == "none":
            slab = self.shelf.lend(capacity)
        else:
            slab = self.shelf.lend_for(ones[0].prompt, capacity, reading)
        try:
            yield slab
        finally:
            self.shelf.take_back(slab)


def check_prompt(ids: Sequence[int], vocab_size: int) -> None:
    """Raises PromptError for what is no prompt of this model."""
    if not ids:
        raise PromptError("a prompt of one token or more", found="none", do="give some text")
    if not 0 <= min(ids) <= max(ids) < vocab_size:
        raise PromptError(
            f"ids from 0 to {vocab_size - 1}",
            found=f"{min(ids)} to {max(ids)}",
            do="encode the prompt with the tokenizer of this bundle",
        )


def _check_ids_of(config: GenerationConfig, vocab_size: int) -> None:
    """Raises OptionError for ids in options that the model has not."""
    given: dict[str, list[int]] = {
        "bad_words_ids": [token for word in config.bad_words_ids for token in word],
        "logit_bias": [token for token, _ in config.logit_bias],
    }
    for name, ids in given.items():
        if ids and max(ids) >= vocab_size:
            raise OptionError(
                f"{name} below {vocab_size}", found=str(max(ids)), do="use this bundle's ids"
            )
