"""How a constrained text can end: a vocabulary as llguidance takes it, and the search for a short
way to where the text is whole."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from gptrt.least import LONGEST
from gptrt.spelling import Spelling, SpellsIds

if TYPE_CHECKING:
    from llguidance import LLMatcher

Logits = NDArray[np.float32]
Mask = NDArray[np.bool_]

_ATTEMPTS = (1024, *[256] * 48, LONGEST)  # at an ending: choices until it is given up
_LIKELY = 256  # ids that are tried near the end of the room


class Vocabulary:
    """A tokenizer as llguidance takes it, and what was compiled for it.

    It holds no reference to the tokenizer that it is kept with: they go together.
    """

    def __init__(self, tokenizer: SpellsIds, size: int) -> None:
        from llguidance import LLTokenizer, TokenizerWrapper

        self.size = size
        self.eos = frozenset(token for token in tokenizer.eos_token_ids if token < size)
        self.ends = np.isin(np.arange(size), list(self.eos))
        spelling = Spelling(tokenizer, size, self.eos)
        # Without such an id llguidance adds one behind the last.
        self._end = min(self.eos, default=size)
        self._inner = LLTokenizer(TokenizerWrapper(spelling), eos_token=sorted(self.eos) or None)
        self._letters = [t for t, b in enumerate(spelling.tokens) if len(b) == 1 and b.isalpha()]
        self._in_text, self._outside, self._shortest = (
            np.array(spelling.sorted(key), np.int64)
            for key in (_closes_text, _closes_structure, len)
        )

    def matcher(self, grammar: str) -> LLMatcher:
        """What llguidance makes of a constraint, at the beginning of a text."""
        from llguidance import LLMatcher

        return LLMatcher(self._inner, grammar, log_level=0)

    def mask(self, bits: bytes) -> Mask:
        """The ids that may come next, from llguidance's bitmask."""
        packed = np.frombuffer(bits, np.uint8)
        return np.unpackbits(packed, count=self.size, bitorder="little").view(bool)

    def consumes(self, matcher: LLMatcher, token: int) -> bool:
        """Move on by an id of text, if it is allowed."""
        text = 0 <= token < self.size and token not in self.eos
        return text and matcher.try_consume_tokens([token]) == 1

    def ends_with(self, matcher: LLMatcher, ids: list[int]) -> bool:
        """Whether `ids` come next, and then the end."""
        return matcher.validate_tokens([*ids, self._end]) == len(ids) + 1

    def likely(self, mask: Mask, logits: Logits | None) -> list[int]:
        """The likeliest of the ids of text in `mask`; without logits, those likely to close it."""
        if logits is None:
            ids = self.closers(mask)
        else:
            ids = np.flatnonzero(mask & ~self.ends)
            if len(ids) > _LIKELY:
                ids = ids[np.argpartition(-logits[ids], _LIKELY)[:_LIKELY]]
            ids = ids[np.argsort(-logits[ids], kind="stable")]
        return [int(token) for token in ids[:_LIKELY]]

    def closers(self, mask: Mask) -> NDArray[np.int64]:
        """Ids in `mask`, those first that mostly close what is open."""
        in_text = self._letters and mask[self._letters].mean() > 0.4
        return _in_order(self._in_text if in_text else self._outside, mask)

    def shortest(self, mask: Mask) -> NDArray[np.int64]:
        """Ids in `mask`, those of the fewest bytes first."""
        return _in_order(self._shortest, mask)


def _in_order(order: NDArray[np.int64], mask: Mask) -> NDArray[np.int64]:
    """Of `order` those in `mask`; mostly it is enough to look among the first."""
    first = order[:2048]
    found = first[mask[first]]
    return found if len(found) else order[mask[order]]


class Finder:
    """Finds short endings: from where a text is to where it is whole.

    At every choice it takes what mostly closes. Where that leads in circles, it takes another the
    next time, and keeps to that wherever the same ids may come next: a tree that was always given
    one more branch is given a leaf, in this text and in the others under the constraint.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._turns: Counter[bytes] = Counter()  # which option to take, by the bitmask of a choice
        self._options: dict[bytes, list[int]] = {}

    def find(self, matcher: LLMatcher, limit: int) -> list[int] | None:
        """An ending of at most `limit` ids. None if there is none, or it is too well hidden."""
        kept = self._turns.copy()
        for steps in _ATTEMPTS:
            visits: Counter[bytes] = Counter()
            ids = self.walk(matcher, limit, steps, visits)
            if ids is not None or not visits:
                return ids
            circle = max(visits, key=lambda bits: visits[bits] / (1 + self._turns[bits]))
            self._turns[circle] += 1
        self._turns = kept
        return None

    def walk(
        self,
        matcher: LLMatcher,
        limit: int,
        steps: int = 256,
        visits: Counter[bytes] | None = None,
    ) -> list[int] | None:
        """Straight on by what is preferred; `visits` counts the choices."""
        ahead, ids = matcher.deep_copy(), list[int]()
        for _ in range(steps):
            if ahead.is_accepting():
                return ids
            step = ahead.compute_ff_tokens() or self._choice(
                ahead, Counter() if visits is None else visits
            )
            ids += step
            if not step or len(ids) > limit or ahead.try_consume_tokens(step) < len(step):
                return None
        return None

    def _choice(self, matcher: LLMatcher, visits: Counter[bytes]) -> list[int]:
        bits = matcher.compute_bitmask()
        visits[bits] += 1
        turn = self._turns[bits]
        if not turn:
            return self._preferred(bits)
        if bits not in self._options:
            self._options[bits] = self._preferred(bits) + self._others(matcher, bits)
        options = self._options[bits]
        return options[turn % len(options) :][:1] if options else []

    def _preferred(self, bits: bytes) -> list[int]:
        found: list[int] = self._vocabulary.closers(self._vocabulary.mask(bits))[:1].tolist()
        return found

    def _others(self, matcher: LLMatcher, bits: bytes) -> list[int]:
        """Short ids, of those with the same effect on what may come next only one."""
        effects: dict[bytes, int] = {}
        for token in self._vocabulary.shortest(self._vocabulary.mask(bits))[:_LIKELY].tolist():
            ahead = matcher.deep_copy()
            ahead.consume_token(token)
            effects.setdefault(ahead.compute_bitmask(), token)
        return list(effects.values())


def _closes_text(spelled: bytes) -> tuple[int, int]:
    """Where any letter may come next: quotes first, then words, the longest first."""
    if spelled[:1] == b'"' and not spelled[1:].strip(b"]}"):
        return 0, -len(spelled)
    return 1 if spelled.isalpha() else 2, -len(spelled)


def _closes_structure(spelled: bytes) -> tuple[int, int]:
    """Elsewhere: closing brackets first, then the plainest values, and last what opens more."""
    if not spelled.strip(b"]}"):
        return 0, -len(spelled)
    rank = b',:1234567890ntf"[{'.find(spelled[:1])
    return rank + 1 if rank >= 0 else 99, len(spelled)
