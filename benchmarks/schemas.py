"""Structured output on 200 JSON schemas of rising difficulty: is every document valid?

    python -m benchmarks.schemas [BUNDLE]

Each schema is generated from once, at temperature 0.8 with its number as the seed, and what came
out is checked with the package jsonschema, formats included. Without BUNDLE the embedded model
writes. The exit status is 1 unless all are valid.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any

Json = dict[str, Any]

MAX_NEW_TOKENS = 400
_PROMPT = "Once upon a time"

# --- words for schemas --------------------------------------------------------------------------

STRING: Json = {"type": "string"}
INTEGER: Json = {"type": "integer"}
NUMBER: Json = {"type": "number"}
BOOLEAN: Json = {"type": "boolean"}
NULL: Json = {"type": "null"}
SCALARS = (STRING, INTEGER, NUMBER, BOOLEAN, NULL)
FIELDS = ("name", "age", "height", "married", "spouse", "home", "crew", "gold", "title", "weather")


def string(**limits: Any) -> Json:
    return {"type": "string", **limits}


def integer(low: int, high: int) -> Json:
    return {"type": "integer", "minimum": low, "maximum": high}


def array(items: Json | bool, least: int = 0, most: int | None = None) -> Json:
    bounds = {"minItems": least} | ({} if most is None else {"maxItems": most})
    return {"type": "array", "items": items, **bounds}


def record(properties: Json, required: Iterable[str] | None = None, others: Any = False) -> Json:
    """An object: of all its properties unless `required` names those it needs, and of `others`."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties if required is None else required),
        "additionalProperties": others,
    }


def either(*choices: Json) -> Json:
    return {"anyOf": list(choices)}


def tagged(**choices: Json) -> Json:
    """One of several objects, told apart by `kind`."""
    kinds = ({"kind": {"const": kind}, **properties} for kind, properties in choices.items())
    return {"oneOf": [record(properties) for properties in kinds]}


def ref(name: str) -> Json:
    return {"$ref": f"#/$defs/{name}"}


def defining(root: Json, **definitions: Json) -> Json:
    return {**root, "$defs": definitions}


def fields(count: int, *types: Json) -> Json:
    """So many properties, of these types in turn."""
    return {name: types[i % len(types)] for i, name in enumerate(FIELDS[:count])}


def nested(depth: int, innermost: Json, around: Callable[[Json], Json]) -> Json:
    for _ in range(depth):
        innermost = around(innermost)
    return innermost


# --- the levels ---------------------------------------------------------------------------------


def scalars() -> Iterator[Json]:
    yield from SCALARS
    yield from ({"const": value} for value in ("whale", [1, "two", None, {"a": -2.5}]))
    yield {"enum": ["red", "a longer name", "tab\there", 'quote"d', "naïve", "日本"]}
    yield {"enum": [1, 2.5, "three", None, [4], {"five": 5}]}
    yield {"type": ["string", "null"], "title": "Answer", "description": "If there is one."}


def strings() -> Iterator[Json]:
    yield from (string(maxLength=n) for n in (0, 1, 20))
    yield from (string(minLength=n) for n in (1, 12, 60))
    yield from (string(minLength=n, maxLength=n + 3) for n in (2, 30))
    for pattern in (
        *("^[a-z]+$", "^[A-Z]{3}-[0-9]{4}$", "^(cat|dog|bird)s?$", "^#[0-9a-fA-F]{6}$"),
        *("^\\d{3}-\\d{3}-\\d{4}$", "[aeiou]", '^[^"\\\\]{5,9}$'),
    ):
        yield string(pattern=pattern)
    yield from (string(format=name) for name in ("date", "time", "date-time", "uuid", "email"))


def formats() -> Iterator[Json]:
    names = ("ipv4", "ipv6", "hostname", "uri", "duration", "date", "uuid", "email")
    yield from (string(format=name) for name in names[:5])
    yield from (array(string(format=name), 2, 4) for name in ("uuid", "time"))
    yield record({"id": string(format="uuid"), "at": string(format="date-time")})
    yield array(record({"from": string(format="email"), "host": string(format="ipv4")}), 2, 3)
    yield record({name: string(format=name) for name in names})


