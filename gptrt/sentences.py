"""A text in sentences, by marks alone. Standard library only."""

from __future__ import annotations

import re

# After these a sentence goes on. "etc." is not one of them: it ends most that it stands in.
_ABBREVIATED = (
    "al approx capt cf chap co corp dept dr ed eds eq eqs fig figs gen gov inc jr ltd mr mrs"
)
_ABBREVIATED += " ms nr op pp prof rev sen sgt sr st univ viz vol vols vs"
_ABBREVIATIONS = frozenset(_ABBREVIATED.split())
_BEFORE_NUMBERS = frozenset(("art", "ch", "no", "nos", "p", "§"))
_INITIALS = re.compile(r"(?:[^\W\d_]\.)*[^\W\d_]")  # "J", "e.g", "U.S": their last point is off

# Each run of marks is looked at once, from its beginning: time grows with the text and no faster.
_END = re.compile(r"""(?<![.!?…])[.!?…]++["'”’»)\]]*+\s+|[。！？]++[”’」』）]*+\s*""")
_LONGEST_WORD = 40  # characters, of which an abbreviation may be
_OPENING = "\"'“‘«„([¿¡「『（"


def sentences(text: str) -> list[str]:
    """The sentences of a text, in its order, white space in each as single spaces.

    One ends at a line's end, unless the next line goes on in lower case, and after ".", "!" or "?"
    before a space and a capital letter, a digit or a quote; not after an abbreviation or initials.

    >>> sentences('See Fig. 2, e.g. by J. Smith. "Is it so?" It is! 3 of 4 agree.')
    ['See Fig. 2, e.g. by J. Smith.', '"Is it so?"', 'It is!', '3 of 4 agree.']
    """
    found = []
    for part in _parts(text):
        begin = 0
        for match in _END.finditer(part):
            if _ends(part, match):
                found.append(part[begin : match.end()])
                begin = match.end()
        found.append(part[begin:])
    joined = (" ".join(sentence.split()) for sentence in found)
    return [sentence for sentence in joined if sentence]


def _parts(text: str) -> list[str]:
    """The lines, each with those that go on with it."""
    found: list[list[str]] = [[]]
    for line in text.splitlines():
        if not line.lstrip()[:1].islower():
            found.append([])
        found[-1].append(line)
    return ["\n".join(lines) for lines in found]


def _ends(part: str, match: re.Match[str]) -> bool:
    """Whether a sentence ends with what was matched."""
    following = part[match.end() : match.end() + 1]
    if not (following.isdigit() or following in _OPENING or _begins_word(following)):
        return False
    if match[0].rstrip() != ".":
        return True
    before = part[max(0, match.start() - _LONGEST_WORD) : match.start()].split()
    word = before[-1].lstrip(_OPENING) if before else ""
    if _INITIALS.fullmatch(word) or word.lower() in _ABBREVIATIONS:
        return False
    return not (following.isdigit() and word.lower() in _BEFORE_NUMBERS)


def _begins_word(character: str) -> bool:
    return character.isalpha() and not character.islower()
