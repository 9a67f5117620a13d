"""Examples of a task: prompts with their answers, on disk, and packed into rows to train on.

A row holds as many whole examples as fit, each of which sees itself alone: attention stays within a
segment, and positions begin anew. The answer is what is learnt; a prompt counts as much as is asked
for.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer as Inner

from gptrt.errors import CheckpointError, DataError
from gptrt.tables import TEXT
from gptrt.task import Task, answer_text
from gptrt.tokenizer import Tokenizer

from .data import TRAIN_IDS, VALID_IDS, Batch, open_ids, save_ids
from .loss import IGNORED
from .tokenization import SpecialIds

ANSWER = "answer"  # the column of right answers in tables of ours
TRAIN_TABLE, VALID_TABLE, TEST_TABLE = "train.jsonl", "valid.jsonl", "test.jsonl"
_OPEN_ROWS = 16  # that an example may still go into
_PAD = 0  # an id that nothing looks at


@dataclass(frozen=True)
class Example:
    """What a user gives, by field, and right answers: at least one, the first the best."""

    fields: Mapping[str, str]
    answers: tuple[str, ...]


@dataclass(frozen=True)
class ExamplePlan:
    """The data of a run that learns a task, split, with where they come from.

    `class_weights` say how much each of the task's labels counts; all alike, if there are none.
    """

    task: Task
    train: Sequence[Example]
    valid: Sequence[Example]
    test: Sequence[Example]
    sources: Sequence[Path]
    class_weights: tuple[float, ...] = ()

    def write(
        self, folder: Path, tokenizer: Inner, special: SpecialIds, length: int
    ) -> tuple[int, int]:
        """Ids to train on and to validate by, and all three parts as tables. Returns the numbers
        of ids (train, valid). Raises DataError, and CheckpointError for a tokenizer that has
        nothing to end an answer with."""
        if special.end is None:
            raise CheckpointError(
                "a tokenizer with an end-of-text token, which ends answers",
                found="none",
                do="add one, and name it as eos_token_id in config.json",
            )
        counts = []
        parts = (self.train, self.valid, self.test)
        for name, examples in zip((TRAIN_TABLE, VALID_TABLE, TEST_TABLE), parts, strict=True):
            write_table(folder / name, examples)
        words = Tokenizer(tokenizer)
        for name, examples in ((TRAIN_IDS, self.train), (VALID_IDS, self.valid)):
            written = write_examples(
                folder / name, examples, self.task, words=words, end=special.end, length=length
            )
            counts.append(written)
        return counts[0], counts[1]


def longest_answer(examples: Sequence[Example], tokenizer: Inner) -> int:
    """In ids, its end included."""
    words = Tokenizer(tokenizer)
    answers = (answer_text(answer) for example in examples for answer in example.answers)
    return 1 + max(len(words.encode(answer, whole=False)) for answer in answers)


def count_rows(plan: ExamplePlan, tokenizer: Inner, length: int) -> int:
    """How many rows of `length` ids an epoch takes, about. Raises DataError as `write_examples`."""
    words, end = Tokenizer(tokenizer), _PAD  # which id ends an answer makes no difference
    pieces = _pieces(plan.train, plan.task, words=words, end=end, length=length)
    lengths = [len(prompt) + len(answer) - 1 for prompt, answer, _ in pieces]
    return len(_packed(range(len(lengths)), lengths, length))


def write_table(target: Path, examples: Sequence[Example]) -> None:
    """JSON lines: the fields by their names, and `answer`, a list where several are right; `text`,
    where there are no fields."""
    with target.open("w", encoding="utf-8") as stream:
        for example in examples:
            answers = list(example.answers)
            name = ANSWER if example.fields else TEXT
            row = {**example.fields, name: answers if len(answers) > 1 else answers[0]}
            stream.write(json.dumps(row, ensure_ascii=False) + "\n")


def write_examples(
    target: Path,
    examples: Sequence[Example],
    task: Task,
    *,
    words: Tokenizer,
    end: int,
    length: int,
) -> int:
    """Write ids of prompts and answers, each closed by `end`, in at most `length` + 1, and where
    they begin; every right answer is an example. Returns the number of ids. Raises DataError for
    answers that leave no room for a prompt.
    """
    ids: list[int] = []
    table: list[tuple[int, int, int]] = []  # begin, begin of the answer, number of its label
    for prompt, answer, label in _pieces(examples, task, words=words, end=end, length=length):
        table.append((len(ids), len(ids) + len(prompt), label))
        ids += [*prompt, *answer]
    np.save(_table_of(target), np.array(table, np.int64))
    save_ids(np.array(ids, np.int64), target)
    return len(ids)


def _pieces(
    examples: Sequence[Example], task: Task, *, words: Tokenizer, end: int, length: int
) -> Iterator[tuple[list[int], list[int], int]]:
    """Prompt, answer and number of its label, for all that `write_examples` writes."""
    faults, count = [], 0
    for number, example in enumerate(examples, start=1):
        for text in example.answers:
            if not task.prompt:  # nothing but text, of any length
                whole = [*words.encode(text), end]
                for at in range(0, len(whole) - 1, length):
                    yield [], whole[at : at + length + 1], 0
                    count += 1
                continue
            answer = [*words.encode(answer_text(text), whole=False), end]
            if len(answer) > length:
                faults.append(f"example {number} has an answer of {len(answer)} tokens")
                continue
            prompt = task.prompt_ids(example.fields, words.encode, length + 1 - len(answer))
            yield prompt, answer, task.labels.index(text) if task.labels else 0
            count += 1
    if faults or not count:
        raise DataError(
            f"answers of at most {length} tokens",
            found="; ".join(faults[:20]) or "no examples",
            do="shorten them, leave them out, or raise seq_len up to the context",
        )


def has_examples(path: Path) -> bool:
    """Whether `write_examples` wrote this file of ids."""
    return _table_of(path).is_file()


def _table_of(path: Path) -> Path:
    return path.with_suffix(".examples.npy")


@dataclass(frozen=True)
class Examples:
    """Examples of a file, to be drawn from: each once an epoch, in rows of at most `length` ids.

    A batch is a function of (seed, step) alone. `prompt_share` is the weight of the mean loss of
    prompts beside that of answers; `class_weights` those of labels among each other.
    """

    ids: NDArray[np.uint32]
    table: NDArray[np.int64]  # [examples, 3]
    length: int
    seed: int
    prompt_share: float = 0.0
    class_weights: tuple[float, ...] = ()
    _epochs: dict[int, list[list[int]]] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def open(
        cls,
        path: Path,
        length: int = sys.maxsize,
        seed: int = 0,
        *,
        prompt_share: float = 0.0,
        class_weights: tuple[float, ...] = (),
    ) -> Examples:
        """Those that `write_examples` wrote. Raises DataError."""
        if not has_examples(path):
            raise DataError(f"examples in {path}", found="none", do="give --data again")
        table = np.load(_table_of(path), allow_pickle=False)
        return cls(open_ids(path), table, length, seed, prompt_share, class_weights)

    def __len__(self) -> int:
        return len(self.table)

    def batches(self, step: int, size: int, count: int) -> Iterator[Batch]:
        """A step, counted from 0, as `count` batches of `size` rows: the mean of their losses is
        the loss of all these rows."""
        begin = step * size * count
        rows = [self._row(n) for n in range(begin, begin + size * count)]
        answers, prompts = self._totals(rows)
        for first in range(0, len(rows), size):
            yield self._batch(rows[first : first + size], (answers / count, prompts / count))

    def in_order(self, size: int, tokens: int = sys.maxsize) -> Iterator[Batch]:
        """Up to `size` rows at a time: every example once, or from all over so many full batches
        as have `tokens` of answers."""
        rows = _packed(range(len(self)), self.lengths, self.length)
        answers = sum(self.lengths) - sum(self.prompts)
        count = min(len(rows), size * -(-tokens * len(rows) // (answers * size)))
        chosen = [rows[n * len(rows) // count] for n in range(count)]
        for first in range(0, count, size):
            yield self._batch(chosen[first : first + size])

    def one_by_one(self, tokens: int, size: int) -> Iterator[Batch]:
        """Examples from all over the file that take about `tokens` inputs, or all of them: up to
        `size` at a time, each in a row of its own."""
        count = max(1, min(len(self), tokens * len(self) // sum(self.lengths)))
        chosen = (n * len(self) // count for n in range(count))
        rows = [[n] for n in sorted(chosen, key=lambda n: self.lengths[n])]
        for first in range(0, count, size):
            yield self._batch(rows[first : first + size])

    def rows_per_epoch(self) -> int:
        """About; it depends on the order."""
        return len(self._rows(0))

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """Inputs that each example takes: one less than its ids."""
        ends = [*self.table[1:, 0].tolist(), len(self.ids)]
        begins = self.table[:, 0].tolist()
        return tuple(end - begin - 1 for begin, end in zip(begins, ends, strict=True))

    @cached_property
    def prompts(self) -> tuple[int, ...]:
        """Of these, those whose next id is of the prompt."""
        return tuple(np.maximum(0, self.table[:, 1] - self.table[:, 0] - 1).tolist())

    def _row(self, number: int) -> list[int]:
        epoch = 0
        while number >= len(rows := self._rows(epoch)):
            number -= len(rows)
            epoch += 1
        return rows[number]

    def _rows(self, epoch: int) -> list[list[int]]:
        """Those of an epoch, each the numbers of its examples."""
        if epoch not in self._epochs:
            order = np.random.default_rng([self.seed, epoch]).permutation(len(self))
            self._epochs[epoch] = _packed(order.tolist(), self.lengths, self.length)
        return self._epochs[epoch]

    def _batch(
        self, rows: Sequence[Sequence[int]], totals: tuple[float, float] | None = None
    ) -> Batch:
        """Answers weigh 1 together and prompts `prompt_share`, where `totals` are their own."""
        answers, prompts = totals or self._totals(rows)
        width = max(sum(self.lengths[n] for n in row) for row in rows)
        shape = (len(rows), width)
        inputs, targets = np.full(shape, _PAD, np.int64), np.full(shape, IGNORED, np.int64)
        segments, positions = np.full(shape, -1, np.int64), np.zeros(shape, np.int64)
        shares = np.zeros(shape, np.float32)
        for r, row in enumerate(rows):
            at = 0
            for segment, n in enumerate(row):
                begin, _, label = self.table[n].tolist()
                size, prompt = self.lengths[n], self.prompts[n]
                own = slice(at, at + size)
                text = self.ids[begin : begin + size + 1].astype(np.int64)
                inputs[r, own], targets[r, own] = text[:-1], text[1:]
                segments[r, own], positions[r, own] = segment, np.arange(size)
                if prompt:
                    shares[r, at : at + prompt] = self.prompt_share / prompts
                shares[r, at + prompt : at + size] = self._weight(label) / answers
                at += size
        targets[shares == 0] = IGNORED
        return Batch(inputs, targets, shares, segments, positions)

    def _totals(self, rows: Sequence[Sequence[int]]) -> tuple[float, float]:
        """The weights of all ids of answers, and the number of those of prompts."""
        numbers = [n for row in rows for n in row]
        answers = sum(
            (self.lengths[n] - self.prompts[n]) * self._weight(int(self.table[n, 2]))
            for n in numbers
        )
        return answers, float(sum(self.prompts[n] for n in numbers))

    def _weight(self, label: int) -> float:
        return self.class_weights[label] if self.class_weights else 1.0


def _packed(order: Sequence[int], lengths: Sequence[int], length: int) -> list[list[int]]:
    """Each example goes into the fullest of the last few rows that has room for it (best fit)."""
    rows: list[list[int]] = []
    room: list[int] = []
    for n in order:
        recent = range(max(0, len(rows) - _OPEN_ROWS), len(rows))
        fitting = [r for r in recent if room[r] >= lengths[n]]
        if fitting:
            best = min(fitting, key=lambda r: room[r])
            rows[best].append(n)
            room[best] -= lengths[n]
        else:
            rows.append([n])
            room.append(length - lengths[n])
    return rows
