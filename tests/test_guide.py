"""What the guide says works: every snippet runs, and prints what the page shows."""

from __future__ import annotations

import importlib.util
import io
import re
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest

GUIDE = Path(__file__).parents[1] / "docs" / "guide"
INDEX = GUIDE / "README.md"
PAGES = sorted(page for page in GUIDE.glob("*.md") if page != INDEX)

_BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_SHOWN = re.compile(r"print\(.*\)  # -> (.*)$")
_LINK = re.compile(r"\]\(([^)\s]+)\)")


class Page:
    """The Python of a page. Line numbers are those of the page, in tracebacks too."""

    def __init__(self, path: Path) -> None:
        self.path, self.text = path, path.read_text(encoding="utf-8")
        self.printed: dict[int, list[str]] = {}

    def blocks(self) -> Iterator[str]:
        for match in _BLOCK.finditer(self.text):
            yield "\n" * self.text[: match.start(1)].count("\n") + match[1]

    def shown(self) -> dict[int, str]:
        """What lines of snippets say that they print."""
        lines = (pair for block in self.blocks() for pair in enumerate(block.splitlines(), 1))
        return {number: found[1] for number, line in lines if (found := _SHOWN.search(line))}

    def run(self) -> None:
        """All blocks, one after the other, in one namespace."""
        namespace: dict[str, Any] = {"__name__": "__main__", "print": self._print}
        for block in self.blocks():
            exec(compile(block, str(self.path), "exec"), namespace)

    def _print(self, *values: object, **how: Any) -> None:
        target = io.StringIO()
        print(*values, file=target, **how)
        line = sys._getframe(1).f_lineno
        self.printed.setdefault(line, []).append(target.getvalue().strip())


def checked(page: Page) -> None:
    page.run()
    shown = page.shown()
    assert {line: page.printed.get(line) for line in shown} == {n: [t] for n, t in shown.items()}


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> NoReturn:
        raise AssertionError("the guide needs no network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_the_snippets_of_a_page_run_and_print_what_it_shows(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = Page(path)
    if "constraint=" in page.text and importlib.util.find_spec("llguidance") is None:
        pytest.skip("llguidance, of gptrt[structured], is not installed")
    monkeypatch.chdir(tmp_path)
    assert page.shown(), "a page without anything to check"
    checked(page)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_every_arrow_in_a_page_is_compared(path: Path) -> None:
    page = Page(path)
    assert sum(block.count("# ->") for block in page.blocks()) == len(page.shown())


def test_a_snippet_that_prints_something_else_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "page.md"
    head = "# Page\n\n```python\nfor n in range(1):\n"
    for line, right in (
        ("print(n + 1)  # -> 1", True),
        ("print(n + 1)  # -> 2", False),
        ("pass\nif False:\n    print(n)  # -> 0", False),
        ("print(n); print(n)  # -> 0", False),
    ):
        path.write_text(f"{head}    {line}\n```\n", encoding="utf-8")
        if right:
            checked(Page(path))
        else:
            with pytest.raises(AssertionError):
                checked(Page(path))


def test_the_index_names_every_page_once_and_in_one_list() -> None:
    listed = re.findall(r"^\d+\. \[[^]]+\]\(([^)]+)\)", INDEX.read_text("utf-8"), re.MULTILINE)
    assert sorted(listed) == [page.name for page in PAGES]


@pytest.mark.parametrize("path", [INDEX, *PAGES], ids=lambda path: path.stem)
def test_every_link_leads_somewhere(path: Path) -> None:
    for link in _LINK.findall(path.read_text(encoding="utf-8")):
        if "://" not in link:
            assert (path.parent / link.partition("#")[0]).is_file(), link


@pytest.mark.parametrize("path", [INDEX, *PAGES], ids=lambda path: path.stem)
def test_a_page_is_short_and_begins_with_what_you_get(path: Path) -> None:
    title, blank, first, *others = path.read_text(encoding="utf-8").splitlines()
    assert title.startswith("# ") and blank == ""
    assert first.startswith("You get ") or path == INDEX
    assert len(others) < 72
    assert max(map(len, (first, *others))) <= 110