def numbers() -> Iterator[Json]:
    yield from (integer(low, high) for low, high in ((0, 9), (-5, 5), (100, 999), (7, 7)))
    yield from (integer(low, high) for low, high in ((-1000, -990), (1, 10**12), (98, 1203)))
    yield from ({"type": "integer", "minimum": n} for n in (0, 1000, -17))
    yield from ({"type": "integer", "exclusiveMaximum": n} for n in (0, 250))
    yield from ({"type": "integer", "multipleOf": n, "minimum": 0} for n in (5, 7, 64))
    yield {"type": "number", "minimum": 0, "maximum": 1}
    yield {"type": "number", "exclusiveMinimum": -1, "exclusiveMaximum": 1}
    yield {"type": "number", "minimum": -273.15}
    yield {"type": "number", "minimum": 3.125, "maximum": 3.25}
    yield {"type": "number", "exclusiveMinimum": 0.25, "maximum": 12}


def arrays() -> Iterator[Json]:
    yield from (array(items) for items in SCALARS)
    yield from (array(INTEGER, n, n + 2) for n in (0, 3, 12))
    yield from (array(string(maxLength=9), n) for n in (1, 8))
    yield array({"enum": ["north", "south", "east", "west"]}, 4, 4)
    yield array(either(STRING, NUMBER, NULL), 3, 6)
    yield array(array(integer(0, 1), 3, 3), 3, 3)
    yield nested(5, BOOLEAN, lambda inner: array(inner, 1, 2))
    yield array(record({"x": NUMBER, "y": NUMBER}), 2, 5)
    pair = [STRING, INTEGER]
    yield {"type": "array", "prefixItems": pair, "items": False, "minItems": 2}
    yield {"type": "array", "prefixItems": pair, "items": BOOLEAN, "minItems": 4, "maxItems": 6}
    yield {"type": "array", "prefixItems": [{"const": "point"}, NUMBER, NUMBER], "minItems": 3}
    yield array(True, 2, 3)
    yield {"type": "array"}


def objects() -> Iterator[Json]:
    yield from (record(fields(n, *SCALARS)) for n in (1, 2, 3, 5, 8, 10))
    yield from (record(fields(4, kind)) for kind in SCALARS)
    yield record({"first name": STRING, 'with "quotes"': INTEGER, "back\\slash": BOOLEAN})
    yield record({"имя": STRING, "年齢": integer(0, 120), "größe": NUMBER, "🏴‍☠️": BOOLEAN})
    yield record({"id": integer(1, 10**6), "role": {"enum": ["admin", "user", "guest"]}})
    yield record({"version": {"const": 2}, "data": array(NUMBER, 1, 4)})
    yield record({"when": string(format="date"), "who": string(minLength=1, maxLength=40)})
    yield record({"": STRING})
    yield record({"price": {"type": "number", "minimum": 0}, "currency": {"enum": ["EUR", "USD"]}})
    yield record({"tags": array(STRING, 1, 5), "scores": array(integer(0, 100), 3, 3)})
    yield record({})


def optional() -> Iterator[Json]:
    yield from (record(fields(n, *SCALARS), ()) for n in (1, 3, 6))
    yield from (record(fields(5, STRING, INTEGER), FIELDS[n : n + 2]) for n in (0, 1, 3))
    yield from ({"type": "object", "additionalProperties": kind} for kind in SCALARS)
    yield {"type": "object"}
    yield {"type": "object", "minProperties": 1, "additionalProperties": integer(0, 9)}
    yield {"type": "object", "maxProperties": 3, "additionalProperties": STRING}
    yield record(fields(2, STRING), others=True)
    yield record(fields(2, STRING), others=array(NUMBER, 1))
    yield {"type": "object", "patternProperties": {"^x_[a-z]+$": INTEGER}, **_CLOSED}
    yield {"type": "object", "properties": {"a": STRING}, "required": ["b", "c"]}
    yield record({"note": {"type": ["string", "null"]}, "reply": either(STRING, NULL)}, ["note"])
    yield record({"few": BOOLEAN, "many": array(record(fields(3, *SCALARS)), 6, 8)}, ["few"])


