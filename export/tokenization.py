"""Making tokenizers: byte-level BPE, characters, or GPT-2's own files; always a tokenizer.json."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)

from gptrt.chat import ChatTemplate
from gptrt.errors import CheckpointError, DataError
from gptrt.format import TOKENIZER_CONFIG_FILE, TOKENIZER_FILE

END_OF_TEXT = "<|endoftext|>"

# Of texts by which ids are ordered: some megabytes from all over, which take seconds to encode.
_SAMPLED_TEXTS, _SAMPLED_CHARACTERS = 32, 1 << 18

# Typographic characters cost two or three byte tokens each and add nothing to a small model.
PLAIN_PUNCTUATION = {"“": '"', "”": '"', "‘": "'", "’": "'", "—": "--", "–": "-", "…": "..."}


@dataclass(frozen=True)
class TokenizerConfig:
    """Which tokenizer a preset trains; `plain_punctuation` makes curly quotes and dashes ASCII."""

    kind: Literal["bpe", "char"]
    vocab_size: int = 8192
    plain_punctuation: bool = False


@dataclass(frozen=True)
class SpecialIds:
    """The id that begins a text and those that end one, as `config.json` names them."""

    bos: int | None = None
    eos: tuple[int, ...] = ()

    @property
    def end(self) -> int | None:
        """The one that closes a text in training."""
        return self.eos[0] if self.eos else None

    def json(self) -> dict[str, Any]:
        eos = list(self.eos) if len(self.eos) > 1 else self.end
        return {"bos_token_id": self.bos, "eos_token_id": eos}


def special_ids(tokenizer: Tokenizer) -> SpecialIds:
    """Those of a tokenizer that we made: one token is both."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    return SpecialIds() if end is None else SpecialIds(end, (end,))


def read_special_ids(json: dict[str, Any], vocab_size: int) -> SpecialIds | None:
    """What a `config.json` or `generation_config.json` says; None if it does not say what ends a
    text. Ids outside the vocabulary, which some files have, never come up and are left out."""
    bos, eos = json.get("bos_token_id"), json.get("eos_token_id")
    if eos is None:
        return None
    ids = [i for i in (eos if isinstance(eos, list) else [eos]) if _is_id(i, vocab_size)]
    return SpecialIds(bos if _is_id(bos, vocab_size) else None, tuple(ids))


def _is_id(value: Any, vocab_size: int) -> bool:
    return type(value) is int and 0 <= value < vocab_size


def train_tokenizer(config: TokenizerConfig, texts: Iterable[str]) -> Tokenizer:
    """Learn a tokenizer from an iterable of texts. Raises DataError if there is no text."""
    make = {"bpe": _train_bpe, "char": _train_characters}[config.kind]
    return make(config, texts)


def _train_bpe(config: TokenizerConfig, texts: Iterable[str]) -> Tokenizer:
    """Byte-level BPE as GPT-2 has it: every byte is a token, so any text can be encoded."""
    sample: list[str] = []
    tokenizer = Tokenizer(models.BPE())
    if config.plain_punctuation:
        replacements = [normalizers.Replace(a, b) for a, b in PLAIN_PUNCTUATION.items()]
        tokenizer.normalizer = normalizers.Sequence(replacements)
    _make_byte_level(tokenizer)
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_sampled(texts, sample), trainer)
    return by_frequency(tokenizer, sample)


def _sampled(texts: Iterable[str], sample: list[str]) -> Iterator[str]:
    """The texts as they come; the beginnings of some from all over them end up in `sample`."""
    stride = 1
    for number, text in enumerate(texts):
        if number % stride == 0:
            sample.append(text[:_SAMPLED_CHARACTERS])
        if len(sample) == _SAMPLED_TEXTS:
            del sample[1::2]
            stride *= 2
        yield text


def by_frequency(tokenizer: Tokenizer, sample: Sequence[str]) -> Tokenizer:
    """The same BPE with ids in the order of how often `sample` has them; special tokens stay first.

    A merge may be learnt early and yet hardly be seen in the end, as it mostly becomes part of a
    longer one. In this order the first rows of a vocabulary matrix are those that count, which is
    what `quantize` goes by.
    """
    count: Counter[int] = Counter()
    for encoding in tokenizer.encode_batch(list(sample), add_special_tokens=False):
        count.update(encoding.ids)
    plan = json.loads(tokenizer.to_str())
    special = {token["id"] for token in plan["added_tokens"]}
    old = plan["model"]["vocab"]
    order = sorted(
        old, key=lambda token: (old[token] not in special, -count[old[token]], old[token])
    )
    plan["model"]["vocab"] = {token: new for new, token in enumerate(order)}
    for token in plan["added_tokens"]:
        token["id"] = plan["model"]["vocab"][token["content"]]
    return Tokenizer.from_str(json.dumps(plan))


