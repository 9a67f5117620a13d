"""A task as data: how a prompt is written around what a user gives, and what may answer it.

Training writes its examples with the same functions with which the runtime writes its prompts, so a
model meets in an application what it was taught on. Standard library only.
"""

from __future__ import annotations

import math
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from gptrt.errors import PromptError
from gptrt.schema import bounded

Kind = Literal["lm", "classification", "translation", "summarization"]
Encode = Callable[[str], list[int]]
Text = str | Mapping[str, str]  # of a prompt's only field, or of each by its name


@dataclass(frozen=True)
class Task:
    """What a model was fine-tuned for.

    `prompt` is the text before an answer, with fields in braces: "Review: {text}\\nVerdict:". An
    answer follows after a space and ends with the end of text. Answers have at most
    `max_new_tokens` ids. Of a classification the answer is one of `labels`; `probabilities` says
    what `temperature` and `bias` are for.
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

    def named(self, text: Text) -> dict[str, str]:
        """The fields of a prompt: `text` is the only one, or names them all. Raises PromptError."""
        if isinstance(text, str):
            if len(self.fields) != 1:
                raise PromptError(
                    f"the fields {', '.join(self.fields)}, each by its name",
                    found="one text",
                    do="give a mapping",
                )
            return {self.fields[0]: text}
        if not isinstance(text, Mapping) or not all(isinstance(v, str) for v in text.values()):
            raise PromptError(
                "a text, or a mapping of texts", found=repr(text)[:60], do="convert it first"
            )
        return dict(text)

    def probabilities(self, scores: Sequence[float]) -> list[float]:
        """Of the labels, from their scores: softmax(score / temperature + bias), in their order.

        A score is the sum of log-probabilities, in nats, of the ids that `label_ids` gives. That is
        bias-corrected temperature scaling: https://arxiv.org/abs/1901.06852, 2.2.
        """
        bias = self.bias or (0.0,) * len(scores)
        logits = [s / self.temperature + b for s, b in zip(scores, bias, strict=True)]
        top = max(logits)
        weights = [math.exp(logit - top) for logit in logits]
        total = math.fsum(weights)
        return [weight / total for weight in weights]

    def narrowed(self, labels: Sequence[str]) -> Task:
        """The same with some of its labels."""
        bias = dict(zip(self.labels, self.bias, strict=False))
        kept = tuple(bias[label] for label in labels if label in bias)
        return replace(self, labels=tuple(labels), bias=kept)

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


def label_ids(labels: Sequence[str], encode: Encode, end: int | None) -> list[list[int]]:
    """The ids by whose log-probabilities labels are told apart: those of each as an answer.

    `encode` is that of a part of a text, `end` the id that ends one. The end that follows a label
    in training does not count: after a whole label a fine-tuned model is all but certain of it, and
    without it labels of one id need no pass but the prompt's. Only where one label begins another,
    id by id, the end alone tells them apart: then it counts, for all of them.
    """
    found = [encode(answer_text(label)) for label in labels]
    begins = any(a is not b and a == b[: len(a)] for a in found for b in found if len(a) <= len(b))
    return [[*ids, end] for ids in found] if begins and end is not None else found


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