def deep() -> Iterator[Json]:
    yield from (nested(n, STRING, lambda inner: record({"in": inner})) for n in (2, 4, 8, 16))
    yield from (nested(n, INTEGER, lambda i: record({"a": i, "b": NULL})) for n in (2, 4, 6))
    yield from (nested(n, NUMBER, lambda i: array(record({"v": i}), 1, 2)) for n in (1, 2, 3))
    person = record({"name": STRING, "born": string(format="date"), "alive": BOOLEAN})
    address = record({"street": STRING, "city": STRING, "zip": string(pattern="^[0-9]{5}$")})
    yield record({"person": person, "address": address})
    yield record({"people": array(person, 2, 3)})
    yield record({"ship": record({"name": STRING, "crew": array(person, 1, 2)}), "port": address})
    yield record({"matrix": array(array(NUMBER, 2, 2), 2, 2), "rank": integer(0, 2)})
    yield record({"a": record({"b": record({"c": array(record({"d": BOOLEAN}), 2, 2)})})}, ())
    yield record({"rows": array({"type": "array", "prefixItems": [STRING, NUMBER], "minItems": 2})})
    yield record({"by_name": record({}, (), others=person), "count": INTEGER})
    yield record({"by_day": record({}, (), others=array(address, 1, 2))})
    yield nested(3, either(STRING, NULL), lambda inner: record({"left": inner, "right": inner}))
    yield nested(24, BOOLEAN, lambda inner: array(inner, 1, 1))


def unions() -> Iterator[Json]:
    yield from (either(*SCALARS[:n]) for n in (2, 3, 5))
    yield {"oneOf": [STRING, INTEGER]}
    yield {"oneOf": [record({"a": STRING}), record({"b": INTEGER})]}
    yield either(array(STRING, 1), record({"only": STRING}))
    yield either({"const": "none"}, integer(1, 5), array(integer(1, 5), 2, 3))
    yield from (array(kind, 2, 4) for kind in (either(STRING, INTEGER), either(NULL, BOOLEAN)))
    circle, square = {"radius": NUMBER}, {"side": NUMBER}
    shape = tagged(circle=circle, square=square)
    yield shape
    yield array(shape, 2, 4)
    yield record({"shape": shape, "color": STRING})
    yield tagged(text={"text": STRING}, list={"items": array(STRING, 1, 3)}, none={})
    yield tagged(**{f"k{n}": fields(n, *SCALARS) for n in range(1, 9)})
    yield record({"result": tagged(ok={"value": NUMBER}, error={"code": integer(400, 599)})})
    yield array(
        tagged(move={"to": array(integer(0, 7), 2, 2)}, wait={}, say={"text": STRING}), 3, 5
    )
    yield record({"next": either(NULL, tagged(a={"x": either(NULL, shape)}, b={"y": shape}))})
    yield either(record(fields(2, STRING)), record(fields(4, STRING)), record(fields(8, STRING)))
    yield {"anyOf": [{"required": ["mail"]}, {"required": ["phone"]}], **record(_CONTACT, ())}
    yield either(string(format="date"), string(format="uuid"), {"enum": ["today", "never"]})


