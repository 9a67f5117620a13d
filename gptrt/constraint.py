"""What a text can be made to follow: a JSON schema, a pattern or a grammar. Data alone; how it is
followed is in `guide`."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from gptrt.errors import OptionError, first_line


@dataclass(frozen=True, init=False)
class JsonSchema:
    """A JSON schema: a mapping, a bool or its JSON text. Properties are written in its order.

    >>> JsonSchema({"type": "integer"}) == JsonSchema('{ "type": "integer" }')
    True
    """

    text: str

    def __init__(self, schema: Mapping[str, Any] | bool | str) -> None:
        try:
            value = json.loads(schema) if isinstance(schema, str) else schema
            value = dict(value) if isinstance(value, Mapping) else value
            text = json.dumps(value, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as e:
            raise refused("a JSON schema", first_line(e)) from e
        if not isinstance(value, dict | bool):
            raise refused("a JSON schema, which is an object or a bool", text[:60])
        object.__setattr__(self, "text", text)


@dataclass(frozen=True)
class Regex:
    """A pattern that the whole text matches, in the syntax of Rust's regex: it has no look-around,
    and \\d are the digits of every script."""

    text: str

    def __post_init__(self) -> None:
        _check_text("a pattern", self.text)


@dataclass(frozen=True)
class Grammar:
    """A context-free grammar in llguidance's variant of Lark, from its rule `start`.

    https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md
    """

    text: str

    def __post_init__(self) -> None:
        _check_text("a grammar", self.text)


Constraint = JsonSchema | Regex | Grammar

# One way to lay JSON out: a choice would only be a chance to ramble.
_LAYOUT = {"item_separator": ", ", "key_separator": ": ", "whitespace_flexible": False}
# As \uXXXX a name that has a schema would pass for one that has none.
_ESCAPES = {"json_allowed_escapes": 'nrbtf\\"'}


def source(constraint: Constraint) -> str:
    """The constraint as llguidance reads it. A schema's own "x-guidance" wins over our layout."""
    from llguidance import LLMatcher

    if isinstance(constraint, Regex):
        return LLMatcher.grammar_from_regex(constraint.text)
    if isinstance(constraint, Grammar):
        return LLMatcher.grammar_from_lark(constraint.text)
    schema = each_part(json.loads(constraint.text), _as_it_can_be_kept)
    if isinstance(schema, bool):
        schema = {} if schema else {"anyOf": [False]}
    layout = _LAYOUT if "\\u" in constraint.text else _LAYOUT | _ESCAPES
    return LLMatcher.grammar_from_json_schema(schema, defaults=layout)  # type: ignore[arg-type]


# A label of a host's name has at most 63 characters and all of it 253 (RFC 1034, 3.1), which
# llguidance does not count. So labels of 30, and 8 of them: 247.
_LABEL = "[A-Za-z0-9]([A-Za-z0-9-]{0,28}[A-Za-z0-9])?"
_HOSTNAME = rf"^{_LABEL}(\.{_LABEL}){{0,7}}$"
_VALUES = ("enum", "const", "default", "examples")  # keys behind which no schemas stand
_NAMES = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")  # by name


def each_part(schema: Any, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Any:
    """A schema with every object in it that is one changed, the innermost first."""
    if isinstance(schema, list):
        return [each_part(part, change) for part in schema]
    if not isinstance(schema, dict):
        return schema
    inner = dict(schema)
    for key, value in schema.items():
        if key in _NAMES and isinstance(value, dict):
            inner[key] = {name: each_part(part, change) for name, part in value.items()}
        elif key not in _VALUES:
            inner[key] = each_part(value, change)
    return change(inner)


def _as_it_can_be_kept(schema: dict[str, Any]) -> dict[str, Any]:
    _check_names(schema)
    return _with_short_names(schema)


def _check_names(schema: dict[str, Any]) -> None:
    """llguidance counts properties as they are written: where names are free, the same one again
    and again would do, of which a reader keeps the last."""
    least, required = schema.get("minProperties"), schema.get("required")
    known = len(set(map(str, required))) if isinstance(required, list) else 0
    free = schema.get("additionalProperties", True) is not False or schema.get("patternProperties")
    if free and isinstance(least, int) and least > known + 1:
        raise refused(
            f"minProperties of at most {known + 1}, one more than required, where names are free",
            f"{least}",
        )


def _with_short_names(schema: dict[str, Any]) -> dict[str, Any]:
    """The same, but with a pattern for hostnames, none of which is too long."""
    if schema.get("format") != "hostname" or "pattern" in schema:
        return schema
    return {k: v for k, v in schema.items() if k != "format"} | {"pattern": _HOSTNAME}


def _check_text(wanted: str, text: Any) -> None:
    if not isinstance(text, str):
        raise refused(f"{wanted}, a text", repr(text)[:60])


def refused(wanted: str, found: str) -> OptionError:
    """That a constraint is none."""
    return OptionError(wanted, found=found, do="correct the constraint")
