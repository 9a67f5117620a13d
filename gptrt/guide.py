"""A text that follows a constraint, whatever the model.

llguidance (https://github.com/guidance-ai/llguidance) says which ids may come next. What is added
here: the bytes that each id stands for, in every kind of tokenizer, and the closing. A model that
rambles on would leave its text open where the room for it ends, so a guide always knows an ending
that fits, and lets nothing through after which there is none.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import numpy as np

from gptrt.constraint import Constraint, refused, source
from gptrt.endings import Finder, Logits, Mask, Vocabulary
from gptrt.errors import DependencyError, OptionError, first_line
from gptrt.least import LONGEST, stride
from gptrt.spelling import SpellsIds

if TYPE_CHECKING:
    from llguidance import LLMatcher

_SEARCHED = 8  # of these, so many may need another ending than the one that is known


class Guide:
    """The state of one sequence under a constraint.

    For every new id: `filter` its logits, choose, `advance`; and stop once it is `finished`.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        finder: Finder,
        matcher: LLMatcher,
        ending: list[int],
        stride: int,
    ) -> None:
        self._vocabulary, self._finder, self._matcher = vocabulary, finder, matcher
        self._ended = False  # by an id that says so
        self._stride = stride  # by how much one id can make the shortest ending longer
        # An ending: one from here if `sure`, else from a few ids ago. `bound`: its length at most.
        self._ending, self._sure, self._bound = ending, True, float(len(ending))
        self._endings: dict[int, list[int]] = {}  # after each id that the closing let through
        self._room = math.inf
        self._mask: Mask | None = None

    @classmethod
    def compile(cls, constraint: Constraint, tokenizer: SpellsIds, vocab_size: int) -> Guide:
        """A guide at the beginning of a text. What is compiled is kept with the tokenizer.

        Raises OptionError for a constraint that is malformed or that no text can meet,
        DependencyError without llguidance.
        """
        try:
            import llguidance  # noqa: F401
        except ImportError as e:
            raise DependencyError(
                "llguidance, for constraints", found=str(e), do="pip install 'gptrt[structured]'"
            ) from e
        return _compiler(tokenizer, vocab_size)(constraint).fork()

    def fork(self) -> Guide:
        """A copy that goes its own way."""
        twin = copy.copy(self)
        twin._matcher = self._matcher.deep_copy()
        return twin

    def filter(self, logits: Logits, room: int) -> Logits:
        """Remove every id that is forbidden, or after which the text could not end in time.

        `room` is for how many ids there is room, this one included. Near its end only the
        likeliest ids are tried, and so kept. Raises OptionError where no text fits the room.
        """
        self._room = room
        mask = self._allowed()
        if self._near_the_end():
            kept = self._closing(mask, logits)
            mask = kept if kept.any() else self._closing(mask, None)
        if not mask.any():
            raise self._stuck()
        return np.where(mask, logits, np.float32(-np.inf))

    def advance(self, token: int) -> None:
        """Take note of the id that was chosen. Raises OptionError if it is forbidden here."""
        if token in self._vocabulary.eos and self._whole():
            self._ended = True
            self._ending, self._sure = [], True
        elif not self._ended and self._vocabulary.consumes(self._matcher, token):
            self._foresee(token)
        else:
            raise OptionError(
                "an id that the constraint allows", found=str(token), do="choose what filter leaves"
            )
        self._bound = len(self._ending) if self._sure else self._bound + self._stride
        self._room = max(0, self._room - 1)
        self._mask, self._endings = None, {}

    @property
    def finished(self) -> bool:
        """Whether nothing but the end of the text may follow.

        Where no id says that it ends, a whole text is also finished that has too little room left
        to become another.
        """
        if not self._whole():
            return False
        others = self._allowed() & ~self._vocabulary.ends
        if self._vocabulary.eos or not others.any():
            return not others.any()
        return self._near_the_end() and not self._closing(others, None).any()

    def forced(self) -> list[int]:
        """The ids that come next whatever the model says: a draft that is always right."""
        return [] if self._ended else self._matcher.compute_ff_tokens()

    def _whole(self) -> bool:
        return self._ended or self._matcher.is_accepting()

    def _allowed(self) -> Mask:
        """The ids that llguidance lets through, and the end of the text exactly where it is."""
        if self._mask is None:
            mask = np.zeros(self._vocabulary.size, bool)
            if not self._ended and not self._matcher.is_stopped():
                mask = self._vocabulary.mask(self._matcher.compute_bitmask())
            self._mask = np.where(self._vocabulary.ends, self._whole(), mask)
        return self._mask

    def _stuck(self) -> OptionError:
        """No id is allowed: a limit of llguidance, or the vocabulary lacks a character."""
        return OptionError(
            "a constraint that can be followed with this vocabulary",
            found=_said(self._matcher) or "none of its ids allowed",
            do="use a simpler constraint, or a model that can write all its characters",
        )

    # The closing.

    def _near_the_end(self) -> bool:
        """Whether one more id could be too many. Only then is an ending looked for."""
        if self._room <= self._bound + self._stride:
            self._find_ending()
        return self._room <= self._bound + self._stride

    def _find_ending(self) -> None:
        """Be sure of an ending from here that fits the room. Raises OptionError if there is none.

        The one that was known a few ids ago is mostly one still: a string closes as it did.
        """
        if self._whole():
            self._ending = []
        elif not self._sure and not self._vocabulary.ends_with(self._matcher, self._ending):
            self._ending = self._finder.find(self._matcher, LONGEST) or []
            if not self._ending:
                raise self._stuck()
        # What is forced is forced in the tokenizer's own ids, which another may spell otherwise.
        spelled = not self._ending or self._allowed()[self._ending[0]]
        if len(self._ending) > self._room or not spelled:
            limit = int(min(self._room, LONGEST))
            self._ending = self._finder.find(self._matcher, limit) or self._ending
        self._sure, self._bound = True, float(len(self._ending))
        if self._bound > self._room:
            raise OptionError(
                f"room for {self._bound:.0f} more tokens, to end a text as it is constrained",
                found=f"room for {self._room:.0f}",
                do="raise max_new_tokens; where the context is full, shorten the prompt",
            )

    def _closing(self, mask: Mask, logits: Logits | None) -> Mask:
        """Of the ids in `mask` those after which an ending fits: of the likely ones, that is.

        The next id of the known ending is one, and so is the end of the text where it is allowed.
        """
        endings = {self._ending[0]: self._ending[1:]} if self._ending else {}
        searches = iter(range(_SEARCHED))
        if self._room > len(self._ending):
            for token in self._vocabulary.likely(mask, logits):
                ending = None if token in endings else self._ending_after(token, searches)
                if ending is not None:
                    endings[token] = ending
        self._endings = endings
        kept = mask & self._vocabulary.ends
        kept[list(endings)] = True
        return kept

    def _ending_after(self, token: int, searches: Iterator[int]) -> list[int] | None:
        """One that fits the room, if it is known or, while `searches` last, quickly found."""
        room = int(self._room) - 1
        for known in (self._ending, self._ending[1:]):
            if len(known) <= room and self._vocabulary.ends_with(self._matcher, [token, *known]):
                return known
        if next(searches, None) is None:
            return None
        ahead = self._matcher.deep_copy()
        return self._finder.walk(ahead, room) if ahead.consume_token(token) else None

    def _foresee(self, token: int) -> None:
        """What is known of the ending once `token` was chosen."""
        if token in self._endings:
            self._ending, self._sure = self._endings[token], True
        elif self._sure and self._ending[:1] == [token]:
            self._ending = self._ending[1:]
        else:
            self._sure = False