def references() -> Iterator[Json]:
    yield defining(record({"here": ref("point"), "there": ref("point")}), point=_POINT)
    yield defining(array(ref("name"), 2, 4), name=string(pattern="^[A-Z][a-z]+$"))
    yield defining(ref("a"), a=ref("b"), b=ref("c"), c=record({"end": BOOLEAN}))
    chain = record({"value": INTEGER, "next": either(NULL, ref("node"))})
    yield defining(ref("node"), node=chain)
    yield defining(record({"list": ref("node"), "length": INTEGER}), node=chain)
    tree = record({"name": STRING, "children": array(ref("tree"))})
    yield defining(ref("tree"), tree=tree)
    yield defining(ref("tree"), tree=record({"name": STRING, "children": array(ref("tree"), 0, 2)}))
    binary = either(NULL, record({"left": ref("binary"), "right": ref("binary")}))
    yield defining(ref("binary"), binary=binary)
    yield defining(record({"root": ref("binary")}), binary=binary)
    yield record({"value": STRING, "child": {"$ref": "#"}}, ["value"])
    yield array({"$ref": "#"})
    yield defining(ref("json"), json=either(*SCALARS, array(ref("json")), _map(ref("json"))))
    yield defining(record({"data": ref("json")}), json=either(NUMBER, array(ref("json"), 1, 3)))
    leaf, branch = {"value": INTEGER}, {"of": array(ref("expr"), 2, 2)}
    yield defining(ref("expr"), expr=tagged(num=leaf, add=branch, mul=branch))
    yield defining(array(ref("expr"), 2, 2), expr=tagged(num=leaf, neg={"of": ref("expr")}))
    yield defining(ref("even"), even=either(NULL, _one(ref("odd"))), odd=_one(ref("even")))
    menu = record({"label": STRING, "items": array(ref("menu"), 1)}, ["label"])
    yield defining(record({"menu": ref("menu")}), menu=menu)
    yield defining(
        ref("a"), a=record({"b": ref("b")}), b=record({"c": array(ref("c"), 1, 2)}), c=_POINT
    )
    yield {**record({"a": {"$ref": "#/properties/b"}, "b": integer(1, 6)})}
    yield defining(ref("x/y~z"), **{"x/y~z": STRING}) | {"$ref": "#/$defs/x~1y~0z"}


def mixtures() -> Iterator[Json]:
    yield {"allOf": [record({"a": STRING}, others=True), record({"b": INTEGER}, others=True)]}
    yield {"allOf": [integer(0, 100), {"minimum": 50}]}
    yield {"allOf": [string(minLength=3), {"maxLength": 8}]}
    yield defining({"allOf": [ref("base"), {"required": ["b"]}]}, base=record(_AB, ["a"]))
    yield {**record(_AB, (), others=True), "allOf": [{"required": ["a"]}, {"required": ["b"]}]}
    yield defining(array(ref("animal"), 2, 3), animal=_animal())
    yield record({"id": string(format="uuid"), "tags": array(string(maxLength=12), 1, 4), **_EVENT})
    yield record({"order": array(record(_ITEM), 1, 3), "ship_to": record(_CONTACT, ["mail"])})
    yield defining(record({"steps": array(ref("step"), 2, 3)}), step=_step())
    yield record(
        {"имя": STRING, "друзья": array(record({"имя": STRING, "возраст": INTEGER}), 1, 2)}
    )
    yield record({"config": record(fields(6, *SCALARS), FIELDS[:2], others=either(STRING, NUMBER))})
    yield record({"point": _POINT, "path": array(_POINT, 3, 5), "box": array(_POINT, 2, 2)})
    yield record({f"field_{n}": SCALARS[n % 5] for n in range(20)})
    yield record({f"flag_{n}": BOOLEAN for n in range(24)}, ())
    yield array(record({"key": string(pattern="^[a-z_]{2,12}$"), "value": either(*SCALARS)}), 3, 5)
    yield defining(
        ref("doc"), doc=record({"title": STRING, "body": array(ref("block"), 1, 3)}), block=_block()
    )
    yield record({"answer": {"enum": ["a", "b", "c", "d"]}, "reason": string(minLength=80)})
    yield nested(6, _animal(), lambda i: record({"a": i, "b": either(NULL, INTEGER)}, ["a"]))
    yield defining(
        record({"name": STRING, "arguments": either(ref("search"), ref("book"), ref("none"))}),
        search=record({"query": STRING, "limit": integer(1, 50)}, ["query"]),
        book=record(
            {"room": integer(1, 400), "from": _DATE, "to": _DATE, "guests": array(STRING, 1, 3)}
        ),
        none=record({}),
    )
    yield record({"log": array(record({"at": string(format="date-time"), **_EVENT}), 2, 3)})


_CLOSED: Json = {"additionalProperties": False}
_POINT = record({"x": NUMBER, "y": NUMBER})
_DATE = string(format="date")
_AB = {"a": STRING, "b": INTEGER}
_CONTACT = {"mail": string(format="email"), "phone": string(pattern="^\\+[0-9]{6,12}$")}
_EVENT = {"level": {"enum": ["info", "warning", "error"]}, "message": string(maxLength=60)}
_ITEM = {"sku": string(pattern="^[A-Z]{2}[0-9]{4}$"), "count": integer(1, 99), "gift": BOOLEAN}


