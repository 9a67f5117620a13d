"""Tables of examples, as users have them: what is asked and answered in each row, and which rows
are for training, for validation and for tests.

Splits go by a hash of the prompt, so that the same one never stands on two sides, and label by
label, so that all parts have the same mix.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from gptrt.errors import DataError, OptionError
from gptrt.tables import TEXT, Faults, Row, read_rows
from gptrt.task import Kind, Task

from .examples import ANSWER, Example

# The prompt of a task if none is given.
PROMPTS: dict[Kind, str] = {
    "lm": "",
    "classification": "{text}\n\nLabel:",
    "translation": "{text}\n\nTranslation:",
    "summarization": "{text}\n\nSummary:",
}
_SHARE = 0.1  # of the examples, to validate by, and to test on


@dataclass(frozen=True)
class Tables:
    """Where examples are. `data` is split, but for the parts that have tables of their own.

    `columns` names the column of a field of the prompt, or of the answer, where it is another.
    `labels` are names for what stands in the answer's column: {"1": "positive"}. A share is a tenth
    where none is given.
    """

    data: Sequence[Path]
    valid: Sequence[Path] = ()
    test: Sequence[Path] = ()
    columns: Mapping[str, str] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)
    valid_share: float | None = None
    test_share: float | None = None

    def shares(self) -> tuple[float, float]:
        """Of `data`, to validate by and to test on; none of it where a part has tables of its own.
        Raises OptionError where it has both."""
        return (
            _share("valid", self.valid, self.valid_share),
            _share("test", self.test, self.test_share),
        )


def _share(part: str, own: Sequence[Path], share: float | None) -> float:
    if own and share is not None:
        raise OptionError(f"--{part} or --{part}-share", found="both", do="leave one of them out")
    return 0.0 if own else _SHARE if share is None else share


def asked_task(kind: Kind, prompt: str | None, tables: Tables) -> Task:
    """The task that the examples of `tables.data` are of, for a model that was not taught one.
    Raises OptionError, DataError."""
    task = task_of(kind, prompt)
    return with_labels(task, read_examples(tables.data, task, tables))


def task_of(kind: Kind, prompt: str | None) -> Task:
    """A task without its labels, which come with the examples. Raises OptionError for a prompt that
    is no template."""
    text = PROMPTS[kind] if prompt is None else prompt
    task = Task(kind, text)
    faults = replace(task, labels=("a", "b") if kind == "classification" else ()).faults()
    if faults:
        raise OptionError(
            'a --prompt like "{text} Summary:"', found="; ".join(faults), do="correct it"
        )
    return task


def with_labels(task: Task, examples: Sequence[Example]) -> Task:
    """In alphabetical order. Raises DataError for fewer than two."""
    if task.kind != "classification":
        return task
    labels = tuple(sorted({example.answers[0] for example in examples}))
    if len(labels) < 2:
        raise DataError(
            "two labels or more in the answers", found=", ".join(labels) or "none", do="check them"
        )
    return replace(task, labels=labels)


# --- tables to examples -------------------------------------------------------------------------


def read_examples(paths: Sequence[Path], task: Task, tables: Tables) -> list[Example]:
    """All examples of some tables, every fault of a table listed. Raises DataError."""
    if tables.labels and task.kind != "classification":
        raise OptionError("--label for a classification", found=task.kind, do="leave it out")
    names = {name: tables.columns.get(name, name) for name in (*task.fields, ANSWER)}
    if not task.fields and ANSWER not in tables.columns:
        names[ANSWER] = TEXT
    if unknown := set(tables.columns) - set(names):
        raise OptionError(
            f"--column for {', '.join(names)}", found=", ".join(sorted(unknown)), do="correct it"
        )
    examples = []
    for path in paths:
        faults = Faults(path)
        for row in read_rows(path, names, faults=faults):
            try:
                examples.append(_example(row, task, tables.labels))
            except ValueError as e:
                faults.add(row.line, str(e))
        faults.check()
    return examples


def _example(row: Row, task: Task, labels: Mapping[str, str]) -> Example:
    """A list is one text in a prompt, and several right answers as an answer. Raises ValueError."""
    fields = {name: " ".join(_texts(row.values[name], name)) for name in task.fields}
    answers = tuple(text.strip() for text in _texts(row.values[ANSWER], ANSWER))
    empty = [name for name, text in fields.items() if not text.strip()]
    if empty or not answers or not all(answers):
        raise ValueError(f"{empty[0] if empty else ANSWER} is empty")
    if task.kind == "classification":
        if len(answers) > 1:
            raise ValueError("several labels")
        if labels and answers[0] not in labels:
            raise ValueError(f"label {answers[0]!r} is none of {', '.join(labels)}")
        answers = (labels.get(answers[0], answers[0]),)
    return Example(fields, answers)


def _texts(value: Any, name: str) -> list[str]:
    values = value if isinstance(value, list) else [value]
    texts = [str(v) if isinstance(v, bool | int | float) else v for v in values]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{name} is {str(value)[:40]}, wanted text or a list of texts")
    return texts


# --- splits and weights -------------------------------------------------------------------------


def split(examples: Sequence[Example], share: float) -> tuple[list[Example], list[Example]]:
    """A share of the examples, and the rest, in their order: in each group of one answer, or among
    all if hardly two have the same, those whose prompts have the lowest hashes."""
    answers = Counter(example.answers[0] for example in examples)
    stratified = len(answers) <= len(examples) // 10
    groups: dict[str, list[int]] = defaultdict(list)
    for example in examples:
        groups[example.answers[0] if stratified else ""].append(_hash(example))
    bounds = {
        answer: sorted(hashes)[count - 1] if (count := round(share * len(hashes))) else -1
        for answer, hashes in groups.items()
    }
    taken = [_hash(e) <= bounds[e.answers[0] if stratified else ""] for e in examples]
    first = [example for example, inside in zip(examples, taken, strict=True) if inside]
    rest = [example for example, inside in zip(examples, taken, strict=True) if not inside]
    seen = {_hash(example) for example in first}  # the same prompt with another answer
    return first, [example for example in rest if _hash(example) not in seen]


def _hash(example: Example) -> int:
    text = "\0".join(example.fields.values()) or example.answers[0]
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def balanced_weights(task: Task, examples: Sequence[Example]) -> tuple[float, ...]:
    """So that every label weighs alike: n / (labels * n of the label), as scikit-learn's
    `compute_class_weight` has it."""
    counts = Counter(example.answers[0] for example in examples)
    if not task.labels:
        raise OptionError(
            "--class-weights for a classification", found=task.kind, do="leave it out"
        )
    return tuple(len(examples) / (len(task.labels) * max(1, counts[k])) for k in task.labels)
