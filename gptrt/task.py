"""A task as data: how a prompt is written around what a user gives, and what may answer it.

Training writes its examples with the same functions with which the runtime writes its prompts, so a
model meets in an application what it was taught on. Standard library only.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from gptrt.errors import PromptError
from gptrt.schema import bounded

Kind = Literal["lm", "classification", "translation", "summarization"]
Encode = Callable[[str], list[int]]


@dataclass(frozen=True)
class Task:
    """What a model was fine-tuned for.

    `prompt` is the text before an answer, with fields in braces: "Review: {text}\\nVerdict:". An
    answer follows after a space and ends with the end of text; of a classification it is one of
    `labels`, and the log-probability of each is divided by `temperature` and has its `bias` added
    before they become probabilities (https://arxiv.org/abs/1706.04599). Answers have at most
    `max_new_tokens` ids.
    """

    kind: Kind
    prompt: str
    labels: tuple[str, ...] = ()
    temperature: float = bounded(1e-3, 1e3, default=1.0)
    bias: tuple[float, ...] = ()
    max_new_tokens: int = bounded(1, 1 << 20, default=128)

    @property
    def fields(self) -> tuple[str, ...]:
        """The names in braces, in their order."""
        return tuple(dict.fromkeys(name for _, name in _parts(self.prompt) if name))

    def faults(self) -> list[str]:
        found = []
        try:
            if self.kind != "lm" and not self.fields:
                found.append("prompt has no field in braces")
            if not all(name.isidentifier() for name in self.fields):
                found.append("prompt has a field that is no plain name")
        except ValueError as e:
            found.append(f"prompt is no template: {e}")
        if (self.kind == "classification") != bool(self.labels):
            found.append("labels belong to a classification, and a classification has some")
        if len(set(self.labels)) < len(self.labels) or not all(map(str.strip, self.labels)):
            found.append("labels are not different names")
        if self.bias and len(self.bias) != len(self.labels):
            found.append("bias has not a number for each label")
        return found

    def write(self, fields: Mapping[str, str]) -> str:
        """The prompt around `fields`. Raises PromptError if one is missing or unknown."""
        if fields.keys() != set(self.fields):
            raise PromptError(
                f"the fields {', '.join(self.fields)}",
                found=", ".join(fields) or "none",
                do="give those that the prompt of the task has",
            )
        return "".join(
            literal + (fields[name] if name else "") for literal, name in _parts(self.prompt)
        )

    def prompt_ids(self, fields: Mapping[str, str], encode: Encode, room: int) -> list[int]:
        """The ids of the prompt, at most `room`: if there are more, the longest field loses words
        at its end until they fit, so that what the template says after it stays.

        Raises PromptError if even the template alone does not fit.
        """
        ids = encode(self.write(fields))
        while len(ids) > room:
            longest = max(fields, key=lambda name: len(fields[name]), default="")
            words = fields[longest] if longest else ""
            if not words:
                raise PromptError(
                    f"a prompt of at most {room} tokens",
                    found=f"{len(ids)} without any text",
                    do="shorten the template, or leave less room for the answer",
                )
            fields = {**fields, longest: _cut(words, len(words) * room // len(ids))}
            ids = encode(self.write(fields))
        return ids


def answer_text(answer: str) -> str:
    """An answer as it follows a prompt."""
    return f" {answer.strip()}"


def _parts(template: str) -> list[tuple[str, str]]:
    """Literal texts, each with the field after it ("" after the last). Raises ValueError."""
    found = []
    for literal, name, spec, conversion in string.Formatter().parse(template):
        if spec or conversion:
            raise ValueError("a field is a name in braces, without more")
        if name == "":
            raise ValueError("a field needs a name in its braces")
        found.append((literal, name or ""))
    return found


def _cut(text: str, length: int) -> str:
    """At most so many characters, to the end of a word where there is one."""
    kept = text[: min(length, len(text) - 1)]
    return kept.rpartition(" ")[0] or kept if not text[len(kept) :].startswith(" ") else kept
