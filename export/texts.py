"""Which text a conversion calibrates on, and which it is judged by: never the same."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from gptrt.architecture import ModelConfig
from gptrt.errors import CheckpointError, DataError

from .data import TRAIN_IDS, VALID_IDS, StoredIds, encode, open_ids, read_pieces
from .examples import Examples, has_examples
from .runs import DATA_FOLDER

DEFAULT_TOKENS = 16_384  # to verify on
_MOST_CALIBRATION, _LEAST_CALIBRATION = 1 << 16, 1 << 10
_SPREAD = 16  # times as much text is read as is used: windows come from all over it
_CALIBRATION_WORK = 6e11  # weights times tokens: minutes on two cores, whatever the model's size


@dataclass(frozen=True)
class Texts:
    """`verify` is text that neither training nor calibration has seen; `calibration` is there
    where it was asked for. `examples` is there where `verify` consists of them."""

    verify: StoredIds
    name: str
    calibration: StoredIds | None
    examples: Examples | None = None


@dataclass(frozen=True)
class TextFiles:
    """What a user names; None leaves it to the run folder, or to the rest of the other file."""

    verify: Path | None = None
    calibration: Path | None = None
    verify_tokens: int = DEFAULT_TOKENS


def choose_texts(
    source: Path,
    tokenizer: Tokenizer | None,
    files: TextFiles,
    *,
    calibrate: ModelConfig | None = None,
) -> Texts:
    """The ids for a conversion of the checkpoint at `source`; `calibrate` is the shape of a model
    that is to be calibrated.

    A run folder brings both: what it was trained on and what it has held out, to be read from all
    over. A file to verify on gives its first tokens, and its rest for calibration where no other is
    named. Raises DataError.
    """
    if tokenizer is None:
        raise CheckpointError(f"tokenizer.json in {source}", found="none", do="add the file")
    trained_on, held_out = (source / DATA_FOLDER / name for name in (TRAIN_IDS, VALID_IDS))
    examples = None
    wanted = _SPREAD * calibration_tokens(calibrate) if calibrate else 0
    own = files.calibration is not None and not _same(files.calibration, files.verify)
    rest = np.zeros(0, np.uint32)
    if files.verify is not None:
        tokens = files.verify_tokens
        ids = _read(tokenizer, files.verify, tokens + wanted)
        shared = calibrate is not None and not own and not trained_on.is_file()
        verify, rest = _split(ids, tokens, halve=shared)
        name = files.verify.name
    elif held_out.is_file():
        verify, name = open_ids(held_out), "the run's held-out text"
        if has_examples(held_out):
            examples, name = Examples.open(held_out), "answers that the run has held out"
    else:
        raise DataError(
            "text to verify on (a run folder brings its own)",
            found=f"a checkpoint without it, {source}",
            do="give --verify-text FILE (verify: --text), text of the kind that the model is for",
        )
    if calibrate is None:
        return Texts(verify, name, None, examples)
    if own and files.calibration is not None:
        found = _read(tokenizer, files.calibration, wanted)
    elif trained_on.is_file():
        found = open_ids(trained_on)
    else:
        found = rest
    _check_length(found, calibrate)
    return Texts(verify, name, found, examples)


def calibration_tokens(config: ModelConfig) -> int:
    """Tokens to correct errors on: many for a small model, fewer where each takes long."""
    size = config.n_layer * config.n_embd * (4 * config.n_embd + 2 * config.n_inner)
    return max(1 << 13, min(_MOST_CALIBRATION, int(_CALIBRATION_WORK / size)))


def _read(tokenizer: Tokenizer, path: Path, tokens: int) -> StoredIds:
    """The first ids of a file. As in use, one token begins a text where the tokenizer has one."""
    pieces = (
        encode(tokenizer, piece, path, whole=number == 0)
        for number, piece in enumerate(read_pieces(path))
    )
    return np.fromiter(islice(chain.from_iterable(pieces), tokens + 1), np.uint32)


def _split(ids: StoredIds, tokens: int, *, halve: bool) -> tuple[StoredIds, StoredIds]:
    """What to verify on, and what is left: the half of a text that is short, if it is needed."""
    cut = min(tokens + 1, len(ids) // 2 if halve else len(ids))
    return ids[:cut], ids[cut:]


def _same(a: Path, b: Path | None) -> bool:
    return b is not None and a.exists() and b.exists() and a.samefile(b)


def _check_length(ids: StoredIds, config: ModelConfig) -> None:
    least = max(_LEAST_CALIBRATION, config.n_embd, config.n_inner)
    if len(ids) < least:
        raise DataError(
            f"text of {least} tokens or more to calibrate on, not the one to verify on",
            found=f"{len(ids)} tokens",
            do="give a longer --calibration-text FILE, or what needs none: --method nearest and "
            "a KV cache in floats",
        )
