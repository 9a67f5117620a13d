"""Clean public-domain books into the corpus of the `tales` preset: flowing paragraphs only.

    python models/tales_corpus.py BOOKS OUT

BOOKS holds plain-text books and `valid.list`, the names (without .txt) of those kept for
validation. OUT/train and OUT/valid receive one file a book, one paragraph a line: hard-wrapped
lines are joined, _italics_ lose their marks, and headings, contents pages, verse and captions,
which teach a story model nothing about stories, are left out.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

_SENTENCE_END = re.compile(r"[.!?:;,)\]\-—–…\"'”’]$")


def paragraphs(text: str) -> list[str]:
    """The prose of a book.

    >>> paragraphs("CHAPTER I\\n\\nOnce upon\\na _time_.\\n\\n      verse\\n      verse.\\n")
    ['Once upon a time.']
    """
    blocks = re.split(r"\n\s*\n", text.replace("\r\n", "\n"))
    return [joined for block in blocks if _is_prose(block) and (joined := _join(block))]


def _is_prose(block: str) -> bool:
    lines = [line for line in block.splitlines() if line.strip()]
    indented = sum(line.startswith("   ") for line in lines)
    text = block.strip()
    return (
        bool(lines)
        and indented * 2 < len(lines) + (len(lines) == 1)
        and not text.startswith(("[", "*", "|", "+"))
        and not text.isupper()
        and bool(_SENTENCE_END.search(text))
    )


def _join(block: str) -> str:
    text = re.sub(r"\[(?:Illustration|Footnote)[^\]]*\]|_", "", block)
    return " ".join(text.split())


def main(books: Path, out: Path) -> None:
    valid = set((books / "valid.list").read_text().split())
    for split in ("train", "valid"):
        (out / split).mkdir(parents=True, exist_ok=True)
    for path in sorted(books.glob("*.txt")):
        split = "valid" if path.stem in valid else "train"
        prose = paragraphs(path.read_text(encoding="utf-8"))
        (out / split / path.name).write_text("\n".join(prose) + "\n", encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python models/tales_corpus.py BOOKS OUT")
    main(Path(sys.argv[1]), Path(sys.argv[2]))
