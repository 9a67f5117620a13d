"""Tables of any size, row by row: JSON lines, CSV, TSV, and texts of one a line.

The end of a file's name says how it is read, always as UTF-8:

    .jsonl  an object a line                                    https://jsonlines.org
    .csv    cells in quotes where needed, the first line names  RFC 4180
    .tsv    cells between tabs, no quotes, the first line names
            (https://www.iana.org/assignments/media-types/text/tab-separated-values)
    .txt    a text a line: the one column `text`

Empty lines are passed over. Never is more than a row in memory. Standard library only.
"""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any

from gptrt.errors import DataError

TEXT = "text"  # the column of a .txt
SUFFIXES = (".jsonl", ".csv", ".tsv", ".txt")

_LONGEST_LINE = 1 << 26  # bytes
_LONGEST_CELL = 1 << 24  # characters: what an open quote may swallow before it is called one
_SHOWN = 20  # faults in a message


@dataclass(frozen=True)
class Row:
    """A row that begins in a line of its file, the first line being 1.

    `columns` is all of it, by the file's own names; `values` what was asked for, by the names that
    were asked for. What comes from JSON may be any value of JSON, the rest is text.
    """

    line: int
    values: dict[str, Any]
    columns: dict[str, Any]


class Faults:
    """What is wrong with a file: all of it is counted, the first of it kept.

    A reader that finds more than the table itself can know, an unknown label for example, adds it
    to those of `read_rows`.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path, self.count = Path(path), 0
        self._shown: list[str] = []

    def add(self, line: int, found: str) -> None:
        self.count += 1
        if self.count <= _SHOWN:
            self._shown.append(f"{self.path}:{line}: {found}")

    def check(self) -> None:
        """Raises DataError with the first 20, each with file and line, and how many more."""
        if self.count:
            more = f"; and {self.count - _SHOWN} more" if self.count > _SHOWN else ""
            raise DataError(
                f"rows that can be used in {self.path}",
                found="; ".join(self._shown) + more,
                do="correct these lines or take them out",
            )


class _AtOnce(Faults):
    """Raises at the first."""

    def add(self, line: int, found: str) -> None:
        super().add(line, found)
        self.check()


def read_rows(
    path: str | os.PathLike[str],
    fields: Mapping[str, str] | None = None,
    *,
    faults: Faults | None = None,
) -> Iterator[Row]:
    """The rows of a table. `fields` names the values by the columns that they stand in, as
    {"text": "review"}; without it they bear the names of their columns.

    Where all these columns are numbers, a .csv or .tsv has no line with names: its columns are "1",
    "2" and so on.

    A broken row (no UTF-8, no JSON, cells too few or too many, a column missing) is added to
    `faults` and left out; without `faults` it raises DataError, as does a file that cannot be read.
    """
    path = Path(path)
    found = _AtOnce(path) if faults is None else faults
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(
            f"a table whose name ends in {', '.join(SUFFIXES)}", found=str(path), do="rename it"
        )
    try:
        with path.open("rb") as stream:
            yield from _named(reader(_Lines(stream, found), fields or {}), fields, found)
    except OSError as e:
        raise DataError(f"to read {path}", found=e.strerror or str(e), do="check the path") from e


def checked_rows(
    path: str | os.PathLike[str],
    fields: Mapping[str, str] | None = None,
    *,
    wrong: Callable[[Row], str | None] | None = None,
    limit: int | None = None,
) -> Iterator[Row]:
    """The rows of a table, or the first `limit` of them, that have no fault; then, at the end,
    DataError with all faults, or for a table without a row.

    `wrong` says what else a row has wrong, if anything.
    """
    faults, row = Faults(path), None
    for row in islice(read_rows(path, fields, faults=faults), limit):
        if wrong is not None and (found := wrong(row)):
            faults.add(row.line, found)
        else:
            yield row
    faults.check()
    if row is None:
        raise DataError(f"a row or more in {path}", found="none", do="check the file")


def no_texts(row: Row) -> str | None:
    """Which values of a row are not text: for `checked_rows`."""
    found = [name for name, value in row.values.items() if not isinstance(value, str)]
    shown = (f"{name} is {json.dumps(row.values[name])[:40]}, wanted text" for name in found)
    return ", ".join(shown) or None


def _named(
    rows: Iterator[tuple[int, dict[str, Any]]], fields: Mapping[str, str] | None, faults: Faults
) -> Iterator[Row]:
    """Rows with the values that were asked for."""
    for line, columns in rows:
        if fields is None:
            yield Row(line, columns, columns)
        elif missing := _missing(columns, fields):
            faults.add(line, missing)
        else:
            yield Row(line, {name: columns[column] for name, column in fields.items()}, columns)


def _missing(columns: Sequence[str] | Mapping[str, Any], fields: Mapping[str, str]) -> str:
    absent = [column for column in fields.values() if column not in columns]
    return f"no {', '.join(map(repr, absent))} in {', '.join(columns)}" if absent else ""


# --- lines --------------------------------------------------------------------------------------


class _Lines:
    """The lines of a file, their ends included, as text; `number` is that of the last.

    What is no UTF-8, or too long, is a fault, and comes with its bad bytes replaced, or cut off.
    """

    def __init__(self, stream: IO[bytes], faults: Faults) -> None:
        self._stream, self.faults = stream, faults
        self.number = 0
        self.bad = 0  # the last that was no text

    def __iter__(self) -> Iterator[str]:
        while line := self._stream.readline(_LONGEST_LINE + 1):
            self.number += 1
            if self.number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")  # as some editors begin a file
            if len(line) > _LONGEST_LINE and not line.endswith(b"\n"):
                self._refuse(f"a line of more than {_LONGEST_LINE} bytes")
                while (rest := self._stream.readline(_LONGEST_LINE)) and not rest.endswith(b"\n"):
                    pass
            try:
                yield line.decode("utf-8")
            except UnicodeDecodeError as e:
                self._refuse(f"no UTF-8 text: {e.reason} at byte {e.start + 1}")
                yield line.decode("utf-8", "replace")

    def _refuse(self, found: str) -> None:
        if self.bad != self.number:
            self.bad = self.number
            self.faults.add(self.number, found)


# --- formats: lines to rows, each with the line where it begins -----------------------------------


def _texts(lines: _Lines, fields: Mapping[str, str]) -> Iterator[tuple[int, dict[str, Any]]]:
    del fields
    for line in lines:
        text = line.rstrip("\r\n")
        if text and lines.bad != lines.number:
            yield lines.number, {TEXT: text}


def _objects(lines: _Lines, fields: Mapping[str, str]) -> Iterator[tuple[int, dict[str, Any]]]:
    del fields
    for line in lines:
        if lines.bad == lines.number or not line.strip():
            continue
        try:
            value = json.loads(line, parse_constant=_no_number, parse_float=_finite)
            if "\\u" in line:  # half of a surrogate pair is no text
                json.dumps(value, ensure_ascii=False).encode("utf-8")
        except (ValueError, RecursionError) as e:
            lines.faults.add(lines.number, f"no JSON: {e}")
            continue
        if isinstance(value, dict):
            yield lines.number, value
        else:
            lines.faults.add(lines.number, "no JSON object")


def _no_number(name: str) -> Any:
    raise ValueError(f"{name}")


def _finite(digits: str) -> float:
    value = float(digits)
    return value if math.isfinite(value) else _no_number(digits)


def _tabbed(lines: _Lines, fields: Mapping[str, str]) -> Iterator[tuple[int, dict[str, Any]]]:
    cells = (
        (lines.number, line.rstrip("\r\n").split("\t"))
        for line in lines
        if line.strip("\r\n") and lines.bad != lines.number
    )
    return _under_names(cells, fields, lines.faults)


def _quoted(lines: _Lines, fields: Mapping[str, str]) -> Iterator[tuple[int, dict[str, Any]]]:
    return _under_names(_records(lines), fields, lines.faults)


def _records(lines: _Lines) -> Iterator[tuple[int, list[str]]]:
    # The limit is one for the process; its default, 131,072, is less than a chapter of a book.
    csv.field_size_limit(max(csv.field_size_limit(), _LONGEST_CELL))
    reader = csv.reader(lines, strict=True)
    while True:
        begin = lines.number + 1
        try:
            record = next(reader)
        except StopIteration:
            return
        except csv.Error as e:
            lines.faults.add(begin, f"no CSV: {e}")
            continue
        if record and lines.bad < begin:
            yield begin, record


def _under_names(
    rows: Iterator[tuple[int, list[str]]], fields: Mapping[str, str], faults: Faults
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Cells by the names in the first row, or by their numbers."""
    names: list[str] | None = None
    before = faults.count
    for line, cells in rows:
        if names is None and fields and all(column.isdecimal() for column in fields.values()):
            names = [str(number) for number in range(1, len(cells) + 1)]
        elif names is None:
            if faults.count > before:  # the line with the names was one of them
                return
            names = cells
            wrong = _twice(names) or _missing(names, fields)
            if wrong:  # of every row: once is enough
                faults.add(line, wrong)
                return
            continue
        if len(cells) == len(names):
            yield line, dict(zip(names, cells, strict=True))
        else:
            faults.add(line, f"{len(cells)} cells, wanted {len(names)}")


def _twice(names: Sequence[str]) -> str:
    again = sorted({name for name in names if names.count(name) > 1})
    return f"two columns named {', '.join(map(repr, again))}" if again else ""


_Reader = Callable[[_Lines, Mapping[str, str]], Iterator[tuple[int, dict[str, Any]]]]
_READERS: dict[str, _Reader] = dict(
    zip(SUFFIXES, (_objects, _quoted, _tabbed, _texts), strict=True)
)
