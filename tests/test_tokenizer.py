"""Text that goes in and text that leaves whole."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptrt.errors import BundleError, PromptError
from gptrt.tokenizer import StopStrings, Tokenizer
from tests.fakes import (
    EOS,
    VOCAB,
    byte_fallback_tokenizer,
    byte_tokenizer,
    character_tokenizer,
    unigram_tokenizer,
)

ALPHABET = "abé世👍 \n"


def pieces(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    decoder = tokenizer.stream_decoder()
    return [*(decoder.push(i) for i in ids), decoder.flush()]


@given(st.text())
def test_text_comes_back_as_it_was(text: str) -> None:
    tokenizer = byte_tokenizer()
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(st.lists(st.integers(0, VOCAB + 3)))
def test_streamed_bytes_join_to_the_decoded_whole_even_if_they_are_no_text(ids: list[int]) -> None:
    tokenizer = byte_tokenizer()
    assert "".join(pieces(tokenizer, ids)) == tokenizer.decode(ids)


@given(st.text("ab e\u4e16\U0001f44d\n", max_size=12))
def test_unigram_pieces_stream_as_they_are_decoded(text: str) -> None:
    tokenizer = unigram_tokenizer()
    ids = tokenizer.encode(text)
    assert "".join(pieces(tokenizer, ids)) == tokenizer.decode(ids)
    assert tokenizer.decode(ids).strip(" ") == text.strip(" ")


@given(st.text(ALPHABET))
def test_a_piece_never_has_half_a_character(text: str) -> None:
    for tokenizer in (byte_tokenizer(), byte_fallback_tokenizer(), character_tokenizer(ALPHABET)):
        streamed = pieces(tokenizer, tokenizer.encode(text))
        assert "".join(streamed) == text
        assert all("\N{REPLACEMENT CHARACTER}" not in piece for piece in streamed)


def test_a_character_leaves_with_its_last_byte() -> None:
    tokenizer = byte_tokenizer()
    assert pieces(tokenizer, [*"é!".encode()]) == ["", "é", "!", ""]
    assert pieces(tokenizer, [*"👍".encode()]) == ["", "", "", "👍", ""]


def test_half_a_character_at_the_end_is_marked() -> None:
    assert pieces(byte_tokenizer(), [*"a👍".encode()][:-1])[-1] == "\N{REPLACEMENT CHARACTER}"


def test_a_replacement_character_in_the_text_is_text() -> None:
    mark = "\N{REPLACEMENT CHARACTER}"
    for text in (f"{mark}a{mark}", f"\u4e16{mark}\U0001f44d\u200d\u4e16{mark}{mark}\u4e16"):
        for tokenizer in (byte_tokenizer(), byte_fallback_tokenizer(), unigram_tokenizer()):
            ids = tokenizer.encode(text)
            assert "".join(pieces(tokenizer, ids)) == tokenizer.decode(ids)
            assert tokenizer.decode(ids).strip() == text


def test_special_tokens_are_no_text() -> None:
    assert pieces(byte_tokenizer(), [65, EOS, 66]) == ["A", "", "B", ""]


def test_a_character_without_a_token_is_refused() -> None:
    with pytest.raises(PromptError):
        character_tokenizer("ab").encode("abc")


def test_half_a_surrogate_pair_is_refused() -> None:
    with pytest.raises(PromptError):
        byte_tokenizer().encode("\ud800")


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text('{"model": 1}')
    with pytest.raises(BundleError, match=r"tokenizer\.json"):
        Tokenizer.read(tmp_path / "tokenizer.json", ())


# --- stop strings -------------------------------------------------------------------------------


def cut(text: str, stops: list[str]) -> tuple[str, str | None]:
    """The definition: read character by character until a stop string is complete."""
    for end in range(len(text) + 1):
        complete = [s for s in stops if text[:end].endswith(s)]
        if complete:
            longest = max(complete, key=len)
            return text[: end - len(longest)], longest
    return text, None


words = st.text("ab", max_size=4)


@given(st.lists(words), st.lists(words.filter(bool)))
def test_the_borders_of_pieces_do_not_matter(texts: list[str], stops: list[str]) -> None:
    stop, left = StopStrings(stops), ""
    for text in texts:
        left += stop.push(text)
        assert cut("".join(texts), stops)[0].startswith(left)
        if stop.fired:
            break
    assert (left + stop.flush(), stop.fired) == cut("".join(texts), stops)


def test_stopping_never_leaks_a_part_of_a_stop_string() -> None:
    stop = StopStrings(["</s>"])
    assert [stop.push(p) for p in ("a<", "/s", "b</", "s> more")] == ["a", "", "</sb", ""]
    assert stop.fired == "</s>"


def test_text_is_held_no_longer_than_needed() -> None:
    stop = StopStrings(["abc"])
    assert [stop.push(p) for p in ("xa", "b", "x")] == ["x", "", "abx"]
    assert (stop.push("ab"), stop.flush()) == ("", "ab")
