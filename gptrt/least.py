"""How much text a constraint asks for at the least: guesses, in bytes, never far too low."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import unquote

from gptrt.constraint import Constraint, JsonSchema, each_part

LONGEST = 4096  # ids: what takes more to end is refused
_SLACK, _SCALAR, _FORMAT = 16, 5, 40
_BOUNDS = {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"}


def stride(constraint: Constraint) -> int:
    """By how many ids a single one can put off the end, at most: the length in bytes of the largest
    thing that it can begin, where that has its least size, and a little for several at once.

    For patterns and grammars this is only a guess by their longest line.
    """
    if isinstance(constraint, JsonSchema):
        return _SLACK + _largest_part(json.loads(constraint.text))
    return _SLACK + max(_least_match(line) for line in constraint.text.splitlines() or [""])


def _largest_part(schema: Any) -> int:
    """Of all parts of a schema, the size of the largest in its smallest form."""
    parts: list[dict[str, Any]] = []

    def kept(part: dict[str, Any]) -> dict[str, Any]:
        parts.append(part)
        return part

    each_part(schema, kept)
    sizes = {part["$ref"]: math.inf for part in parts if isinstance(part.get("$ref"), str)}
    for _ in range(len(sizes)):  # a part that refers to itself ends in some other way
        sizes = {ref: _least(_referred(schema, ref), sizes) for ref in sizes}
    found = (_least(part, sizes) for part in parts)
    return int(max((size for size in found if size < math.inf), default=0))


def _referred(schema: Any, reference: str) -> Any:
    """What a reference points to; anything, where that is not simply a place in the schema."""
    for key in reference.removeprefix("#").split("/")[1:]:
        key = unquote(key).replace("~1", "/").replace("~0", "~")
        found = (
            {str(i): part for i, part in enumerate(schema)} if isinstance(schema, list) else schema
        )
        schema = found.get(key, True) if isinstance(found, dict) else True
    return schema


def _least(schema: Any, sizes: Mapping[str, float]) -> float:
    """The bytes of the smallest JSON that meets a schema, or more: the sum of all it asks for."""
    if not isinstance(schema, dict):
        return _SCALAR
    values = [schema["const"]] if "const" in schema else _list(schema, "enum")
    size: float = _SCALAR + max((len(json.dumps(value)) for value in values), default=0)
    size += 2 * _SCALAR * len(schema.keys() & _BOUNDS)
    size += sizes.get(schema["$ref"], 0) if isinstance(schema.get("$ref"), str) else 0
    size += sum(_least(part, sizes) for part in _list(schema, "allOf"))
    for name in ("anyOf", "oneOf"):
        size += min((_least(part, sizes) for part in _list(schema, name)), default=0)
    return size + _least_text(schema) + _least_array(schema, sizes) + _least_object(schema, sizes)


def _least_text(schema: Mapping[str, Any]) -> float:
    pattern = schema.get("pattern")
    size = _least_match(pattern) if isinstance(pattern, str) else 0
    return size + _number(schema, "minLength") + (_FORMAT if "format" in schema else 0)


def _least_match(pattern: str) -> int:
    """As if all of it were repeated as often as its most repeated part."""
    times = [int(n) for n in re.findall(r"[{,]\s*(\d{1,4})\s*[,}]", pattern)]
    return len(pattern) * max(times, default=1)


def _least_array(schema: Mapping[str, Any], sizes: Mapping[str, float]) -> float:
    count = _number(schema, "minItems")
    first = _list(schema, "prefixItems")[:count]
    size = sum(2 + _least(item, sizes) for item in first)
    others = count - len(first)
    return size + (others * (2 + _least(schema.get("items"), sizes)) if others else 0)


def _least_object(schema: Mapping[str, Any], sizes: Mapping[str, float]) -> float:
    properties, others = schema.get("properties"), schema.get("additionalProperties", True)
    known = properties if isinstance(properties, dict) else {}
    count = _number(schema, "minProperties")
    size = count * (_SCALAR + _least(others, sizes)) if count else 0
    for name in filter(lambda name: isinstance(name, str), _list(schema, "required")):
        size += len(json.dumps(name)) + 4 + _least(known.get(name, others), sizes)
    return size


def _list(schema: Mapping[str, Any], name: str) -> list[Any]:
    value = schema.get(name)
    return value if isinstance(value, list) else []


def _number(schema: Mapping[str, Any], name: str) -> int:
    value = schema.get(name)
    return min(value, LONGEST) if isinstance(value, int) else 0