def _map(values: Json) -> Json:
    return {"type": "object", "additionalProperties": values}


def _one(inner: Json) -> Json:
    return record({"of": inner})


def _animal() -> Json:
    name = {"name": string(minLength=1, maxLength=20)}
    return tagged(cat={**name, "lives": integer(0, 9)}, dog={**name, "tricks": array(STRING, 1, 2)})


def _step() -> Json:
    """Of a program, in which steps may hold steps."""
    again = {"times": integer(2, 5), "body": array(ref("step"), 1, 2)}
    return tagged(go={"metres": integer(1, 100)}, turn={"left": BOOLEAN}, repeat=again)


def _block() -> Json:
    return tagged(text={"text": STRING}, image={"url": string(format="uri")}, rule={})


@dataclass(frozen=True)
class Case:
    """A schema, and how hard it is: 1 is easiest."""

    level: int
    kind: str
    schema: Json


_LEVELS = (
    *(scalars, formats, strings, numbers, arrays, objects, optional, deep, unions, references),
    mixtures,
)

SCHEMAS = tuple(
    Case(number, level.__name__, schema)
    for number, level in enumerate(_LEVELS, 1)
    for schema in level()
)


def main() -> None:
    parser = argparse.ArgumentParser(description="200 JSON schemas, a document for each.")
    parser.add_argument("bundle", nargs="?", help="the embedded one if left out")
    parser.add_argument("--seed", type=int, default=0, help="of the first; the next has one more")
    args = parser.parse_args()
    documents = _written(args.bundle, args.seed)
    rows = [(case, text, _fault(case.schema, text), tokens) for case, text, tokens in documents]
    print(_table([(case, fault, tokens) for case, _, fault, tokens in rows]))
    for case, text, fault, _ in rows:
        if fault:
            print(f"\n{case.kind}: {json.dumps(case.schema)}\n  {text}\n  {fault}")
    sys.exit(any(fault for _, _, fault, _ in rows))


def _written(bundle: str | None, first_seed: int) -> Iterator[tuple[Case, str, int]]:
    """Each case with the document that was written for it and how many tokens it took."""
    from gptrt import Generator, JsonSchema

    with Generator(bundle) as generator:
        for seed, case in enumerate(SCHEMAS, start=first_seed):
            text = generator.generate(
                _PROMPT,
                constraint=JsonSchema(case.schema),
                max_new_tokens=MAX_NEW_TOKENS,
                temperature=0.8,
                seed=seed,
            )
            yield case, text, len(generator.tokenizer.encode(text, whole=False))


def _fault(schema: Json, text: str) -> str | None:
    """Why `text` is no JSON, or not what the schema asks for; None where all is well."""
    try:
        from jsonschema import Draft202012Validator
    except ImportError:
        sys.exit("wanted jsonschema, to check documents; pip install 'jsonschema[format-nongpl]'")
    try:
        document = json.loads(text)
    except ValueError as e:
        return str(e)
    formats = Draft202012Validator.FORMAT_CHECKER
    validator = Draft202012Validator(schema, format_checker=formats)
    return next((error.message for error in validator.iter_errors(document)), None)


def _table(rows: list[tuple[Case, str | None, int]]) -> str:
    """How many are valid and how long they are, by level."""
    lines = ["| level | schemas | valid | median tokens |", "| --- | --- | --- | --- |"]
    for number, level in enumerate(_LEVELS, 1):
        found = [(fault, tokens) for case, fault, tokens in rows if case.level == number]
        valid, middle = sum(not fault for fault, _ in found), median(n for _, n in found)
        lines.append(f"| {number} {level.__name__} | {len(found)} | {valid} | {middle:.0f} |")
    valid = sum(not fault for _, fault, _ in rows)
    lines.append(f"| all | {len(rows)} | {valid} | {median(n for _, _, n in rows):.0f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
