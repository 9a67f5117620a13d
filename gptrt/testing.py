"""For the tests of an application: a generator without a model, which knows its answers by heart.

    from gptrt.testing import FakeGenerator

    generator = FakeGenerator({"Hello": " there.", "Bye": " now."})
    assert generator.generate("Hello") == " there."

Everything else is real: options, streams, stop strings, sessions, batches, cancelling, errors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from gptrt.cache import KVCache
from gptrt.decoder import (
    Hidden,
    Ids,
    Logits,
    check_capacity,
    check_ids,
    no_hidden_states,
)
from gptrt.generator import Generator, Prompt
from gptrt.interrupt import Interrupt
from gptrt.task import Task
from gptrt.tokenizer import Tokenizer, byte_values

if TYPE_CHECKING:
    import tokenizers

EOS = 256
VOCAB = 257  # bytes and the end of text
_CERTAIN = 1e4  # the logit of what comes next: at no usual temperature anything else does

Predict = Callable[[list[int]], Logits]


class FakeGenerator(Generator):
    """Continues a prompt with the answer that `answers` has for it, a mapping or a function, then
    ends; a prompt that it does not know with nothing. Tokens are bytes.

    Of several prompts in a mapping that begin a text the longest counts. With a `task` it is as if
    it had been fine-tuned for that.
    """

    def __init__(
        self,
        answers: Mapping[str, str] | Callable[[str], str],
        *,
        context: int = 1 << 16,
        task: Task | None = None,
    ) -> None:
        self._answer = answers if callable(answers) else _looked_up(answers)
        self._known: list[list[int]] = []  # prompts with their answers
        self._set_up(FakeDecoder(self._predict, context=context), byte_tokenizer(), task=task)

    def encode(self, prompt: Prompt, *, whole: bool = True) -> list[int]:
        ids = super().encode(prompt, whole=whole)
        told = [*ids, *self._answer(self.tokenizer.decode(ids)).encode(), EOS]
        self._known = [told, *(known for known in self._known if known != told)]
        return ids

    def _predict(self, seen: list[int]) -> Logits:
        """By the last prompt that fits."""
        n = len(seen)
        fits = (known[n] for known in self._known if len(known) > n and known[:n] == seen)
        logits = np.zeros(VOCAB, np.float32)
        logits[next(fits, EOS)] = _CERTAIN
        return logits


class FakeDecoder:
    """A model that is a function: `predict(ids read so far)` gives the logits of the next id.

    `passes` are the ids that each run took, by row.
    """

    vocab_size = VOCAB
    fingerprint = "fake"

    def __init__(self, predict: Predict, *, context: int = 64) -> None:
        self.predict = predict
        self.context = context
        self.passes: list[int] = []

    def new_cache(self, capacity: int, batch: int = 1) -> KVCache:
        check_capacity(capacity, self.context)
        return KVCache.empty(batch, capacity, _Seen([[] for _ in range(batch)]))

    def cache_bytes(self, capacity: int, batch: int = 1) -> int:
        return 8 * capacity * batch

    def run(
        self,
        ids: Ids | Sequence[Sequence[int]],
        cache: KVCache,
        *,
        keep: int = 1,
        interrupt: Interrupt | None = None,
    ) -> Logits:
        _, new = check_ids(ids, cache)
        if interrupt is not None:
            interrupt.check()
        rows: list[list[int]] = cache.buffers.each  # type: ignore[attr-defined]
        logits = []
        for seen, row, filled in zip(rows, ids, cache.filled, strict=True):
            seen[filled.length :] = [int(token) for token in row]
            kept = range(len(seen) - (min(keep, new) or new), len(seen))
            logits.append([self.predict(seen[: i + 1]) for i in kept])
        self.passes.append(new)
        cache.advance(new)
        return np.array(logits, np.float32)

    def hidden_states(
        self, ids: Sequence[int], cache: KVCache, *, interrupt: Interrupt | None = None
    ) -> Hidden:
        del ids, cache, interrupt
        raise no_hidden_states()


class _Seen:
    """A cache that remembers ids."""

    def __init__(self, each: list[list[int]]) -> None:
        self.each = each

    def rows(self, start: int, stop: int) -> _Seen:
        return _Seen(self.each[start:stop])

    def copy_row(self, source: _Seen, start: int, stop: int) -> None:
        self.each[0][start:] = source.each[0][start:stop]

    def read(self, length: int) -> bytes:
        return np.array(self.each[0][:length], np.int64).tobytes()

    def write(self, data: bytes, length: int) -> None:
        if len(data) != 8 * length:
            raise ValueError(f"{len(data)} bytes instead of {8 * length}")
        self.each[0][:] = np.frombuffer(data, np.int64).tolist()


def byte_tokenizer(eos_token_ids: Sequence[int] = (EOS,)) -> Tokenizer:
    """One token a byte, the byte's value its id."""
    return Tokenizer(_byte_level(), eos_token_ids)


def _byte_level() -> tokenizers.Tokenizer:
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    inner = tokenizers.Tokenizer(models.BPE(byte_values(), []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(["<|endoftext|>"])
    return inner


def _looked_up(answers: Mapping[str, str]) -> Callable[[str], str]:
    by_length = sorted(answers, key=len, reverse=True)

    def answer(text: str) -> str:
        prompt = next((p for p in by_length if text.startswith(p)), None)
        return "" if prompt is None else answers[prompt]

    return answer
