"""Text to token ids on disk, and token ids to batches: nothing is ever held in memory whole."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from gptrt.disk import replaced
from gptrt.errors import DataError

from .progress import Progress, silent

Ids = NDArray[np.int64]
StoredIds = NDArray[np.uint32]  # as files have them

TRAIN_IDS, VALID_IDS = "train.bin", "valid.bin"
TEXT_SUFFIXES = (".txt", ".md", ".text")
_PIECE = 1 << 20  # characters read at a time
_COUNTED = 1 << 24  # ids at a time
_UNCUT = 2  # so many of them are cut somewhere, even if nothing tells words apart

_DTYPE = np.dtype("<u4")  # one width for every vocabulary: simple, and the disk is patient


def find_texts(paths: Sequence[Path]) -> list[Path]:
    """The files named, and the text files inside the folders named. Raises DataError."""
    found: list[Path] = []
    faults: list[str] = []
    for path in paths:
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.suffix in TEXT_SUFFIXES and p.is_file())
            found.extend(inside)
            if not inside:
                faults.append(f"no {', '.join(TEXT_SUFFIXES)} file in {path}")
        elif path.is_file():
            found.append(path)
        else:
            faults.append(f"no file or folder {path}")
    if faults or not found:
        raise DataError("text files", found="; ".join(faults) or "none", do="check the paths")
    return found


def read_pieces(path: Path) -> Iterator[str]:
    """The text of a file in pieces of about a megabyte, each ending where a word ends.

    Cut before a single space between two words, a place where byte-level BPE cuts in any case,
    so that the pieces have the same tokens as the whole. Megabytes without such a place are cut
    after a line, or where they are: there the tokens may differ from those of the whole, by one or
    so a cut. Raises DataError if it is not UTF-8.
    """
    rest = ""
    try:
        with path.open(encoding="utf-8", newline="") as stream:
            while more := stream.read(_PIECE):
                text = rest + more
                cut = _last_gap(text, max(0, len(rest) - 2))  # the rest itself has none
                if not cut and len(text) >= _UNCUT * _PIECE:
                    cut = _last_line(text) or len(text)
                rest = text[cut:]
                if cut:
                    yield text[:cut]
    except UnicodeDecodeError as e:
        raise DataError(
            f"UTF-8 text in {path}",
            found=f"byte {e.object[e.start]:#04x} ({e.reason})",
            do="convert the file to UTF-8 or leave it out",
        ) from e
    except OSError as e:
        raise DataError(f"to read {path}", found=e.strerror or str(e), do="check the file") from e
    if rest:
        yield rest


def _last_gap(text: str, begin: int) -> int:
    """Where the last ' x' with a non-space on both sides begins, after `begin`; 0 if there is
    none."""
    at = len(text) - 1
    while (at := text.rfind(" ", begin + 1, at)) > 0:
        if not text[at - 1].isspace() and not text[at + 1].isspace():
            return at
    return 0


def _last_line(text: str) -> int:
    """Where the last line begins that does so with a non-space; 0 if there is none."""
    at = len(text) - 1
    while (at := text.rfind("\n", 0, at)) >= 0:
        if not text[at + 1].isspace():
            return at + 1
    return 0


def read_all(paths: Sequence[Path], progress: Progress, note: str) -> Iterator[str]:
    """The pieces of all files, one after another."""
    total, done = max(1, sum(path.stat().st_size for path in paths)), 0
    for path in paths:
        for piece in read_pieces(path):
            yield piece
            done += len(piece)  # characters for bytes: near enough for a bar
            progress(min(1.0, done / total), note)


def tokenize(
    paths: Sequence[Path],
    tokenizer: Tokenizer,
    target: Path,
    *,
    end: int | None,
    held_out: float = 0.0,
    progress: Progress = silent,
) -> tuple[int, Ids]:
    """Write the ids of all files to `target`, each file closed by the id `end`.

    Returns how many ids were written, and the last `held_out` share of every file, which is left
    out of `target`. The file appears under its name only when it is whole.
    """
    held: list[StoredIds] = []
    with replaced(target, target.with_name(f"{target.name}.partial")) as out:
        for number, path in enumerate(paths):
            start = out.tell()
            progress(number / len(paths), f"tokenizing {path.name}")
            for piece in read_pieces(path):
                np.asarray(encode(tokenizer, piece, path), _DTYPE).tofile(out)
            if end is not None:
                np.asarray([end], _DTYPE).tofile(out)
            written = (out.tell() - start) // _DTYPE.itemsize
            if keep_back := int(written * held_out):
                cut = out.tell() - keep_back * _DTYPE.itemsize
                out.seek(cut)
                held.append(np.fromfile(out, _DTYPE))
                out.seek(cut)
                out.truncate()
        total = out.tell() // _DTYPE.itemsize
    return total, np.concatenate(held).astype(np.int64) if held else np.zeros(0, np.int64)


def encode(tokenizer: Tokenizer, text: str, path: Path, *, whole: bool = False) -> list[int]:
    """The ids of a part of a file; `whole` adds what the tokenizer puts around texts. Raises
    DataError if a character has none."""
    try:
        ids: list[int] = tokenizer.encode(text, add_special_tokens=whole).ids
        return ids
    except Exception as e:  # the library raises plain Exception
        raise DataError(
            f"text that the tokenizer knows in {path}",
            found=str(e),
            do="train a tokenizer on this text, or use a byte-level one",
        ) from e


def save_ids(ids: Ids, target: Path) -> None:
    """Write ids as `tokenize` does, whole or not at all."""
    with replaced(target, target.with_name(f"{target.name}.partial")) as stream:
        stream.write(ids.astype(_DTYPE).tobytes())


def open_ids(path: Path) -> StoredIds:
    """The ids of a file that `tokenize` wrote, memory-mapped."""
    if not path.is_file() or path.stat().st_size == 0:
        raise DataError(f"token ids in {path}", found="nothing", do="give --data again")
    return np.memmap(path, _DTYPE, "r")


@dataclass(frozen=True)
class Batch:
    """Rows to train on: ids int64 [rows, length] and what is to follow each.

    `shares` [rows, length] weigh the losses, which count alike if they are None. Where several
    texts stand in a row, `segments` number them and `positions` count from the beginning of each.
    """

    inputs: Ids
    targets: Ids
    shares: NDArray[np.float32] | None = None
    segments: Ids | None = None
    positions: Ids | None = None

    @classmethod
    def whole(cls, ids: Ids) -> Batch:
        """Of windows [rows, length + 1], all of which counts."""
        return cls(ids[:, :-1], ids[:, 1:])


@dataclass(frozen=True)
class Windows:
    """Windows of `length` + 1 ids, drawn without repetition inside an epoch.

    What a step sees is a function of (seed, step) alone: to resume there is no state to restore,
    and a resumed run reads exactly what an uninterrupted one would have read.
    """

    ids: NDArray[np.uint32]
    length: int
    seed: int

    def __post_init__(self) -> None:
        check_count(len(self.ids), self.length)

    @property
    def per_epoch(self) -> int:
        # One window fewer than fits leaves room to shift the grid from epoch to epoch.
        return max(1, (len(self.ids) - 1) // self.length - 1)

    def batch(self, step: int, size: int) -> Ids:
        """Ids [size, length + 1] of a step, counted from 0: inputs [:, :-1], targets [:, 1:]."""
        serial = range(step * size, (step + 1) * size)
        return np.stack([self._window(*divmod(n, self.per_epoch)) for n in serial])

    def _window(self, epoch: int, index: int) -> Ids:
        shift, order = _epoch_order(self.seed, epoch, self.per_epoch, self._slack)
        start = shift + int(order[index]) * self.length
        return self.ids[start : start + self.length + 1].astype(np.int64)

    @property
    def _slack(self) -> int:
        return len(self.ids) - 1 - self.per_epoch * self.length


def check_count(count: int, length: int) -> None:
    """Raises DataError for so few ids that not one window can be taken from them."""
    if count <= length:
        raise DataError(
            f"more than {length} tokens",
            found=f"{count}",
            do="give more text, or a preset with a shorter context",
        )


@lru_cache(maxsize=4)
def _epoch_order(seed: int, epoch: int, count: int, slack: int) -> tuple[int, NDArray[np.uint32]]:
    random = np.random.default_rng([seed, epoch])
    return int(random.integers(slack + 1)), random.permutation(count).astype(np.uint32)


def in_order(
    ids: NDArray[np.uint32], length: int, size: int, most: int = sys.maxsize
) -> Iterator[Ids]:
    """Whole windows of `ids`, [up to size, length + 1] at a time: all, or `most` from all over."""
    fitting = (len(ids) - 1) // length
    count = min(fitting, most)
    starts = [n * fitting // count * length for n in range(count)]
    for first in range(0, count, size):
        windows = [ids[s : s + length + 1] for s in starts[first : first + size]]
        yield np.stack(windows).astype(np.int64)


def spread_windows(ids: NDArray[np.uint32], length: int, tokens: int) -> Ids:
    """About `tokens` ids in windows [count, length] from all over `ids`, none overlapping."""
    length = min(length, len(ids))
    fitting = len(ids) // length
    count = max(1, min(fitting, tokens // length))
    starts = (np.arange(count) * fitting // count) * length
    return np.stack([ids[s : s + length] for s in starts]).astype(np.int64)


def count_each(ids: NDArray[np.uint32], vocab_size: int) -> Ids:
    """How often each id occurs [vocab_size]."""
    pieces = np.array_split(ids, -(-len(ids) // _COUNTED))
    return sum(
        (np.bincount(piece, minlength=vocab_size) for piece in pieces),
        start=np.zeros(vocab_size, np.int64),
    )
