"""The vocabulary of a GGUF file as a `tokenizer.json`.

llama.cpp has two kinds that matter here: byte-level BPE with merges ("gpt2"), where `pre` names the
pattern that cuts a text into words, and SentencePiece's BPE ("llama"), whose merges are not written
down: the pieces with the highest scores are made first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from gptrt.chat import ChatTemplate
from gptrt.errors import CheckpointError

from .tokenization import SpecialIds

_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4  # types of tokens
_SPACE = "▁"

_LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_LETTERS}|\p{{N}}{{1,3}}|{_REST}"
_QWEN2 = rf"{_LETTERS}|\p{{N}}|{_REST}"


def _words(*steps: Any, gpt2: bool) -> Any:
    """What cuts a text into words, GPT-2's own pattern the last if wanted; then bytes."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=gpt2)
    return pre_tokenizers.Sequence([*steps, byte_level])


_WORDS = {
    "gpt-2": _words(gpt2=True),
    "olmo": _words(gpt2=True),
    "smollm": _words(pre_tokenizers.Digits(individual_digits=True), gpt2=True),
    "llama-bpe": _words(pre_tokenizers.Split(Regex(_LLAMA3), "isolated"), gpt2=False),
    "qwen2": _words(pre_tokenizers.Split(Regex(_QWEN2), "isolated"), gpt2=False),
}
_BEGINS_TEXT = {"llama-bpe"}  # where nothing is said of it


def read_vocabulary(values: Mapping[str, Any], source: Path) -> Tokenizer:
    """The tokenizer that a file's metadata describe. Raises CheckpointError for one that is none of
    the kinds here."""
    kind, tokens = _value(values, "model"), _value(values, "tokens")
    if kind not in _MAKERS or not isinstance(tokens, list):
        raise CheckpointError(
            f"a vocabulary of {' or '.join(_MAKERS)} in {source}", found=repr(kind), do=_OTHERWISE
        )
    try:
        tokenizer = _MAKERS[kind](values, tokens, source)
    except CheckpointError:
        raise
    except Exception as e:  # the library raises plain Exception
        raise CheckpointError(f"a whole vocabulary in {source}", found=str(e), do=_OTHERWISE) from e
    bos = special_ids_of(values).bos
    begins = kind == "llama" or _value(values, "pre") in _BEGINS_TEXT
    if bos is not None and _value(values, "add_bos_token", begins):
        first = tokens[bos]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{first}:0 $A:0", pair=None, special_tokens=[(first, bos)]
        )
    _add_special(tokenizer, tokens, _value(values, "token_type", []))
    return tokenizer


def special_ids_of(values: Mapping[str, Any]) -> SpecialIds:
    """What a file's metadata say begins a text, and what ends one."""
    tokens = _value(values, "tokens", [])
    bos, *ends = (_id(values, key, tokens) for key in ("bos", "eos", "eot"))
    return SpecialIds(bos, tuple(dict.fromkeys(i for i in ends if i is not None)))


def read_chat_template(values: Mapping[str, Any]) -> ChatTemplate | None:
    """What a file's metadata say of conversations, if anything."""
    source, tokens = values.get("tokenizer.chat_template"), _value(values, "tokens", [])
    ends = (_id(values, key, tokens) for key in ("bos", "eos"))
    texts = ("" if i is None else tokens[i] for i in ends)
    return ChatTemplate(source, *texts) if isinstance(source, str) else None


_OTHERWISE = "put the tokenizer.json of the original model beside it"


def _value(values: Mapping[str, Any], key: str, default: Any = None) -> Any:
    return values.get(f"tokenizer.ggml.{key}", default)


def _id(values: Mapping[str, Any], key: str, tokens: Sequence[str]) -> int | None:
    """Ids outside the vocabulary stand for none in some files."""
    found = _value(values, f"{key}_token_id")
    return int(found) if found is not None and 0 <= found < len(tokens) else None


def _byte_level(values: Mapping[str, Any], tokens: list[str], source: Path) -> Tokenizer:
    pre = _value(values, "pre", "gpt-2")
    if pre not in _WORDS:
        raise CheckpointError(
            f"words cut as {', '.join(_WORDS)} do in {source}", found=repr(pre), do=_OTHERWISE
        )
    merges = [tuple(line.split(" ", 1)) for line in _value(values, "merges", [])]
    tokenizer = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, merges))
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = _WORDS[pre]
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(values: Mapping[str, Any], tokens: list[str], source: Path) -> Tokenizer:
    ids = {token: i for i, token in enumerate(tokens)}
    scores = _value(values, "scores")
    if not isinstance(scores, list) or len(scores) != len(tokens):
        raise CheckpointError(f"a score for each token in {source}", found="not", do=_OTHERWISE)
    unknown = _id(values, "unknown", tokens)
    model = models.BPE(
        ids,
        _merges(ids, scores),
        unk_token=None if unknown is None else tokens[unknown],
        fuse_unk=True,
        byte_fallback="<0x00>" in ids,
    )
    tokenizer = Tokenizer(model)
    prefixed = _value(values, "add_space_prefix", True)
    spaces: list[Any] = [normalizers.Replace(" ", _SPACE)]
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend(_SPACE), *spaces] if prefixed else spaces
    )
    steps: list[Any] = [
        decoders.Replace(_SPACE, " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
    ]
    tokenizer.decoder = decoders.Sequence(
        [*steps, decoders.Strip(content=" ", left=1)] if prefixed else steps
    )
    return tokenizer


def _merges(ids: Mapping[str, int], scores: Sequence[float]) -> list[tuple[str, str]]:
    """Whatever two pieces make a third, from the highest score of the third to the lowest."""
    made = sorted((t for t in ids if len(t) > 1), key=lambda t: (-scores[ids[t]], ids[t]))
    return [
        (token[:at], token[at:])
        for token in made
        for at in range(1, len(token))
        if token[:at] in ids and token[at:] in ids
    ]


_MAKERS = {"gpt2": _byte_level, "llama": _sentencepiece}


def _add_special(tokenizer: Tokenizer, tokens: Sequence[str], types: Sequence[int]) -> None:
    named = list(zip(tokens, types, strict=False))
    control = [t for t, kind in named if kind in (_CONTROL, _UNKNOWN)]
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in control])
    defined = [t for t, kind in named if kind == _USER_DEFINED]
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in defined])
