"""How to generate: frozen options that bear the names of Hugging Face's GenerationConfig."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from numbers import Integral, Real
from typing import Any, Literal

from gptrt.constraint import Constraint
from gptrt.errors import OptionError

LogitsProcessor = Callable[[Any, Any], Any]  # (ids, logits) -> logits


def _option(default: Any, wanted: str, accepts: Callable[[Any], bool]) -> Any:
    """A field with what it wants, in words and as a test. None is right where it is the default."""
    return field(default=default, metadata={"wanted": wanted, "accepts": accepts})


def _integer(low: int, high: int = 1 << 31) -> Callable[[Any], bool]:
    return lambda v: isinstance(v, Integral) and not isinstance(v, bool) and low <= int(v) <= high


def _number(holds: Callable[[float], bool]) -> Callable[[Any], bool]:
    def accepts(value: Any) -> bool:
        try:
            return isinstance(value, Real) and not isinstance(value, bool) and holds(float(value))
        except OverflowError:  # an integer beyond all floats
            return False

    return accepts


def _bias(token: Any, value: Any) -> bool:
    return _integer(0)(token) and _number(lambda v: -1e4 <= v <= 1e4)(value)


def _tuple(accepts: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda v: isinstance(v, tuple) and all(accepts(item) for item in v)


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """Greedy unless an option asks for chance. Keywords of a call that are None were not given.

    A temperature above 0, `top_k`, `top_p`, `min_p` or `typical_p` without `do_sample` means
    sampling; temperature 0 means greedy. Sampling has no hidden filters: what is not given is off.
    `stop_strings` end the text before themselves, `seed` None takes a fresh one for each prompt.
    `max_time` and `timeout` are seconds from the call on: the id that is computed at `max_time` is
    the last; at `timeout` nothing is waited for, not even the prompt to be read.

    `logit_bias` {id: number} is added to logits; a `logits_processor`, or several, is called with
    all ids so far, int64 [n], and the logits, float32 [vocab], and returns logits. `constraint` is
    a `JsonSchema`, `Regex` or `Grammar` that the text will match. `logprobs` asks for the log
    probability of each id, `top_logprobs` for those of so many of the likeliest too: the model's
    own, before any option.

    `num_beams` searches instead of choosing one id after the other: the sequences of the largest
    sum of log probabilities over length ** `length_penalty`. `early_stopping` as in transformers:
    True at the first `num_beams` ends, False where better is unlikely, "never" where impossible.

    `prompt_lookup_num_tokens` lets so many ids at once be guessed from what the prompt and text
    have had already; `num_assistant_tokens` bounds what a draft model guesses. Guesses change the
    speed, not the distribution. `context_overflow` "slide" goes on where the context is full, from
    the last half of it, instead of "stop".

    Raises OptionError that lists every fault.

    >>> GenerationConfig(top_k=40).samples, GenerationConfig(temperature=0).samples
    (True, False)
    """

    max_new_tokens: int = _option(256, "an integer of 1 or more", _integer(1))
    min_new_tokens: int = _option(0, "an integer of 0 or more", _integer(0))
    do_sample: bool | None = _option(None, "True or False", lambda v: isinstance(v, bool))
    temperature: float | None = _option(
        None, "0 or a number from 1e-6 up", _number(lambda v: v == 0 or 1e-6 <= v < math.inf)
    )
    top_k: int | None = _option(None, "an integer of 0 (off) or more", _integer(0))
    top_p: float | None = _option(
        None, "a number above 0, at most 1", _number(lambda v: 0 < v <= 1)
    )
    min_p: float | None = _option(None, "a number from 0 to 1", _number(lambda v: 0 <= v <= 1))
    typical_p: float | None = _option(
        None, "a number above 0, at most 1", _number(lambda v: 0 < v <= 1)
    )
    repetition_penalty: float = _option(
        1.0, "a number from 1e-3 to 1e3", _number(lambda v: 1e-3 <= v <= 1e3)
    )
    no_repeat_ngram_size: int = _option(0, "an integer of 0 (off) or more", _integer(0))
    bad_words_ids: tuple[tuple[int, ...], ...] = _option(
        (), "lists of ids, none empty", _tuple(lambda v: bool(v) and _tuple(_integer(0))(v))
    )
    stop_strings: tuple[str, ...] = _option(
        (), "strings, none empty", _tuple(lambda v: isinstance(v, str) and v != "")
    )
    logit_bias: tuple[tuple[int, float], ...] = _option(
        (),
        "ids with numbers from -1e4 to 1e4",
        _tuple(lambda v: isinstance(v, tuple) and len(v) == 2 and _bias(*v)),
    )
    logits_processor: tuple[LogitsProcessor, ...] = _option((), "callables", _tuple(callable))
    constraint: Constraint | None = _option(  # noqa: RUF009
        None, "a JsonSchema, Regex or Grammar", lambda v: isinstance(v, Constraint)
    )
    num_return_sequences: int = _option(1, "an integer from 1 to 4096", _integer(1, 4096))
    num_beams: int = _option(1, "an integer from 1 to 256", _integer(1, 256))
    length_penalty: float = _option(
        1.0, "a number from -10 to 10", _number(lambda v: -10 <= v <= 10)
    )
    early_stopping: bool | Literal["never"] = _option(
        False, 'True, False or "never"', lambda v: isinstance(v, bool) or v == "never"
    )
    prompt_lookup_num_tokens: int | None = _option(None, "an integer from 1 to 64", _integer(1, 64))
    num_assistant_tokens: int = _option(5, "an integer from 1 to 64", _integer(1, 64))
    context_overflow: Literal["stop", "slide"] = _option(
        "stop", '"stop" or "slide"', lambda v: v in ("stop", "slide")
    )
    logprobs: bool = _option(False, "True or False", lambda v: isinstance(v, bool))
    top_logprobs: int = _option(0, "an integer from 0 to 1024", _integer(0, 1024))
    max_time: float | None = _option(None, "a number above 0", _number(lambda v: v > 0))
    timeout: float | None = _option(None, "a number above 0", _number(lambda v: v > 0))
    seed: int | None = _option(None, "an integer from 0 to 2**64 - 1", _integer(0, (1 << 64) - 1))

    def __post_init__(self) -> None:
        for name, value in _normal(vars(self)).items():
            object.__setattr__(self, name, value)
        _refuse(_faults(vars(self)))

    @classmethod
    def from_options(cls, **options: Any) -> GenerationConfig:
        """A config from keyword options; an unknown one is refused with the nearest known name."""
        given = {name: value for name, value in options.items() if value is not None}
        unknown = [_unknown(name) for name in given if name not in _FIELDS]
        known = {name: value for name, value in given.items() if name in _FIELDS}
        _refuse(unknown + _faults({n: f.default for n, f in _FIELDS.items()} | _normal(known)))
        return cls(**known)

    @property
    def samples(self) -> bool:
        """Whether ids are drawn by chance."""
        if self.do_sample is not None:
            return self.do_sample
        return self.temperature != 0 and bool(_given_chances(vars(self)))


_FIELDS = {f.name: f for f in fields(GenerationConfig)}
# Options that need one id after the other, which a search has not.
_NO_BEAMS = ("constraint", "prompt_lookup_num_tokens", "logprobs", "top_logprobs", "stop_strings")
# Options that mean something only where ids are drawn by chance.
_CHANCES = ("temperature", "top_k", "top_p", "min_p", "typical_p")


def _given_chances(options: Mapping[str, Any]) -> list[str]:
    return [f"{name}={options[name]}" for name in _CHANCES if options[name] is not None]


def _normal(options: Mapping[str, Any]) -> dict[str, Any]:
    """The same options, with lists, mappings and lone values as the tuples that they stand for, and
    numpy's numbers as Python's, which do not overflow."""
    result = {name: _frozen(value) for name, value in options.items()}
    if isinstance(result.get("stop_strings"), str):
        result["stop_strings"] = (result["stop_strings"],)
    if callable(result.get("logits_processor")):
        result["logits_processor"] = (result["logits_processor"],)
    return result


def _frozen(value: Any) -> Any:
    if isinstance(value, Mapping):
        value = tuple(value.items())
    if isinstance(value, list | tuple):
        return tuple(map(_frozen, value))
    if isinstance(value, bool):
        return value
    if isinstance(value, Integral):
        return int(value)
    return float(value) if isinstance(value, Real) else value


def _faults(options: Mapping[str, Any]) -> list[str]:
    """All that is wrong: each value by itself; then, if they are right, what contradicts what."""
    found = []
    for name, spec in _FIELDS.items():
        value = options[name]
        unset = value is None and spec.default is None
        if not unset and not spec.metadata["accepts"](value):
            found.append(f"{name}={value!r}, wanted {spec.metadata['wanted']}")
    return found or _contradictions(options)


def _contradictions(options: Mapping[str, Any]) -> list[str]:
    found = []
    chances = _given_chances(options)
    if options["do_sample"] is False and options["temperature"] != 0 and chances:
        found.append(f"do_sample=False contradicts {', '.join(chances)}")
    if options["do_sample"] is True and options["temperature"] == 0:
        found.append("do_sample=True contradicts temperature=0")
    if options["min_new_tokens"] > options["max_new_tokens"]:
        found.append("min_new_tokens is above max_new_tokens")
    if options["num_beams"] > 1:
        found += [f"num_beams contradicts {name}" for name in _NO_BEAMS if options[name]]
        if options["do_sample"] or (options["temperature"] != 0 and chances):
            found.append("num_beams contradicts sampling")
        if options["num_return_sequences"] > options["num_beams"]:
            found.append("num_return_sequences is above num_beams")
        if options["context_overflow"] == "slide":
            found.append("num_beams contradicts context_overflow='slide'")
    return found


def _unknown(name: str) -> str:
    near = difflib.get_close_matches(name, _FIELDS, n=1)
    return f"unknown option {name!r}" + (f" (did you mean {near[0]!r}?)" if near else "")


def _refuse(faults: list[str]) -> None:
    if faults:
        raise OptionError(
            "generation options that can be honoured",
            found="; ".join(faults),
            do=f"correct or leave them out; the options are {', '.join(_FIELDS)}",
        )
