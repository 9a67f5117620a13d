"""How well a model does its task, while it learns; and how sure it may be, at the end."""

from __future__ import annotations

import math
from dataclasses import asdict, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from gptrt.generator import Generator
from gptrt.task import Kind, Task

from .checkpoint import TASK_FILE, load_checkpoint, resolve_checkpoint
from .evaluate import evaluate, spread
from .example_tables import Tables, read_examples
from .examples import VALID_TABLE, Example
from .files import replace_json
from .model import GPT
from .runs import DATA_FOLDER, Run
from .torch_decoder import TorchDecoder, open_checkpoint_generator, tokenizer_of
from .trainer import Metric

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
