"""Sessions: a text in the making, which the application appends to, lets the model continue, takes
back, forks, and saves."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal, Self

from gptrt.asked import check_controls, config_of, refuse_many
from gptrt.calls import check_prompt
from gptrt.config import GenerationConfig
from gptrt.errors import GptrtError, PromptError, SessionError
from gptrt.generator import Generator, Prompt
from gptrt.interrupt import Cancellation, Interrupt, Interrupted
from gptrt.reading import Progress, Slab
from gptrt.results import Generation
from gptrt.session_file import VERSION, Header, damaged, read_session, write_session
from gptrt.stream import Stream


class Session:
    """A text in the making.

    `context_overflow` says what happens where the context is full, here and in `generate`: "stop"
    refuses more text, "slide" lets the beginning go, as `GenerationConfig` says.

    It belongs to one thread at a time: what comes meanwhile from another raises SessionError. The
    generator may be used beside it, and by other sessions.

    >>> session = Session(generator)
    >>> session.append("Once upon a time")
    >>> session.generate(max_new_tokens=20)
    >>> other = session.fork()
    """

    def __init__(
        self, generator: Generator, *, context_overflow: Literal["stop", "slide"] = "stop"
    ) -> None:
        GenerationConfig(context_overflow=context_overflow)  # refuses what is no policy
        self._policy = {"context_overflow": context_overflow}
        self._generator = generator
        self._ids: list[int] = []
        self._slab: Slab | None = None
        self._stream: weakref.ref[Stream] | None = None  # the latest
        self._busy = threading.Lock()

    @property
    def ids(self) -> tuple[int, ...]:
        return tuple(self._ids)

    @property
    def text(self) -> str:
        """All of it, what was appended and what was generated."""
        return self._generator.tokenizer.decode(self._ids)

    def __len__(self) -> int:
        """In ids."""
        return len(self._ids)

    def append(
        self,
        text: Prompt,
        *,
        cancellation: Cancellation | None = None,
        progress: Progress | None = None,
    ) -> None:
        """Go on with a text, or with ids. It is read at once, so that `generate` begins soon; what
        was cancelled on the way is read then.

        Raises PromptError where the context has no room for it. After any error the session is as
        it was.
        """
        with self._alone():
            new = self._encoded(text)
            check_prompt(new, self._generator.decoder.vocab_size)
            fits = len(self._ids) + len(new) <= self._context
            if not fits and self._policy["context_overflow"] == "stop":
                raise PromptError(
                    f"at most {self._context - len(self._ids)} tokens more in this session",
                    found=f"{len(new)}",
                    do="rewind it, append less, or make it with context_overflow='slide'",
                )
            check_controls(cancellation, progress)
            before = len(self._ids)
            self._ids += new
            try:
                if fits:
                    self._read(cancellation, progress)
            except BaseException:
                del self._ids[before:]
                raise

    def generate(self, *, config: GenerationConfig | None = None, **options: Any) -> str:
        """What the model continues the text with; it becomes part of it. Options as those of
        `Generator.generate`."""
        return self.complete(config=config, **options).text

    def complete(self, *, config: GenerationConfig | None = None, **options: Any) -> Generation:
        """The same with its ids, and why it ended."""
        with self.stream(config=config, **options) as stream:
            for _ in stream:
                pass
            return stream.result

    def stream(self, *, config: GenerationConfig | None = None, **options: Any) -> Stream:
        """The same in pieces. What was generated when the stream is left is part of the text; the
        session is taken from its first piece on. A `config` brings its own `context_overflow`."""
        asked = config_of(config, self._policy | options if config is None else options)
        refuse_many(asked, whose="the generator's ")
        results: list[Callable[[], Generation]] = []

        def pieces() -> Iterator[str]:
            with self._alone():
                slab = self._grown(min(len(self._ids) + asked.max_new_tokens, self._context))
                inner, one = self._generator.stream_into(slab, self._ids, asked, options)
                results.append(lambda: inner.result)
                try:
                    yield from inner
                finally:
                    inner.close()
                    self._ids += one.ids

        def result() -> Generation:
            return results[0]() if results else Generation("", self.ids, (), "cancelled")

        stream = Stream(pieces(), result)
        self._stream = weakref.ref(stream)
        return stream

    def rewind(self, length: int) -> None:
        """Forget all but the first `length` ids. Raises PromptError if there are fewer."""
        with self._alone():
            if type(length) is not int or not 0 <= length <= len(self._ids):
                raise PromptError(
                    f"a length from 0 to {len(self._ids)}", found=repr(length), do="correct it"
                )
            del self._ids[length:]

    def fork(self) -> Session:
        """Another session that begins with the same text; both go on independently."""
        with self._alone():
            twin = Session(self._generator)
            twin._policy = self._policy
            twin._ids = list(self._ids)
            calls = self._generator.calls
            if self._slab is not None:
                row = self._slab.rows[0]
                twin._slab = calls.shelf.lend(self._slab.capacity)
                twin._slab.rows[0].become(row, len(row.ids))
            return twin

    def close(self) -> None:
        """Let go of its memory. The text stays, and is read again if it is needed."""
        with self._alone():
            if self._slab is not None:
                with suppress(GptrtError):  # of a closed generator, which keeps nothing
                    self._generator.calls.shelf.take_back(self._slab)
                self._slab = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        stream = None if self._stream is None else self._stream()
        if stream is not None:  # that was left, by an exception perhaps, which is to be seen
            with suppress(ValueError):  # in another thread: `close` says so
                stream.close()
        self.close()

    # --- on disk ----------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write text, keys and values into one file; either all of it or nothing. Raises
        SessionError for a decoder that cannot be told from others."""
        with self._alone():
            row = self._slab.rows[0] if self._slab is not None else None
            read = row.common(self._ids) if row is not None else 0
            exact = min(read, row.exact) if row is not None else 0
            model = _fingerprint(self._generator)
            header = Header(VERSION, model, tuple(self._ids), read, exact)
            values = row.cache.buffers.read(read) if row is not None else b""
            write_session(Path(path), header, values)

    @classmethod
    def load(
        cls,
        generator: Generator,
        path: str | os.PathLike[str],
        *,
        context_overflow: Literal["stop", "slide"] = "stop",
    ) -> Session:
        """The session that was saved. Raises SessionError for a file that is damaged, of another
        version, or of another model."""
        header, values = read_session(Path(path))
        model = _fingerprint(generator)
        if header.model != model:
            raise SessionError(
                f"a session of this model, {model[:16]}…",
                found=f"one of {header.model[:16]}…",
                do="open it with the bundle that it was saved with",
            )
        self = cls(generator, context_overflow=context_overflow)
        self._ids = list(header.ids)
        vocab_size, context = generator.decoder.vocab_size, generator.decoder.context
        if any(not 0 <= token < vocab_size for token in header.ids) or header.read > context:
            raise damaged(path, "ids or lengths that the model has not")
        if header.read:
            self._slab = generator.calls.shelf.lend(header.read)
            row = self._slab.rows[0]
            try:
                row.cache.buffers.write(values, header.read)
            except ValueError as e:
                self.close()
                raise damaged(path, str(e)) from e
            row.cache.go_to(header.read)
            row.ids, row.exact = self._ids[: header.read], header.exact
        elif values:
            raise damaged(path, "values of nothing")
        return self

    # --- inside -----------------------------------------------------------------------------------

    def _encoded(self, text: Prompt) -> list[int]:
        return self._generator.encode(text, whole=not self._ids)

    def _read(self, cancellation: Cancellation | None, progress: Progress | None) -> None:
        slab, calls = self._grown(len(self._ids)), self._generator.calls
        interrupt = Interrupt(linked=cancellation)
        with calls.under_way(interrupt), suppress(Interrupted):
            calls.reading(interrupt, progress).read(slab.rows[0], self._ids)

    def _grown(self, capacity: int) -> Slab:
        """The slab, with so much room at least."""
        shelf, capacity = self._generator.calls.shelf, min(capacity, self._context)
        if self._slab is None:
            self._slab = shelf.lend(capacity)
        elif self._slab.capacity < capacity:
            old, self._slab = self._slab, None
            # Twice as much, so that a text that grows in many parts is not copied for each.
            double = min(self._context, max(capacity, 2 * old.capacity))
            self._slab = shelf.moved(old, len(old.rows[0].ids), double, capacity)
        return self._slab

    @property
    def _context(self) -> int:
        return self._generator.decoder.context

    @contextmanager
    def _alone(self) -> Iterator[None]:
        if not self._busy.acquire(blocking=False):
            raise SessionError(
                "a session that nothing else uses",
                found="one that is generating, or in another thread",
                do="end the stream first, or fork the session for each thread",
            )
        try:
            yield
        finally:
            self._busy.release()


def _fingerprint(generator: Generator) -> str:
    fingerprint = generator.decoder.fingerprint
    if not fingerprint:
        raise SessionError(
            "a bundle, whose files are hashed, to save sessions of",
            found="a decoder that another tool exported",
            do="keep the ids, and append them to a new session",
        )
    return fingerprint