# --- what is compiled ---------------------------------------------------------------------------

# By the tokenizer that it is for and the size of the vocabulary: kept while the tokenizer lives.
_COMPILERS: WeakKeyDictionary[SpellsIds, dict[int, Callable[[Constraint], Guide]]] = (
    WeakKeyDictionary()
)


def _compiler(tokenizer: SpellsIds, size: int) -> Callable[[Constraint], Guide]:
    sizes = _COMPILERS.setdefault(tokenizer, {})
    if size not in sizes:
        sizes[size] = lru_cache(maxsize=32)(partial(_compile, Vocabulary(tokenizer, size)))
    return sizes[size]


def _compile(vocabulary: Vocabulary, constraint: Constraint) -> Guide:
    wanted = f"a {type(constraint).__name__} that llguidance takes"
    try:
        matcher = vocabulary.matcher(source(constraint))
        most = stride(constraint)
    except (ValueError, RecursionError) as e:  # the latter where it is nested too deeply
        raise refused(wanted, first_line(e)) from e
    if matcher.is_error():
        raise refused(wanted, _said(matcher))
    finder = Finder(vocabulary)
    ending = finder.find(matcher, LONGEST)
    if ending is None:
        raise refused(
            f"a constraint that {LONGEST} tokens of this vocabulary can meet", "no way to"
        )
    return Guide(vocabulary, finder, matcher, ending, most)


def _said(matcher: LLMatcher) -> str:
    """What is wrong, in a line; where that only announces an error, with the error."""
    lines = [line.strip() for line in matcher.get_error().splitlines() if line.strip()]
    errors = [line for line in lines[1:] if line.startswith("error: ")]
    return " ".join(lines[:1] + (errors[-1:] if lines and lines[0].endswith(":") else []))
