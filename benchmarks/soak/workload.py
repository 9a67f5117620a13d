"""What callers do with a generator in a day: calls of every sort, mixed by chance.

memory.py repeats it: a leak in any of them, or between two of them, shows in the slope.
"""

from __future__ import annotations

import tempfile
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from gptrt.errors import OptionError
from gptrt.generator import Generator
from gptrt.interrupt import Cancellation
from gptrt.session import Session

TEXT = "Once upon a time the old king said to the queen that the birds had flown over the hills."


def open_generator(bundle: Path) -> Generator:
    """On the CPU and one thread: nothing here is about speed."""
    return Generator(bundle, device="cpu", threads=1)


@dataclass(frozen=True)
class Workload:
    """Calls to `generator`, drawn from `rng`: the same ones in each run."""

    generator: Generator
    rng: Random = field(default_factory=lambda: Random(0))

    def run_one(self) -> None:
        """One call. The common ones come more often."""
        self.rng.choice(
            (
                *(self._text, self._text, self._ids, self._ids, self._ids),
                *(self._left_early, self._left_early, self._dropped, self._never_begun),
                *(self._batch, self._sequences, self._beams, self._score, self._refused),
                *(self._cancelled, self._session, self._session_file),
            )
        )()

    def _prompt(self) -> list[int]:
        """Mostly short. The same few come again, shorter or longer, so that caches are found."""
        decoder = self.generator.decoder
        length = 1 + int(decoder.context // 2 * self.rng.random() ** 4)
        return Random(self.rng.randrange(60)).choices(range(decoder.vocab_size), k=length)

    def _options(self) -> dict[str, Any]:
        new = 2 + int(min(24, self.generator.decoder.context // 4) * self.rng.random() ** 2)
        others: tuple[dict[str, Any], ...] = (
            {},
            {},
            {"temperature": 0.8, "top_p": 0.9, "seed": self.rng.randrange(99)},
            {"do_sample": True, "top_k": 20, "repetition_penalty": 1.1},
            {"stop_strings": ["the", "e"]},
            {"top_logprobs": 3},
            {"prompt_lookup_num_tokens": 4},
            {"no_repeat_ngram_size": 2, "min_new_tokens": 2},
            {"context_overflow": "slide"},
            {"timeout": 0.002},
        )
        return {"max_new_tokens": new, **self.rng.choice(others)}

    def _text(self) -> None:
        self.generator.generate(TEXT[: 1 + self.rng.randrange(len(TEXT))], **self._options())

    def _ids(self) -> None:
        self.generator.complete(self._prompt(), **self._options())

    def _left_early(self) -> None:
        with self.generator.stream(self._prompt(), **self._options()) as stream:
            for _ in range(self.rng.randrange(4)):
                next(stream, None)

    def _dropped(self) -> None:
        """Begun, and neither read to its end nor closed."""
        next(self.generator.tokens(self._prompt(), max_new_tokens=9), None)

    def _never_begun(self) -> None:
        self.generator.stream(self._prompt(), cancellation=Cancellation())

    def _batch(self) -> None:
        prompts = [self._prompt() for _ in range(1 + self.rng.randrange(4))]
        self.generator.generate_batch(prompts, batch_size=3, **self._options())

    def _sequences(self) -> None:
        prompts = [self._prompt()]
        self.generator.complete_batch(
            prompts, num_return_sequences=3, do_sample=True, max_new_tokens=4
        )

    def _beams(self) -> None:
        self.generator.complete(self._prompt(), num_beams=3, max_new_tokens=5)

    def _score(self) -> None:
        self.generator.score(self._prompt(), [[1, 2], [3]])

    def _refused(self) -> None:
        unknown = self.generator.decoder.vocab_size
        with suppress(OptionError):
            self.generator.generate(self._prompt(), bad_words_ids=[[unknown]])

    def _cancelled(self) -> None:
        stop = Cancellation()
        with self.generator.stream(self._prompt(), max_new_tokens=9, cancellation=stop) as stream:
            next(stream, None)
            stop.cancel()
            list(stream)

    def _session(self) -> None:
        with Session(self.generator, context_overflow="slide") as session:
            session.append(self._prompt())
            session.generate(**self._options())
            session.rewind(self.rng.randrange(len(session)))
            session.append([1, 2, 3])
            with session.fork() as other, other.stream(max_new_tokens=5) as stream:
                next(stream, None)
            session.generate(max_new_tokens=2)

    def _session_file(self) -> None:
        with tempfile.TemporaryDirectory() as folder, Session(self.generator) as session:
            path = Path(folder) / "session"
            session.append(self._prompt())
            session.save(path)
            with Session.load(self.generator, path) as other:
                other.generate(max_new_tokens=2)