def _train_characters(config: TokenizerConfig, texts: Iterable[str]) -> Tokenizer:
    """One token a character, in the order of code points; an unseen character is an error."""
    del config  # the text decides the size
    characters: set[str] = set()
    for text in texts:
        characters.update(text)
    if not characters:
        raise DataError("text", found="none", do="give files that are not empty")
    vocabulary = {character: i for i, character in enumerate(sorted(characters))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return tokenizer


_GPT2_FILES = (("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt"))


def open_tokenizer(path: Path) -> Tokenizer:
    """A `tokenizer.json`, or a folder that holds one or GPT-2's own two files.

    Raises CheckpointError if there is none.
    """
    if path.is_file():
        return load_tokenizer(path)
    if found := tokenizer_in(path, gpt2=True):
        return found
    pairs = " or ".join(" and ".join(pair) for pair in _GPT2_FILES)
    raise CheckpointError(
        f"{TOKENIZER_FILE}, or {pairs}, in {path}", found="none of them", do="check --tokenizer"
    )


def tokenizer_in(folder: Path, *, gpt2: bool) -> Tokenizer | None:
    """The `tokenizer.json` of a folder, if there is one; of a `gpt2` its own two files serve. Other
    models have files of these names that cut a text into other words."""
    if (folder / TOKENIZER_FILE).is_file():
        return load_tokenizer(folder / TOKENIZER_FILE)
    for vocabulary, merges in _GPT2_FILES if gpt2 else ():
        if (folder / vocabulary).is_file() and (folder / merges).is_file():
            return from_gpt2_files(folder / vocabulary, folder / merges)
    return None


def save_tokenizer(
    tokenizer: Tokenizer,
    folder: Path,
    max_length: int,
    special: SpecialIds,
    chat_template: ChatTemplate | None = None,
) -> None:
    """`tokenizer.json`, and what transformers and onnxruntime-genai want to know beside it."""
    bos, eos = (None if i is None else tokenizer.id_to_token(i) for i in (special.bos, special.end))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # which takes tokenizer.json as it is
        "bos_token": bos,
        "eos_token": eos,
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
    }
    if chat_template is not None:
        own = {
            "bos_token": chat_template.bos_token or bos,
            "eos_token": chat_template.eos_token or eos,
        }
        config |= own | {"chat_template": chat_template.source}
    (folder / TOKENIZER_FILE).write_text(tokenizer.to_str(), encoding="utf-8")
    (folder / TOKENIZER_CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")


def load_tokenizer(path: Path) -> Tokenizer:
    """A `tokenizer.json`, to be used on whole texts: where it cuts or fills up what it is given to
    a length, it does so no more. Raises CheckpointError."""
    try:
        tokenizer = Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except Exception as e:  # the library raises plain Exception
        raise CheckpointError(f"a tokenizer in {path}", found=str(e), do="restore it") from e
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def ids_without_rows(tokenizer: Tokenizer | None, vocab_size: int) -> list[str]:
    """A fault if a tokenizer has ids that a vocabulary matrix of so many rows does not."""
    rows = rows_for(tokenizer) if tokenizer else 0
    if rows <= vocab_size:
        return []
    return [f"the tokenizer has ids up to {rows - 1}, vocab_size is {vocab_size}"]


def rows_for(tokenizer: Tokenizer) -> int:
    """Of a vocabulary matrix that has one for every id, also where ids have gaps."""
    return max(tokenizer.get_vocab().values(), default=-1) + 1


def from_gpt2_files(encoder: Path, merges: Path) -> Tokenizer:
    """GPT-2's `encoder.json` and `vocab.bpe` (also named vocab.json and merges.txt)."""
    try:
        vocabulary = json.loads(encoder.read_text(encoding="utf-8"))
        lines = merges.read_text(encoding="utf-8").splitlines()
        pairs = [line.split(" ") for line in lines if line and not line.startswith("#version")]
        tokenizer = Tokenizer(models.BPE(vocabulary, [(left, right) for left, right in pairs]))
    except Exception as e:  # the library raises plain Exception
        raise CheckpointError(
            f"GPT-2's vocabulary and merges in {encoder} and {merges}",
            found=str(e),
            do="restore the original files",
        ) from e
    _make_byte_level(tokenizer)
    if END_OF_TEXT in vocabulary:
        tokenizer.add_special_tokens([AddedToken(END_OF_TEXT, special=True)])
    return tokenizer


def _make_byte_level(tokenizer: Tokenizer) -> None:
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
