"""Constraints: whatever the logits and however small the room, the text is what was asked for."""

from __future__ import annotations

import gc
import json
import re
import subprocess
import sys
import weakref
from typing import Any

import numpy as np
import pytest

from gptrt.constraint import Constraint, Grammar, JsonSchema, Regex, source
from gptrt.errors import DependencyError, OptionError
from gptrt.guide import Guide
from gptrt.tokenizer import Tokenizer

from .fakes import (
    EOS,
    byte_fallback_tokenizer,
    byte_tokenizer,
    character_tokenizer,
    unigram_tokenizer,
)

pytest.importorskip("llguidance", reason="llguidance, of gptrt[structured], is not installed")

PADDING = 3  # rows that a model has beyond its vocabulary

TOKENIZERS = {
    "bytes": byte_tokenizer(),
    "bytes, two ends": byte_tokenizer((EOS, ord("\n"))),
    "bytes, no end": byte_tokenizer(()),
    "byte fallback": byte_fallback_tokenizer(),
    "unigram": unigram_tokenizer(),
    "characters": character_tokenizer('{}[]":, 0123456789-.+eabcdfhiklmnorstuvwxy'),
}
BYTES = TOKENIZERS["bytes"]

LEAF = {"type": "object", "properties": {"kind": {"const": "leaf"}}, "required": ["kind"]}
BRANCH = {
    "type": "object",
    "properties": {"kind": {"const": "branch"}, "of": {"$ref": "#/$defs/tree"}},
    "required": ["kind", "of"],
    "additionalProperties": False,
}
SCHEMAS: dict[str, Any] = {
    "anything": True,
    "integer": {"type": "integer", "minimum": -20, "maximum": 3000},
    "choice": {"enum": ["red", "green", 3, None]},
    "string": {"type": "string", "minLength": 2, "maxLength": 30},
    "pattern": {"type": "string", "pattern": "^[a-c]{2,}-[0-9]{3}$"},
    "list": {"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": 4},
    "record": {
        "type": "object",
        "properties": {
            "name": {"type": "string"},
            "sure": {"type": "boolean"},
            "rest": {"type": "array", "items": {"type": "number"}, "minItems": 3},
        },
        "required": ["name", "sure"],
        "additionalProperties": False,
    },
    "union": {"anyOf": [{"type": "null"}, {"type": "array", "items": {"type": "boolean"}}]},
    "tree": {"$ref": "#/$defs/tree", "$defs": {"tree": {"anyOf": [BRANCH, LEAF]}}},
}
TYPES: dict[str, Any] = {
    "object": dict,
    "array": list,
    "string": str,
    "boolean": bool,
    "null": type(None),
    "integer": int,
    "number": (int, float),
}


def meets(value: Any, schema: Any, root: Any) -> bool:
    """As much of JSON Schema as the schemas above need."""
    if isinstance(schema, bool):
        return schema
    if "$ref" in schema:
        return meets(value, root["$defs"][schema["$ref"].rpartition("/")[2]], root)
    if "anyOf" in schema:
        return any(meets(value, choice, root) for choice in schema["anyOf"])
    if "enum" in schema or "const" in schema:
        return value in schema.get("enum", [schema.get("const")])
    if not isinstance(value, TYPES[schema["type"]]):
        return False
    if isinstance(value, str):
        long_enough = schema.get("minLength", 0) <= len(value) <= schema.get("maxLength", 1000)
        return long_enough and bool(re.search(schema.get("pattern", ""), value))
    if isinstance(value, list):
        long_enough = schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", 1000)
        return long_enough and all(meets(item, schema["items"], root) for item in value)
    if isinstance(value, dict):
        known = schema["properties"]
        closed = schema.get("additionalProperties", True) or value.keys() <= known.keys()
        named = all(meets(v, known[k], root) for k, v in value.items() if k in known)
        return bool(closed) and named and value.keys() >= set(schema["required"])
    if isinstance(value, int) and "minimum" in schema:
        return bool(schema["minimum"] <= value <= schema["maximum"])
    return True


def start(constraint: Constraint, tokenizer: Tokenizer = BYTES) -> Guide:
    return Guide.compile(constraint, tokenizer, tokenizer.vocab_size + PADDING)


def noise(rng: np.random.Generator, tokenizer: Tokenizer) -> Any:
    return rng.standard_normal(tokenizer.vocab_size + PADDING, np.float32) * 4


