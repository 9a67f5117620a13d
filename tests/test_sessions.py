"""Sessions: what they keep, what their files promise, and what is refused."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest

from gptrt.errors import (
    GptrtError,
    MemoryLimitError,
    OptionError,
    PromptError,
    SessionError,
    TargetError,
)
from gptrt.generator import Generator
from gptrt.interrupt import Cancellation
from gptrt.reading import Reading, Slab
from gptrt.session import Session
from gptrt.testing import FakeDecoder, FakeGenerator, byte_tokenizer
from tests.fakes import noise


@pytest.fixture(scope="module")
def generator(bundle: Path) -> Generator:
    return Generator(bundle, device="cpu", threads=1)


@pytest.fixture
def saved(generator: Generator, tmp_path: Path) -> Path:
    with Session(generator) as session:
        session.append("The king said")
        session.generate(max_new_tokens=5)
        session.save(tmp_path / "session")
    return tmp_path / "session"


def test_appended_and_generated_text_become_one() -> None:
    session = Session(FakeGenerator({"Hello": " there.", "Hello there. And": " you?"}))
    session.append("Hello")
    assert session.generate() == " there."
    session.append(" And")
    assert "".join(session.stream()) == " you?"
    assert session.text == "Hello there. And you?"
    assert len(session) == len(session.ids) == len(session.text)


def test_what_a_session_has_read_is_not_read_again() -> None:
    decoder = FakeDecoder(noise, context=256)
    session = Session(Generator.from_parts(decoder, byte_tokenizer(), reuse="all"))
    session.append("0123456789")
    session.generate(max_new_tokens=3)
    session.append("ab")
    session.generate(max_new_tokens=2)
    assert decoder.passes == [10, 1, 1, 1, 3, 1, 1]


def test_a_fork_goes_its_own_way() -> None:
    generator = Generator.from_parts(FakeDecoder(noise, context=256), byte_tokenizer())
    session = Session(generator)
    session.append("once")
    other = session.fork()
    other.append(" more")
    assert session.text == "once"
    assert session.complete(max_new_tokens=4) == generator.complete("once", max_new_tokens=4)
    wanted = generator.complete("once more", max_new_tokens=4)
    assert other.complete(max_new_tokens=4) == wanted


def test_a_stream_that_is_left_keeps_what_came() -> None:
    session = Session(FakeGenerator({"a": "bcdef"}))
    session.append("a")
    with session.stream() as stream:
        assert [next(stream), next(stream)] == ["b", "c"]
    assert session.text == "abc"
    assert session.stream().result.ids == ()  # never begun, nothing taken
    session.append("x")


def test_an_exception_beside_a_stream_that_was_left_is_the_one_that_is_seen() -> None:
    generator = Generator.from_parts(FakeDecoder(noise, context=64), byte_tokenizer())
    with pytest.raises(KeyError), Session(generator) as session:
        session.append("once")
        stream = session.stream(max_new_tokens=20)
        next(stream)
        raise KeyError
    assert len(session) > len("once") and generator.calls.shelf.lent == 0
    with Session(generator) as session:
        session.append("once")
        generator.close()
    assert len(session) == len("once")


@pytest.mark.parametrize("reuse", ["exact", "all"])
def test_what_single_steps_wrote_is_never_saved_as_exact(
    bundle: Path, tmp_path: Path, reuse: Literal["exact", "all"]
) -> None:
    exact = Generator(bundle, device="cpu", threads=1)
    maker = Generator(bundle, device="cpu", threads=1, reuse=reuse)
    with Session(maker) as session:
        session.append("The old king said to the")
        session.generate(max_new_tokens=9, min_new_tokens=9)
        session.append(" young queen")
        session.save(tmp_path / "session")
    loaded = Session.load(exact, tmp_path / "session")
    asked = {"max_new_tokens": 3, "logprobs": True, "min_new_tokens": 3}
    wanted = Generator(bundle, device="cpu", threads=1).complete(loaded.ids, **asked)
    found = loaded.complete(**asked)
    assert (found.ids, found.logprobs) == (wanted.ids, wanted.logprobs)


def test_an_id_that_was_read_alone_is_read_again_where_every_bit_counts() -> None:
    decoder = FakeDecoder(noise)
    row = Slab(decoder.new_cache(16)).rows[0]
    ids = list(range(8))
    fast, exact = Reading(decoder, exact=False), Reading(decoder)
    fast.read(row, ids)
    fast.read(row, ids)  # all are known, but the logits are wanted
    exact.read(row, [*ids, 8, 9])
    assert decoder.passes == [8, 1, 4]  # the last from position 6 on: passes begin at even ones


def test_the_policy_for_a_full_context_is_the_sessions_own() -> None:
    generator = Generator.from_parts(FakeDecoder(noise, context=32), byte_tokenizer())
    strict, sliding = Session(generator), Session(generator, context_overflow="slide")
    with pytest.raises(PromptError, match="at most 32 tokens more in this session"):
        strict.append("x" * 33)
    assert len(strict) == 0
    strict.append("x" * 30)
    assert strict.complete().finish_reason == "length"
    assert len(strict) == 32
    with pytest.raises(PromptError):
        strict.generate()
    sliding.append("x" * 100)
    assert len(sliding.complete(max_new_tokens=50).ids) == 50
    assert len(sliding) == 150


def test_going_back_further_than_there_is_text_is_refused() -> None:
    session = Session(FakeGenerator({}))
    session.append("abc")
    for length in (-1, 4, 1.0, True):
        with pytest.raises(PromptError, match="wanted a length from 0 to 3"):
            session.rewind(length)  # type: ignore[arg-type]
    session.rewind(0)
    with pytest.raises(PromptError, match="one token or more"):
        session.generate()


def test_a_cancelled_append_is_read_later() -> None:
    stop, decoder = Cancellation(), FakeDecoder(noise, context=64)
    stop.cancel()
    generator = Generator.from_parts(decoder, byte_tokenizer())
    session = Session(generator)
    session.append("abcd", cancellation=stop)
    assert decoder.passes == []
    wanted = generator.complete("abcd", max_new_tokens=3)
    assert session.complete(max_new_tokens=3) == wanted


def test_an_append_that_fails_leaves_the_session_as_it_was() -> None:
    def disturbed(done: int, of: int) -> None:
        raise ZeroDivisionError(done, of)

    session = Session(limited(1024))
    session.append("abc")
    with pytest.raises(ZeroDivisionError):
        session.append("def", progress=disturbed)
    assert session.text == "abc"
    small = Session(limited(128))
    small.append("x" * 50)
    with pytest.raises(MemoryLimitError):
        small.append("y" * 200)
    assert small.text == "x" * 50
    small.append("z")
    assert small.complete(max_new_tokens=2).ids == continued("x" * 50 + "z", 2)


def limited(positions: int) -> Generator:
    """A generator whose caches have no more than so many positions together."""
    decoder = FakeDecoder(noise, context=1024)
    limit = decoder.cache_bytes(positions)
    return Generator.from_parts(decoder, byte_tokenizer(), cache_limit=limit)


def continued(prompt: str, count: int) -> tuple[int, ...]:
    return limited(1024).complete(prompt, max_new_tokens=count).ids


@pytest.mark.parametrize("positions", [512 + 640, 640])
def test_a_session_grows_as_far_as_memory_allows(positions: int) -> None:
    """Not only where there is room for twice as much, or for what it had beside what it needs."""
    session = Session(limited(positions))
    session.append("x" * 500)
    session.append("y" * 100)
    assert session.complete(max_new_tokens=3).ids == continued("x" * 500 + "y" * 100, 3)


def test_a_policy_that_there_is_not_is_refused() -> None:
    with pytest.raises(OptionError, match="context_overflow"):
        Session(FakeGenerator({}), context_overflow="Stop")  # type: ignore[arg-type]


def test_a_session_of_a_closed_generator_says_so(bundle: Path) -> None:
    generator = Generator(bundle, device="cpu", threads=1)
    session = Session(generator)
    session.append("The king")
    generator.close()
    with pytest.raises(GptrtError, match="make a new Generator"):
        session.generate()


# --- files --------------------------------------------------------------------------------------


def test_nothing_needs_to_be_read_after_loading(generator: Generator, saved: Path) -> None:
    session = Session.load(generator, saved)
    result = session.complete(max_new_tokens=3)
    assert result.timings is not None
    assert result.timings.reused_tokens >= len(generator.encode("The king said")) & ~1 - 2


def test_an_empty_session_can_be_saved(generator: Generator, tmp_path: Path) -> None:
    Session(generator).save(tmp_path / "empty")
    assert Session.load(generator, tmp_path / "empty").ids == ()


def test_a_session_slides_on_after_loading(generator: Generator, tmp_path: Path) -> None:
    session = Session(generator, context_overflow="slide")
    session.append([1] * generator.decoder.context)
    session.save(tmp_path / "file")
    with pytest.raises(PromptError):
        Session.load(generator, tmp_path / "file").generate(max_new_tokens=1)
    again = Session.load(generator, tmp_path / "file", context_overflow="slide")
    assert again.complete(max_new_tokens=1).ids == session.complete(max_new_tokens=1).ids


def test_what_a_session_cannot_do_is_refused_with_who_can(generator: Generator) -> None:
    session = Session(generator)
    session.append("The king")
    for options, words in (
        ({"num_beams": 2}, "use the generator's complete$"),
        ({"num_return_sequences": 2}, "use the generator's complete_batch$"),
    ):
        with pytest.raises(OptionError, match=words):
            session.complete(**options)


def test_a_session_of_another_model_is_refused(exact: Path, saved: Path) -> None:
    with pytest.raises(SessionError, match="open it with the bundle that it was saved with"):
        Session.load(Generator(exact, device="cpu", threads=1), saved)


def resealed(data: bytes, change: Callable[[dict[str, Any]], object]) -> bytes:
    """A session file with another header and a digest that agrees."""
    magic = data.index(b"\n") + 1
    size = int.from_bytes(data[magic : magic + 8], "little")
    header = json.loads(data[magic + 8 : magic + 8 + size])
    change(header)
    head = json.dumps(header).encode()
    body = data[:magic] + len(head).to_bytes(8, "little") + head + data[magic + 8 + size : -32]
    return body + hashlib.sha256(body).digest()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda h: h.update(version=2), "version 2, this gptrt reads 1"),
        (lambda h: h.update(extra=1), "extra is an unknown key"),
        (lambda h: h.update(ids=[300, *h["ids"][1:]]), "the model has not"),
        (lambda h: h.update(ids=[-1, *h["ids"][1:]]), "the model has not"),
        (lambda h: h.update(read=h["read"] - 1, exact=0), "bytes instead of"),
        (lambda h: h.update(read=99), "more is read than there are ids"),
        (lambda h: h.update(exact=h["read"] + 1), "more is read than there are ids"),
        (lambda h: h.update(read=0, exact=0), "values of nothing"),
        (lambda h: h.update(read=1 << 60), "wanted 0 to"),
        (lambda h: h.update(ids="abc"), "wanted a list"),
    ],
)
def test_a_header_that_does_not_fit_is_refused(
    generator: Generator, saved: Path, change: Callable[[dict[str, Any]], object], words: str
) -> None:
    saved.write_bytes(resealed(saved.read_bytes(), change))
    with pytest.raises(SessionError, match=words):
        Session.load(generator, saved)
    assert generator.calls.shelf.lent == 0


@pytest.mark.parametrize("at", [0, 5, 15, 40, -40, -1])
def test_a_flipped_bit_is_refused(generator: Generator, saved: Path, at: int) -> None:
    data = bytearray(saved.read_bytes())
    data[at] ^= 4
    saved.write_bytes(data)
    with pytest.raises(SessionError, match="wanted a whole session file"):
        Session.load(generator, saved)


@pytest.mark.parametrize("keep", [0, 10, 30, 200])
def test_a_file_that_was_cut_off_is_refused(generator: Generator, saved: Path, keep: int) -> None:
    saved.write_bytes(saved.read_bytes()[:keep])
    with pytest.raises(SessionError, match="wanted a whole session file"):
        Session.load(generator, saved)


def test_no_file_and_no_place_for_one_are_said(generator: Generator, tmp_path: Path) -> None:
    with pytest.raises(SessionError, match="check the path"):
        Session.load(generator, tmp_path / "none")
    (tmp_path / "file").touch()
    for path in ("none/session", "file/session", "x" * 300):
        with pytest.raises(TargetError):
            Session(generator).save(tmp_path / path)
    with pytest.raises(TargetError):
        Session(generator).save("")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
