"""Tables: every format gives the same rows, and every fault is told with its line."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from gptrt.errors import DataError
from gptrt.tables import Faults, Row, checked_rows, no_texts, read_rows

FORMATS = {
    ".jsonl": '{"text": "A \\u00e9, b", "id": "1"}\n\n{"text": "say \\"so\\"", "id": "2"}\n',
    ".csv": 'text,id\n\n"A é, b",1\n"say ""so""",2\n',
    ".tsv": 'text\tid\nA é, b\t1\nsay "so"\t2\n',
}


def written(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def count_rows(path: Path, *options: Any, **more: Any) -> int:
    return sum(1 for _ in checked_rows(path, *options, **more))


def faults_of(path: Path, fields: dict[str, str] | None = None) -> tuple[list[Row], str]:
    faults = Faults(path)
    rows = list(read_rows(path, fields, faults=faults))
    with pytest.raises(DataError) as caught:
        faults.check()
    return rows, caught.value.found.replace(f"{path}:", "")


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("ends", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\N{BYTE ORDER MARK}"])
def test_all_formats_say_the_same(tmp_path: Path, suffix: str, ends: str, mark: str) -> None:
    path = written(tmp_path, f"table{suffix}", mark + FORMATS[suffix].replace("\n", ends))
    rows = list(read_rows(path))
    assert [row.values for row in rows] == [
        {"text": "A é, b", "id": "1"},
        {"text": 'say "so"', "id": "2"},
    ]
    asked = list(read_rows(path, {"review": "text"}))
    assert [row.values for row in asked] == [{"review": "A é, b"}, {"review": 'say "so"'}]
    assert [row.columns for row in asked] == [row.values for row in rows]
    assert count_rows(path, {"review": "text"}) == 2


def test_a_text_a_line(tmp_path: Path) -> None:
    path = written(tmp_path, "texts.txt", "one\n\n  two\t2\r\nthree")
    assert [(row.line, row.values) for row in read_rows(path, {"t": "text"})] == [
        (1, {"t": "one"}),
        (3, {"t": "  two\t2"}),
        (4, {"t": "three"}),
    ]


def test_columns_by_number_need_no_names(tmp_path: Path) -> None:
    for path in (written(tmp_path, "a.tsv", "x\ty\n"), written(tmp_path, "a.csv", "x,y\n")):
        assert list(read_rows(path, {"t": "2"})) == [Row(1, {"t": "y"}, {"1": "x", "2": "y"})]


def test_a_quoted_cell_may_have_lines_and_be_long(tmp_path: Path) -> None:
    text = "a line\n" * 50_000
    path = written(tmp_path, "a.csv", f'text\n"{text}"\nx\n')
    first, second = read_rows(path)
    assert (first.line, first.values["text"]) == (2, text)
    assert second.line == 50_003


def test_json_may_hold_lists(tmp_path: Path) -> None:
    path = written(tmp_path, "a.jsonl", '{"answers": ["x", "y"], "n": 1}')
    (row,) = read_rows(path)
    assert row.values == {"answers": ["x", "y"], "n": 1}
    assert no_texts(row) == 'answers is ["x", "y"], wanted text, n is 1, wanted text'


def test_every_fault_is_told_with_its_line_and_the_rest_is_read(tmp_path: Path) -> None:
    path = written(tmp_path, "a.csv", b'a,b\n1,2\n3\n4,"x"y\n5,\xff\n6,"two\nlines"\n7,8,9\n')
    rows, found = faults_of(path)
    assert [row.line for row in rows] == [2, 6]
    assert found == (
        "3: 1 cells, wanted 2; 4: no CSV: ',' expected after '\"'; "
        "5: no UTF-8 text: invalid start byte at byte 3; 8: 3 cells, wanted 2"
    )
    deep = '{"a": ' + "[" * 100_000
    lines = ('{"a": 1}', "[1]", '{"a": NaN}', '{"a"', '{"a": "\\ud800"}', '{"b": 2}', deep)
    lines += ('{"a": -1e999}',)
    rows, found = faults_of(written(tmp_path, "a.jsonl", "\n".join(lines)), {"a": "a"})
    assert [row.line for row in rows] == [1]
    assert [part.partition(":")[0] for part in found.split("; ")] == list("2345678")
    assert "6: no 'a' in b" in found
    _, found = faults_of(written(tmp_path, "a.tsv", "a\tb\n1\t2\t3\n"))
    assert found == "2: 3 cells, wanted 2"
    _, found = faults_of(written(tmp_path, "a.txt", b"x\n\xe9t\xe9\n"))
    assert found.startswith("2: no UTF-8 text")


def test_a_wrong_line_of_names_is_told_once(tmp_path: Path) -> None:
    path = written(tmp_path, "a.tsv", "a\tb\n1\t2\n3\t4\n")
    assert faults_of(path, {"x": "c", "y": "d", "z": "a"}) == ([], "1: no 'c', 'd' in a, b")
    twice = written(tmp_path, "twice.csv", "a,b,a\n1,2,3\n")
    assert faults_of(twice) == ([], "1: two columns named 'a'")
    broken = written(tmp_path, "broken.csv", b"a,\xff\n1,2\n3,4\n")
    assert faults_of(broken)[0] == []


def test_twenty_faults_are_shown_and_the_others_counted(tmp_path: Path) -> None:
    path = written(tmp_path, "a.jsonl", "?\n" * 25)
    with pytest.raises(DataError) as caught:
        count_rows(path)
    assert caught.value.found.count("no JSON") == 20
    assert caught.value.found.endswith("; and 5 more")


def test_what_a_caller_finds_is_told_beside_it(tmp_path: Path) -> None:
    path = written(tmp_path, "a.jsonl", '{"text": "x"}\n?\n{"text": 3}\n')
    with pytest.raises(DataError, match=r"a.jsonl:2: .*a.jsonl:3: text is 3, wanted text"):
        count_rows(path, {"text": "text"}, wrong=no_texts)


def test_without_a_list_of_faults_the_first_is_raised(tmp_path: Path) -> None:
    rows = read_rows(written(tmp_path, "a.jsonl", '{"a": 1}\n?\n?\n'))
    assert next(rows).values == {"a": 1}
    with pytest.raises(DataError, match=r"a.jsonl:2: no JSON"):
        next(rows)


def test_what_is_no_table_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"ends in \.jsonl, \.csv, \.tsv, \.txt"):
        count_rows(written(tmp_path, "a.parquet", "x"))
    with pytest.raises(DataError, match="No such file"):
        count_rows(tmp_path / "none.csv")
    for name in ("a.csv", "a.tsv", "a.txt", "a.jsonl"):
        with pytest.raises(DataError, match="a row or more"):
            count_rows(written(tmp_path, name, "\n"))
    with pytest.raises(DataError, match="a row or more"):
        count_rows(written(tmp_path, "names.csv", "a,b\n"))


def test_a_line_without_an_end_is_not_read_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gptrt.tables._LONGEST_LINE", 1000)
    path = written(tmp_path, "a.txt", "ok\n" + "x" * 5000 + "\nok\n" + "y" * 1001)
    rows, found = faults_of(path)
    assert [row.line for row in rows] == [1, 3]
    assert found == "2: a line of more than 1000 bytes; 4: a line of more than 1000 bytes"


def test_never_more_than_a_row_is_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with path.open("w") as stream:
        for number in range(20_000):
            stream.write(json.dumps({"text": "x" * 200, "id": number}) + "\n")
    tracemalloc.start()
    assert count_rows(path) == 20_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 500_000
