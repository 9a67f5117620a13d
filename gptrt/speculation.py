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

_NGRAMS = (3, 2)  # ids that must agree for what followed them to be a guess; the longer first
_BLIND_GUESS = 2  # ids, where none agree but a copy was just interrupted
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
            self._size = max(1, (self._size + accepted + 1) // 2)
        self._pause = 0 if accepted else min(max(1, 2 * self._pause), _LONGEST_PAUSE)
        self._waiting = self._pause


class PromptLookup:
    """What followed the last time that the last few ids occurred, in the prompt or after it
    (https://github.com/apoorvumang/prompt-lookup-decoding).

    Where a guess came true up to an id that was another, that id may be all that was changed, as in
    an edited text: a short guess goes on behind it until the last ids are found again.
    """

    def __init__(self, longest: int) -> None:
        self._pace = Pace(longest)
        self._seen: dict[tuple[int, ...], int] = {}  # where what follows an n-gram begins
        self._indexed = 0  # ids
        self._start = 0  # of the last guess
        self._behind: int | None = None  # the id at which it failed
        self._blind = False  # whether it was made by that alone

    def propose(self, ids: Sequence[int], room: int) -> list[int]:
        self._index(ids)
        size, start = self._pace.next(), self._found(ids)
        self._blind = start is None and self._behind is not None
        if self._blind:
            start, size = self._behind, min(size, _BLIND_GUESS)
        if start is None:
            return []
        self._start = start
        return list(ids[start : start + min(size, room)])

    def learn(self, guessed: int, accepted: int) -> None:
        self._behind = self._start + accepted + 1 if 0 < accepted < guessed else None
        if not self._blind:
            self._pace.learn(guessed, accepted)

    def _index(self, ids: Sequence[int]) -> None:
        """Take note of what is new, but for the last id, which nothing follows yet."""
        for end in range(max(self._indexed, min(_NGRAMS)), len(ids)):
            for size in _NGRAMS:
                self._seen[tuple(ids[max(0, end - size) : end])] = end
        self._indexed = len(ids)

    def _found(self, ids: Sequence[int]) -> int | None:
        places = (self._seen.get(tuple(ids[-size:])) for size in _NGRAMS)
        return next((place for place in places if place is not None), None)


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
