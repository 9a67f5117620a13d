"""How well a model does its task, on examples that nothing was learnt from: the same code, through
the runtime's own methods, for a checkpoint in PyTorch and for the bundles made of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

from gptrt.errors import DataError, OptionError, PromptError
from gptrt.format import MANIFEST_FILE, read_manifest
from gptrt.generator import Generator
from gptrt.task import Kind, Task, answer_text

from . import metrics
from .checkpoint import load_checkpoint
from .examples import Example
from .metrics import Scored
from .progress import Progress, silent
from .torch_decoder import open_checkpoint_generator

T = TypeVar("T")

BATCH_SIZE = 8
_MODULES: dict[Kind, tuple[str, ...]] = {
    "translation": (metrics.SACREBLEU,),
    "summarization": (metrics.ROUGE, metrics.ROUGE_WORDS),
}
_CHUNK = 4  # batches between two reports of progress, so that rows are seldom empty


def evaluate(
    generator: Generator,
    examples: Sequence[Example],
    *,
    extract: bool = False,
    batch_size: int = BATCH_SIZE,
    progress: Progress = silent,
) -> list[Scored]:
    """What the task of a generator is judged by, over examples of it.

    classification  accuracy, macro-F1, calibration error of the calibrated probabilities
    translation     BLEU, chrF
    summarization   ROUGE-1, ROUGE-2, ROUGE-L; with `extract` of the likeliest sentence of the text
    lm              perplexity of the answers, their ends included, after their prompts

    Answers are greedy. Raises what `check` and `check_room` do, and OptionError for a generator
    without a task.
    """
    task = generator.task
    if task is None:
        raise OptionError("a model that was fine-tuned for a task", found="none", do="fine-tune it")
    check(task, examples, extract=extract)
    check_room(generator, task, examples)
    steps = _Steps(generator, task, batch_size, progress)
    wanted = [example.answers for example in examples]
    if task.kind == "classification":
        return _classification(steps, examples)
    if task.kind == "lm":
        nats = [_answer_nats(generator, task, example) for (example,) in steps.over(examples, 1)]
        return [metrics.answer_perplexity(*zip(*nats, strict=True))]
    if task.kind == "translation":
        found = steps.answers(examples)
        return [metrics.bleu(found, wanted), metrics.chrf(found, wanted)]
    if extract:
        each = (example.fields for (example,) in steps.over(examples, 1))
        found = [generator.summarize(fields, extract=True) for fields in each]
    else:
        found = steps.answers(examples)
    return metrics.rouge(found, wanted)


def check(task: Task, examples: Sequence[Example], *, extract: bool = False) -> None:
    """Raises DataError for no examples, and for labels that the task has not: none would ever be
    found; OptionError for `extract` with another task, DependencyError for a missing package."""
    if not examples:
        raise DataError("examples to evaluate on", found="none", do="give a table with some")
    unknown = {a for example in examples for a in example.answers} - set(task.labels)
    if task.labels and unknown:
        raise DataError(
            f"answers that are among the labels {', '.join(task.labels)}",
            found=", ".join(sorted(unknown)[:5]),
            do="name them with --label VALUE=NAME, or correct the table",
        )
    if extract and task.kind != "summarization":
        raise OptionError("--extract for summarization", found=task.kind, do="leave it out")
    for module in _MODULES.get(task.kind, ()):
        metrics.imported(module)


def check_room(generator: Generator, task: Task, examples: Sequence[Example]) -> None:
    """Raises DataError, with the numbers of examples, for answers that are judged after a prompt
    and leave no room for it."""
    if task.kind != "lm" or not task.prompt:
        return
    faults = []
    for number, example in enumerate(examples, 1):
        try:
            _prompt_and_answer(generator, task, example)
        except PromptError:
            faults.append(str(number))
    if faults:
        more = f" and {len(faults) - 8} more" if len(faults) > 8 else ""
        raise DataError(
            f"answers that leave room for the prompt in {generator.decoder.context} tokens",
            found=f"none in example {', '.join(faults[:8])}{more}",
            do="shorten these answers, or leave them out",
        )


@dataclass(frozen=True)
class _Steps:
    """How a generator is asked, a chunk of examples at a time."""

    generator: Generator
    task: Task
    batch_size: int
    progress: Progress

    def over(self, examples: Sequence[T], size: int) -> Iterator[Sequence[T]]:
        for first in range(0, len(examples), size):
            self.progress(first / len(examples), f"example {first} of {len(examples)}")
            yield examples[first : first + size]

    def answers(self, examples: Sequence[Example]) -> list[str]:
        found = []
        for chunk in self.over(examples, _CHUNK * self.batch_size):
            fields = [example.fields for example in chunk]
            answers = self.generator.answer_batch(fields, batch_size=self.batch_size)
            found += [answer.text for answer in answers]
        return found


def _classification(steps: _Steps, examples: Sequence[Example]) -> list[Scored]:
    found, confidence = [], []
    for chunk in steps.over(examples, steps.batch_size):
        for labels in steps.generator.classify_batch([example.fields for example in chunk]):
            found.append(labels[0][0])
            confidence.append(labels[0][1])
    # Of several right labels the one that was found counts, or else the first.
    pairs = zip(found, examples, strict=True)
    wanted = [label if label in e.answers else e.answers[0] for label, e in pairs]
    right = [a == b for a, b in zip(found, wanted, strict=True)]
    return [
        metrics.accuracy(found, wanted),
        metrics.macro_f1(found, wanted),
        metrics.calibration_error(confidence, right),
    ]


def _answer_nats(generator: Generator, task: Task, example: Example) -> tuple[float, int]:
    """Nats of the best answer, summed over its ids, and their number. Without a prompt the first id
    of it is given, and predicted by nothing."""
    if not task.prompt:
        ids = _closed(generator, generator.encode(example.answers[0]))
        text = generator.perplexity(ids)
        return text.nll * text.tokens, text.tokens
    prompt, ids = _prompt_and_answer(generator, task, example)
    (score,) = generator.score(prompt, [ids])
    return -score.total, len(score.ids)


def _prompt_and_answer(
    generator: Generator, task: Task, example: Example
) -> tuple[list[int], list[int]]:
    """Raises PromptError where the best answer, with its end, leaves no room."""
    answer = generator.encode(answer_text(example.answers[0]), whole=False)
    ids = _closed(generator, answer)
    room = max(0, generator.decoder.context - len(ids))
    return task.prompt_ids(example.fields, generator.encode, room), ids


def _closed(generator: Generator, answer: list[int]) -> list[int]:
    end = generator.tokenizer.end
    return answer if end is None else [*answer, end]


# --- models side by side ------------------------------------------------------------------------


@dataclass(frozen=True)
class Comparison:
    """The scores of models, by their paths as they were given, on the same examples of a table."""

    task: Kind
    data: str
    examples: int
    scores: dict[str, list[Scored]]
    date: str
    versions: dict[str, str]


def task_of(path: Path) -> Task | None:
    """What a run, checkpoint or bundle was fine-tuned for. Raises CheckpointError, BundleError."""
    if (path / MANIFEST_FILE).is_file():
        return read_manifest(path).task
    return load_checkpoint(path).task


def open_model(path: Path, task: Task | None = None) -> Generator:
    """A generator over a run, checkpoint or bundle, for a task that is not its own if one is given.

    Raises CheckpointError, BundleError.
    """
    if (path / MANIFEST_FILE).is_file():
        generator = Generator(path, device="cpu")  # as is the checkpoint that it is compared with
    else:
        generator = open_checkpoint_generator(load_checkpoint(path))
    if task is None:
        return generator
    return Generator.from_parts(generator.decoder, generator.tokenizer, task=task)


def compare(
    models: Sequence[Path],
    data: Path,
    read: Callable[[Task], list[Example]],
    *,
    asked: Task | None = None,
    extract: bool = False,
    limit: int | None = None,
    batch_size: int = BATCH_SIZE,
    progress: Progress = silent,
) -> Comparison:
    """Evaluate models one after another on the examples that `read` gives for their tasks, `limit`
    of them from all over the table.

    A model without a task gets the one that is `asked` for, or else that of the first that has one:
    so a fine-tuned model can be seen beside what it came from. All tasks and tables are read before
    the first model runs.
    """
    own = {str(path): task_of(path) for path in models}
    taught = next((task for task in (asked, *own.values()) if task is not None), None)
    if taught is None:
        raise OptionError(
            "a model that was fine-tuned for a task, or --task",
            found=", ".join(own) + " without one",
            do="make one with `gptrt-export finetune`, or say what to ask of it",
        )
    tasks = {path: task or taught for path, task in own.items()}
    if len(kinds := {task.kind for task in (taught, *tasks.values())}) > 1:
        raise OptionError(
            "models of one kind of task", found=", ".join(sorted(kinds)), do="evaluate them apart"
        )
    examples = {path: spread(read(task), limit) for path, task in tasks.items()}
    for path, task in tasks.items():
        check(task, examples[path], extract=extract)
        if task.kind == "lm" and task.prompt:  # whose answers are as long as they like
            with open_model(Path(path), task) as generator:
                check_room(generator, task, examples[path])
    scores = {}
    for number, (path, task) in enumerate(tasks.items()):

        def report(share: float, note: str, number: int = number, path: str = path) -> None:
            progress((number + share) / len(tasks), f"{path}: {note}")

        with open_model(Path(path), None if own[path] else task) as generator:
            scores[path] = evaluate(
                *(generator, examples[path]),
                extract=extract,
                batch_size=batch_size,
                progress=report,
            )
    count = len(next(iter(examples.values())))
    today = datetime.now(UTC).date().isoformat()
    return Comparison(taught.kind, data.name, count, scores, today, _versions(taught.kind))


def spread(examples: list[Example], limit: int | None) -> list[Example]:
    """So many of them, from all over: tables are often sorted by their answers."""
    if limit is None or limit >= len(examples):
        return examples
    return [examples[n * len(examples) // limit] for n in range(limit)]


def _versions(kind: Kind) -> dict[str, str]:
    """Of what computes, and of what judges."""
    judges = (module.partition(".")[0] for module in _MODULES.get(kind, ()))
    return {name: version(name) for name in ("gptrt", "torch", "onnxruntime", *judges)}


def as_table(found: Comparison) -> str:
    """In Markdown: a row a metric, a column a model, `value [low, high]`."""
    columns = list(found.scores)
    rows = [["metric", *columns], ["---"] * (1 + len(columns))]
    for row in zip(*found.scores.values(), strict=True):
        unit = "" if row[0].name == "perplexity" else " %"
        cells = (f"{s.value:.2f} [{s.low:.2f}, {s.high:.2f}]" for s in row)
        rows.append([row[0].name + unit, *cells])
    versions = ", ".join(f"{name} {number}" for name, number in found.versions.items())
    about = (
        f"{found.task} on {found.examples:,} examples of {found.data}; 95 % intervals by bootstrap "
        f"over examples; {found.date}; {versions}."
    )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + f"\n\n{about}\n"


def as_json(found: Comparison) -> dict[str, Any]:
    """`scores` by model, then by metric: value, low, high, count."""
    by_metric = {
        path: {s.name: {k: v for k, v in asdict(s).items() if k != "name"} for s in scores}
        for path, scores in found.scores.items()
    }
    return asdict(found) | {"scores": by_metric}
