"""From tables of examples to the plan of a run that learns a task: all of it is checked before
anything is trained.

Splits go by a hash of the prompt, so that the same one never stands on two sides, and label by
label, so that all parts have the same mix.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from gptrt.architecture import ModelConfig
from gptrt.errors import CheckpointError, DataError, OptionError
from gptrt.generator import Generator
from gptrt.tables import TEXT, Faults, Row, read_rows
from gptrt.task import Kind, Task

from .checkpoint import TASK_FILE, load_checkpoint, resolve_checkpoint
from .evaluate import check, evaluate, spread
from .examples import (
    ANSWER,
    VALID_TABLE,
    Example,
    ExamplePlan,
    count_rows,
    longest_answer,
)
from .files import replace_json
from .lora import LoraConfig
from .model import GPT
from .new_run import RunPlan
from .runs import DATA_FOLDER, Run
from .settings import OptimizerConfig, TrainConfig
from .start import (
    check_compiler,
    check_context,
    choose_device,
    load_checkpoint_or_bundle,
    with_settings,
)
from .tokenization import TokenizerConfig
from .torch_decoder import TorchDecoder, open_checkpoint_generator, tokenizer_of
from .trainer import Metric

# The prompt of a task if none is given.
PROMPTS: dict[Kind, str] = {
    "lm": "",
    "classification": "{text}\n\nLabel:",
    "translation": "{text}\n\nTranslation:",
    "summarization": "{text}\n\nSummary:",
}
_EPOCHS = 4
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


def plan_finetuning(
    kind: Kind,
    checkpoint: Path,
    tables: Tables,
    *,
    prompt: str | None = None,
    lora: LoraConfig | None = None,
    class_weights: Literal["none", "balanced"] = "none",
    epochs: float | None = None,
    device: str = "auto",
    settings: Mapping[str, str] | None = None,
) -> RunPlan:
    """The run ends after `epochs` or the `max_steps` of the settings, whichever come first; after 4
    epochs where neither is given. Raises a GptrtError for a checkpoint, table, template or setting
    that is not right."""
    if epochs is not None and not math.isfinite(epochs):
        raise OptionError("a number of --epochs", found=f"{epochs}", do="correct it")
    valid_share, test_share = tables.shares()
    start = load_checkpoint_or_bundle(checkpoint)
    if start.rounding is not None:
        raise CheckpointError(
            "a model that was not trained for its rounding",
            found="one that was",
            do="fine-tune what it was made from, and round after that",
        )
    task = _template(kind, prompt)
    train, valid, test = (
        read_examples(paths, task, tables) for paths in (tables.data, tables.valid, tables.test)
    )
    task = _with_labels(task, train)
    if not tables.test:
        test, train = split(train, test_share)
    if not tables.valid:  # so many that they are that share of all
        valid, train = split(train, valid_share / (1.0 - test_share))
    for name, part in (("train on", train), ("validate by", valid)):
        if not part:
            raise DataError(f"examples to {name}", found="none", do="give more, or other shares")
    check(task, [*valid, *test])
    if start.tokenizer is None:
        raise CheckpointError("a tokenizer.json beside the weights", found="none", do="add it")
    longest = min(longest_answer(train, start.tokenizer), start.config.n_positions // 2)
    task = replace(task, max_new_tokens=longest)
    weights = balanced_weights(task, train) if class_weights == "balanced" else ()
    examples = ExamplePlan(task, train, valid, test, list(tables.data), weights)
    config = with_settings(task_training(start.config, lora), dict(settings or {}))
    check_context(config, start.config)
    if config.prompt_share and not task.prompt:
        raise OptionError(
            "--prompt, whose loss prompt_share weighs", found="none", do="leave prompt_share out"
        )
    ends = [config.max_steps] if "max_steps" in (settings or {}) else []
    if epochs is not None or not ends:
        epochs = _EPOCHS if epochs is None else epochs
        rows = count_rows(examples, start.tokenizer, config.seq_len)
        ends.append(max(1, round(epochs * rows / rows_per_step(config))))
    config = replace(config, max_steps=min(ends))
    on = choose_device(device)
    if config.compile:
        check_compiler(on)
    return RunPlan(
        *(config, start, TokenizerConfig("bpe"), [], [], on),
        examples=examples,
        lora=lora,
    )


def asked_task(kind: Kind, prompt: str | None, tables: Tables) -> Task:
    """The task that the examples of `tables.data` are of, for a model that was not taught one.
    Raises OptionError, DataError."""
    task = _template(kind, prompt)
    return _with_labels(task, read_examples(tables.data, task, tables))


def rows_per_step(train: TrainConfig) -> int:
    return train.batch_size * train.grad_accum


def task_training(model: ModelConfig, lora: LoraConfig | None) -> TrainConfig:
    """A table is read several times, so gently and with dropout; an adapter is small, and takes
    larger steps."""
    optimizer = OptimizerConfig(lr=5e-4, matrix_lr=3e-3)
    if lora is not None:
        optimizer = OptimizerConfig("adamw", lr=2e-3, weight_decay=0.0)
    return TrainConfig(
        seq_len=min(512, model.n_positions),
        batch_size=4,
        warmup_steps=20,
        dropout=0.1,
        eval_every=100,
        patience=5,
        optimizer=optimizer,
    )


def _template(kind: Kind, prompt: str | None) -> Task:
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


def _with_labels(task: Task, examples: Sequence[Example]) -> Task:
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


# --- while it learns, and after -----------------------------------------------------------------

# What decides which checkpoint is the best, and on how many examples it is measured: a label takes
# one pass, an answer is written id by id.
_METRICS: dict[Kind, tuple[str, int]] = {
    "classification": ("accuracy", 1000),
    "translation": ("chrF", 128),
    "summarization": ("ROUGE-L", 64),
}


def task_metric(run: Run) -> Metric | None:
    """How well a model does the task of a run on its validation examples, in percent; None where
    the validation loss is all there is to say."""
    task = run.config.task
    if task is None or task.kind not in _METRICS:
        return None
    name, count = _METRICS[task.kind]
    examples = spread(_held_out(run, task), count)
    checkpoint, _, _ = run.last()
    words = tokenizer_of(checkpoint)

    def measure(model: GPT) -> float:
        generator = Generator.from_parts(TorchDecoder(model), words, task=task, reuse="none")
        found = {scored.name: scored.value for scored in evaluate(generator, examples)}
        return found[name]

    return measure


def finish(run: Run) -> None:
    """Have the best checkpoint say how sure it is, as its validation examples show it."""
    checkpoint = load_checkpoint(run.path)
    task = checkpoint.task
    if task is None or task.kind != "classification":
        return
    examples = _held_out(run, task)
    with open_checkpoint_generator(checkpoint) as generator:
        found = generator.classify_batch([e.fields for e in examples], calibrate=False)
    scores = torch.tensor([[math.log(max(dict(f)[k], 1e-30)) for k in task.labels] for f in found])
    wanted = torch.tensor([task.labels.index(example.answers[0]) for example in examples])
    temperature, bias = calibrated(scores, wanted)
    file = resolve_checkpoint(run.path) / TASK_FILE
    replace_json(file, asdict(replace(task, temperature=temperature, bias=bias)))


def calibrated(scores: Tensor, wanted: Tensor) -> tuple[float, tuple[float, ...]]:
    """Temperature and bias [labels] with which softmax(scores / temperature + bias) gives `wanted`
    [examples] the most: bias-corrected temperature scaling (https://arxiv.org/abs/1901.06852).

    `scores` [examples, labels] are log probabilities. A slight pull to 1 and 0 keeps a handful of
    examples from deciding everything.
    """
    log_temperature = torch.zeros((), dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(scores.shape[1], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [log_temperature, bias], max_iter=200, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        logits = scores.double() / log_temperature.exp() + bias
        pull = (log_temperature**2 + (bias**2).sum()) / len(scores)
        total = F.cross_entropy(logits, wanted) + pull
        total.backward()  # type: ignore[no-untyped-call]
        return total

    optimizer.step(loss)  # type: ignore[no-untyped-call]
    limited = float(log_temperature.detach().exp().clamp(0.01, 100.0))
    return limited, tuple((bias - bias.mean()).tolist())


def _held_out(run: Run, task: Task) -> list[Example]:
    """The validation examples of a run."""
    table = run.path / DATA_FOLDER / VALID_TABLE
    return read_examples([table], task, Tables([table]))
