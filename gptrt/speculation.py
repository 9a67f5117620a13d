"""Guessing ids ahead, so that one pass decides on several: what is guessed right costs nothing.

A guess is a draft of what will be chosen. It is read together with the last id, and each id of it
counts as far as the choice that the model then makes is the same. So guesses change when logits are
computed and never what is chosen from them: with a seed the draw for each step is what it is.
(https://arxiv.org/abs/2211.17192 accepts by chance instead, which leaves the distribution, but not
the text of a seed, as it was.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

_NGRAM = 3  # ids that must agree for what followed them to be a guess
_FIRST_GUESS = 4  # ids, until it is known how often guesses come true
_LONGEST_PAUSE = 64  # steps without a guess, after guesses that failed


class Drafter(Protocol):
    """Guesses what a sequence goes on with."""

    def propose(self, ids: Sequence[int], room: int) -> list[int]:
        """At most `room` ids that may follow `ids`; none if there is nothing to go by."""

    @property
    def learn(self) -> Callable[[int, int], None]:
        """Told after each guess how many ids it had, and how many of them came true."""


class Pace:
    """How many ids to guess: more while guesses come true, fewer when they do not; after a whole
    failure none for a while, each time twice as long, so that guessing in vain costs little."""

    def __init__(self, longest: int) -> None:
        self._longest = longest
        self._size = min(_FIRST_GUESS, longest)
        self._pause = self._waiting = 0

    def next(self) -> int:
        """How many to guess in this step."""
        if self._waiting:
            self._waiting -= 1
            return 0
        return self._size

    def learn(self, guessed: int, accepted: int) -> None:
        if accepted == guessed:
            self._size = min(2 * self._size, self._longest)
        else:
            self._size = max(1, (self._size + accepted) // 2)
        self._pause = 0 if accepted else min(max(1, 2 * self._pause), _LONGEST_PAUSE)
        self._waiting = self._pause


class PromptLookup:
    """What followed the last time that the last few ids occurred, in the prompt or after it.

    https://github.com/apoorvumang/prompt-lookup-decoding
    """

    def __init__(self, longest: int) -> None:
        self._pace = Pace(longest)
        self.learn = self._pace.learn
        self._seen: dict[tuple[int, ...], int] = {}  # where what follows an n-gram begins
        self._indexed = 0  # ids

    def propose(self, ids: Sequence[int], room: int) -> list[int]:
        for end in range(max(self._indexed, _NGRAM), len(ids)):
            self._seen[tuple(ids[end - _NGRAM : end])] = end
        self._indexed = len(ids)
        start = self._seen.get(tuple(ids[-_NGRAM:]))
        size = 0 if start is None else min(self._pace.next(), room)
        return [] if start is None else list(ids[start : start + size])


class Forced:
    """What a constraint leaves no choice about, before what another drafter guesses."""

    def __init__(self, forced: Callable[[], list[int]], other: Drafter | None) -> None:
        self._forced, self._other = forced, other
        self._certain = False  # the last guess was

    def propose(self, ids: Sequence[int], room: int) -> list[int]:
        forced = self._forced()[:room]
        self._certain = bool(forced)
        if forced or self._other is None:
            return forced
        return self._other.propose(ids, room)

    def learn(self, guessed: int, accepted: int) -> None:
        if self._other is not None and not self._certain:
            self._other.learn(guessed, accepted)
