"""GenerationConfig: how to continue a prompt, as data, checked once where it enters.

Names and meanings are those of Hugging Face's GenerationConfig.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from gptrt.errors import OptionError


@dataclass(frozen=True)
class GenerationConfig:
    """Options of one generation. None means that the option is off.

    Greedy is the default. A temperature above 0, or any of top_k, top_p, min_p, typical_p, means
    sampling; temperature 0 means greedy. `do_sample` says it outright and must not contradict.
    `max_time` is in seconds. `seed` None draws a fresh one.
    """

    max_new_tokens: int = 256
    min_new_tokens: int = 0
    do_sample: bool | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    typical_p: float | None = None
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    bad_words_ids: tuple[tuple[int, ...], ...] = ()
    stop_strings: tuple[str, ...] = ()
    max_time: float | None = None
    seed: int | None = None

    @classmethod
    def from_options(cls, **options: Any) -> GenerationConfig:
        """Build from keyword options, refusing the unknown and the impossible, all at once.

        >>> GenerationConfig.from_options(temperature=0.8, stop_strings="\\n").stop_strings
        ('\\n',)
        """
        known = [f.name for f in fields(cls)]
        faults = [_unknown(name, known) for name in options if name not in known]
        values = {name: _plain(name, value) for name, value in options.items() if name in known}
        faults += [fault for name, value in values.items() if (fault := _fault(name, value))]
        if not faults:
            faults = cls(**values)._contradictions()
        if faults:
            raise OptionError(
                "valid generation options", found="; ".join(faults), do="correct or leave them out"
            )
        return cls(**values)

    @property
    def sampling(self) -> bool:
        """Whether ids are drawn, rather than the most likely one taken."""
        if self.do_sample is not None:
            return self.do_sample
        return self.temperature != 0 and self._asks_for_sampling()

    def _asks_for_sampling(self) -> bool:
        filters = (self.temperature, self.top_k, self.top_p, self.min_p, self.typical_p)
        return any(value is not None for value in filters)

    def _contradictions(self) -> list[str]:
        found = []
        if self.do_sample is False and self.temperature != 0 and self._asks_for_sampling():
            found.append("do_sample=False with options that only sampling has")
        if self.do_sample and self.temperature == 0:
            found.append("do_sample=True with temperature=0")
        if self.min_new_tokens > self.max_new_tokens:
            found.append(f"min_new_tokens {self.min_new_tokens} > max_new_tokens {self.max_new_tokens}")
        return found


def _unknown(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, 1)
    hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"
    return f"unknown option {name} ({hint})"


def _plain(name: str, value: Any) -> Any:
    """Accept the shapes that people write: one string, lists of lists."""
    if name == "stop_strings":
        return (value,) if isinstance(value, str) else _tuple(value)
    if name == "bad_words_ids":
        return tuple(_tuple(ids) for ids in value) if isinstance(value, list | tuple) else value
    return value


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list | tuple) else value


def _integer(low: int) -> Callable[[Any], bool]:
    return lambda v: isinstance(v, int) and not isinstance(v, bool) and v >= low


def _number(accept: Callable[[float], bool]) -> Callable[[Any], bool]:
    return lambda v: (
        isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v) and accept(v)
    )


def _or_none(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda v: v is None or check(v)


_STRINGS = (
    lambda v: isinstance(v, tuple) and all(isinstance(s, str) and s for s in v),
    "strings that are not empty",
)
_ID_LISTS = (
    lambda v: isinstance(v, tuple)
    and all(isinstance(w, tuple) and w and all(map(_integer(0), w)) for w in v),
    "lists of token ids",
)
_SHARE = "a number above 0, at most 1"

# What each option may be: the check, and how to say it.
_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "max_new_tokens": (_integer(1), "an integer of 1 or more"),
    "min_new_tokens": (_integer(0), "an integer of 0 or more"),
    "do_sample": (_or_none(lambda v: isinstance(v, bool)), "True or False"),
    "temperature": (_or_none(_number(lambda v: v >= 0)), "a number of 0 or more"),
    "top_k": (_or_none(_integer(1)), "an integer of 1 or more"),
    "top_p": (_or_none(_number(lambda v: 0 < v <= 1)), _SHARE),
    "min_p": (_or_none(_number(lambda v: 0 <= v <= 1)), "a number from 0 to 1"),
    "typical_p": (_or_none(_number(lambda v: 0 < v <= 1)), _SHARE),
    "repetition_penalty": (_number(lambda v: v > 0), "a number above 0"),
    "no_repeat_ngram_size": (_integer(0), "an integer of 0 or more"),
    "bad_words_ids": _ID_LISTS,
    "stop_strings": _STRINGS,
    "max_time": (_or_none(_number(lambda v: v > 0)), "a number of seconds above 0"),
    "seed": (_or_none(_integer(0)), "an integer of 0 or more"),
}


def _fault(name: str, value: Any) -> str | None:
    check, wanted = _RULES[name]
    return None if check(value) else f"{name}={value!r}, wanted {wanted}"