def write(
    constraint: Constraint,
    tokenizer: Tokenizer = BYTES,
    *,
    room: int = 80,
    seed: int = 0,
    lead: int | None = None,
) -> str:
    """What a model without a clue writes, or one that only ever wants the id `lead`."""
    rng, guide, ids = np.random.default_rng(seed), start(constraint, tokenizer), []
    while not guide.finished and len(ids) < room:
        logits = noise(rng, tokenizer)
        if lead is not None:
            logits[lead] = 100
        token = int(guide.filter(logits, room - len(ids)).argmax())
        guide.advance(token)
        if token in tokenizer.eos_token_ids:
            break
        ids.append(token)
    return tokenizer.decode(ids)


def advance(guide: Guide, text: bytes) -> Guide:
    for byte in text:
        guide.advance(byte)
    return guide


def allowed(guide: Guide, room: int = 1000) -> set[int]:
    logits = guide.filter(np.zeros(BYTES.vocab_size + PADDING, np.float32), room)
    return set(np.flatnonzero(logits > -np.inf).tolist())


# --- documents ----------------------------------------------------------------------------------


@pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)
@pytest.mark.parametrize("schema", SCHEMAS.values(), ids=SCHEMAS)
def test_documents_are_what_the_schema_asks_for(schema: Any, tokenizer: Tokenizer) -> None:
    for seed in range(4):
        for room in (48, 120):
            text = write(JsonSchema(schema), tokenizer, room=room, seed=seed)
            assert meets(json.loads(text), schema, schema), text


def test_a_document_fits_the_least_room_that_it_needs() -> None:
    schema = JsonSchema(SCHEMAS["record"])
    assert write(schema, room=26) == '{"name": "", "sure": true}'
    for room in range(26, 60):
        assert meets(json.loads(write(schema, room=room)), SCHEMAS["record"], None)


def test_less_room_is_refused_with_how_much_it_takes() -> None:
    with pytest.raises(OptionError, match=r"room for 26 more tokens.*found room for 25"):
        write(JsonSchema(SCHEMAS["record"]), room=25)


@pytest.mark.parametrize("lead", [*b'x", [{\\9', 0xC3])
def test_a_model_that_rambles_on_is_brought_to_an_end(lead: int) -> None:
    for name, schema in SCHEMAS.items():
        text = write(JsonSchema(schema), room=64, lead=lead)
        assert meets(json.loads(text), schema, schema), name


def test_a_part_that_would_not_fit_is_not_begun() -> None:
    long = {"type": "array", "items": {"const": "a long constant"}, "minItems": 20}
    schema = {"type": "object", "properties": {"a": long}, "additionalProperties": False}
    assert write(JsonSchema(schema), room=300, lead=ord('"')) == "{}"
    assert len(json.loads(write(JsonSchema(schema), room=400, lead=ord('"')))["a"]) >= 20


def test_json_is_laid_out_in_one_way_and_in_the_order_of_the_schema() -> None:
    numbers = {"b": {"enum": [1]}, "a": {"const": [2, 3]}}
    schema = {
        "type": "object",
        "properties": numbers,
        "required": ["a", "b"],
        "additionalProperties": False,
    }
    assert write(JsonSchema(schema)) == '{"b": 1, "a": [2, 3]}'
    own = {"x-guidance": {"item_separator": ",", "key_separator": ":"}}
    assert write(JsonSchema({**schema, **own})) == '{"b":1,"a":[2,3]}'


def test_text_that_looks_like_a_special_token_is_text() -> None:
    assert write(JsonSchema({"const": "<|endoftext|>é"})) == '"<|endoftext|>é"'


def test_an_escaped_name_does_not_get_around_its_schema() -> None:
    guide = start(JsonSchema({"type": "object", "properties": {"a": {"type": "null"}}}))
    assert ord("u") not in allowed(advance(guide, b'{"\\'))
    assert write(JsonSchema({"const": "a\0"})) == '"a\\u0000"'  # where there is no other way


def test_a_hostname_is_never_too_long() -> None:
    """Also deep in a schema; but not where `format` is a value or a property."""
    for lead in b"a.-":
        schema = {"properties": {"format": {"type": "string", "format": "hostname"}}}
        closed = {"type": "object", "required": ["format"], "additionalProperties": False}
        name = json.loads(write(JsonSchema(schema | closed), room=600, lead=lead))["format"]
        assert len(name) <= 253 and all(0 < len(label) <= 63 for label in name.split(".")), name
    assert write(JsonSchema({"const": {"format": "hostname"}})) == '{"format": "hostname"}'


# --- patterns and grammars ----------------------------------------------------------------------


@pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)
@pytest.mark.parametrize(
    "pattern",
    ["[abc]+", "(yes|no)", r"a[bc ]{3,9}d", "[0-9]{3}-[0-9]", "([a-d]+[.])+e", "a(b{9}|c)*"],
)
def test_patterns_match_the_whole_text(pattern: str, tokenizer: Tokenizer) -> None:
    for seed in range(6):
        for room in (12, 40):
            text = write(Regex(pattern), tokenizer, room=room, seed=seed)
            assert re.fullmatch(pattern, text), text


def test_a_grammar_is_followed_to_its_end() -> None:
    sums = Grammar('start: sum\nsum: term ("+" term)*\nterm: /[0-9]/ | "(" sum ")"')
    texts = {write(sums, room=room, seed=seed) for seed in range(9) for room in (5, 30)}
    assert len(texts) > 9
    for text in texts:
        assert re.fullmatch(r"[0-9+()]+", text)
        eval(text)  # balanced, or it is a syntax error


# --- the state ----------------------------------------------------------------------------------


def test_filter_removes_what_is_forbidden_and_leaves_its_input_as_it_is() -> None:
    guide = start(Regex("[ab]c"))
    logits = noise(np.random.default_rng(0), BYTES)
    before = logits.copy()
    found = guide.filter(logits, 50)
    assert np.array_equal(logits, before) and found.dtype == np.float32
    assert np.flatnonzero(found > -np.inf).tolist() == [*b"ab"]
    assert np.array_equal(found[[*b"ab"]], before[[*b"ab"]])


def test_neither_special_tokens_nor_padding_are_ever_text() -> None:
    for constraint in (JsonSchema({"type": "string"}), Regex("(?s).*"), Regex(".*")):
        guide = advance(start(constraint), b'"')
        assert max(allowed(guide) - {EOS}) < EOS
        assert max(allowed(guide, room=2) - {EOS}) < EOS  # likewise near the end


def test_the_end_is_allowed_exactly_where_the_text_is_whole() -> None:
    for tokenizer, ends in ((BYTES, {EOS}), (TOKENIZERS["bytes, two ends"], {EOS, 10})):
        guide, text = start(Regex("ab(cd)*"), tokenizer), b"abcdcd"
        for at in range(len(text) + 1):
            whole = re.fullmatch(rb"ab(cd)*", text[:at])
            assert allowed(guide) & {EOS, 10} == (ends if whole else set())
            advance(guide, text[at : at + 1])


def test_it_is_finished_when_only_the_end_may_follow() -> None:
    for tokenizer in (BYTES, TOKENIZERS["bytes, no end"]):
        guide = start(JsonSchema({"type": "array", "items": {"type": "integer"}}), tokenizer)
        assert not guide.finished
        assert not advance(guide, b"[1, 2").finished
        assert advance(guide, b"]").finished
        assert not advance(start(JsonSchema({"type": "integer"}), tokenizer), b"12").finished
        assert not advance(start(JsonSchema(True), tokenizer), b"[").finished


def test_without_an_end_a_whole_text_is_finished_when_no_other_fits() -> None:
    tokenizer = TOKENIZERS["bytes, no end"]
    for room, finished in ((4, True), (5, False)):
        guide = start(Regex("a(bcde)?"), tokenizer)
        guide.filter(np.zeros(tokenizer.vocab_size + PADDING, np.float32), room)
        assert advance(guide, b"a").finished is finished


def test_after_the_end_only_the_end_may_follow() -> None:
    guide = advance(start(Regex("ab*")), b"ab")
    guide.advance(EOS)
    assert guide.finished and guide.forced() == [] and allowed(guide) == {EOS}
    guide.advance(EOS)
    assert guide.finished and allowed(guide) == {EOS}


def test_a_forbidden_id_is_refused_and_changes_nothing() -> None:
    guide = advance(start(Regex("abc")), b"a")
    for token in (ord("c"), EOS, EOS + 1, -1, 1 << 40):
        with pytest.raises(OptionError, match="an id that the constraint allows"):
            guide.advance(token)
    assert advance(guide, b"bc").finished


def test_a_fork_goes_its_own_way() -> None:
    guide = advance(start(Regex("a(bc|de)")), b"a")
    fork = guide.fork()
    advance(fork, b"bc")
    assert fork.finished and not guide.finished
    assert allowed(guide) == {*b"bd"}
    assert advance(guide, b"de").finished


def test_guides_of_one_constraint_do_not_know_each_other() -> None:
    one, other = start(Regex("ab")), start(Regex("ab"))
    advance(one, b"ab")
    assert one.finished and allowed(other) == {ord("a")}


@pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)
def test_forced_ids_are_the_only_ones_that_filter_leaves(tokenizer: Tokenizer) -> None:
    size = tokenizer.vocab_size + PADDING
    for room in (60, 200):
        rng, guide, drafted = (
            np.random.default_rng(1),
            start(JsonSchema(SCHEMAS["record"]), tokenizer),
            0,
        )
        for at in range(room):
            forced = guide.forced()
            logits = guide.filter(rng.standard_normal(size, np.float32), room - at)
            if forced:
                assert np.flatnonzero(logits > -np.inf).tolist() == forced[:1]
                drafted += 1
            guide.advance(int(logits.argmax()))
            if guide.finished:
                break
        assert guide.finished and drafted > 12


def test_forced_ids_are_those_of_the_tokenizer() -> None:
    tokenizer = byte_fallback_tokenizer()
    assert start(Regex("b a a"), tokenizer).forced() == tokenizer.encode("b a a", whole=False)
    assert start(Regex("x|y")).forced() == []


# --- what cannot be followed --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("constraint", "found"),
    [
        (lambda: JsonSchema({"type": "objekt"}), "Invalid type: objekt"),
        (lambda: JsonSchema({"type": "array", "uniqueItems": True}), "uniqueItems"),
        (lambda: JsonSchema({"type": "object", "minProperties": 2}), "minProperties"),
        (lambda: JsonSchema(False), "schema is false"),
        (lambda: JsonSchema({"type": "string", "pattern": "a(?=b)"}), "look-around"),
        (lambda: JsonSchema({"$ref": "#/$defs/none"}), "does not exist"),
        (lambda: JsonSchema({"$ref": "#"}), "no way to"),
        (lambda: JsonSchema("{"), "Expecting property name"),
        (lambda: JsonSchema("[1]"), r"found \[1\]"),
        (lambda: JsonSchema({"const": float("nan")}), "not JSON compliant"),
        (lambda: JsonSchema({"const": b"x"}), "not JSON serializable"),
        (lambda: JsonSchema({"const": {"required": [["x"]]}, "required": [["x"]]}), "required"),
        (lambda: JsonSchema(nested(600)), "recursion"),
        (lambda: Regex("a("), "unclosed group"),
        (lambda: Regex(5), "found 5"),  # type: ignore[arg-type]
        (lambda: Grammar(None), "found None"),  # type: ignore[arg-type]
        (lambda: Grammar("start: unknown"), 'unknown name: "unknown"'),
        (lambda: Grammar('start: "a" start'), "no way to"),
    ],
)
def test_what_is_malformed_is_refused(constraint: Any, found: str) -> None:
    with pytest.raises(OptionError, match=found):
        start(constraint())


def nested(depth: int) -> Any:
    schema: Any = {"type": "integer"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


def test_what_looks_like_a_schema_in_a_value_is_none() -> None:
    """And what stands under a name that is a keyword elsewhere is one."""
    value = {"required": [["x"]], "format": "hostname"}
    assert start(JsonSchema({"const": value})).forced()
    hosts = {"default": {"type": "string", "format": "hostname"}}
    named = JsonSchema({"type": "object", "properties": hosts, "required": ["default"]})
    assert "hostname" not in source(named)


def test_a_vocabulary_that_lacks_a_character_is_refused() -> None:
    with pytest.raises(OptionError, match="tokens of this vocabulary"):
        start(JsonSchema({"type": "object"}), character_tokenizer("abc"))


def test_without_llguidance_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(DependencyError, match=r"pip install 'gptrt\[structured\]'"):
        start(Regex("a"))


# --- the values, and what is kept ---------------------------------------------------------------


def test_schemas_are_equal_that_say_the_same_in_the_same_order() -> None:
    one, two = {"type": "string", "minLength": 1}, {"minLength": 1, "type": "string"}
    assert JsonSchema(one) == JsonSchema(json.dumps(one, indent=2)) != JsonSchema(two)
    assert len({JsonSchema(one), JsonSchema(one), JsonSchema(True), JsonSchema("true")}) == 2
    assert Regex("a") != Grammar("a")


def test_what_is_compiled_lives_as_long_as_its_tokenizer() -> None:
    tokenizer = byte_tokenizer()
    guide = start(Regex("a"), tokenizer)
    gone = weakref.ref(tokenizer)
    del tokenizer
    gc.collect()
    assert gone() is None
    assert advance(guide, b"a").finished


def test_importing_constraints_does_not_import_llguidance() -> None:
    code = "import sys, gptrt.guide; sys.exit('llguidance' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
