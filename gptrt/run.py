"""A model over a table of any size, of which no more than a batch is in memory.

Every batch is on the disk before it counts as done (`target`), and begins as if it were the first.
So a run that was ended at any moment goes on after its last whole batch, and gives the same bytes
as one that was not.
"""

from __future__ import annotations

import csv
import io
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from gptrt import __version__
from gptrt.answers import question
from gptrt.config import GenerationConfig
from gptrt.engine import Device
from gptrt.errors import DataError, OptionError, PromptError, TargetError
from gptrt.format import MANIFEST_FILE, describe_file, read_manifest
from gptrt.generator import Generator
from gptrt.opening import StrPath, bundle_path, foreign_folder
from gptrt.tables import TEXT, Row, checked_rows, no_texts, read_rows
from gptrt.target import Made, Target, beside
from gptrt.task import Task

SUFFIXES = (".jsonl", ".csv")  # of outputs
PROMPT = "prompt"  # the field of a bundle without a task

_SEEDS = 1 << 64  # so many there are

Progress = Callable[[int, int], None]  # rows that are done, of how many
Ask = Callable[[Sequence[Row]], list[dict[str, Any]]]  # the columns to add to some rows


@dataclass(frozen=True)
class Job:
    """Every row of `input`, or the first `limit`, goes to the model, and to `output` with what the
    model made of it.

    `fields` names the columns that the prompt's fields stand in, each by default one of its own
    name. `options` are those of generation; a `seed`, 0 if there is none, and the line of a row in
    the input make the seed of the row. The names of new columns begin with `prefix`.
    """

    input: Path
    output: Path
    fields: Mapping[str, str] = field(default_factory=dict)
    batch_size: int = 8
    options: Mapping[str, Any] = field(default_factory=dict)
    limit: int | None = None
    prefix: str = ""


@dataclass(frozen=True)
class Plan:
    """A job that was found possible: `columns` are all that its `rows` rows have."""

    job: Job
    task: Task | None
    fields: dict[str, str]
    columns: tuple[str, ...]
    rows: int

    def read(self) -> Iterator[Row]:
        return islice(read_rows(self.job.input, self.fields), self.rows)


@dataclass(frozen=True)
class Report:
    """`rows_before` of the `rows` had been done by an earlier run that was ended."""

    output: str
    rows: int
    rows_before: int
    seconds: float


def run(
    bundle: StrPath | None,
    job: Job,
    *,
    force: bool = False,
    device: Device = "auto",
    threads: int | None = None,
    progress: Progress | None = None,
) -> Report:
    """Carry out a job, or go on with it where an earlier run was ended.

    An output that exists, or was begun with anything else, is refused; with `force` it is begun
    anew and replaced at the end. Raises OptionError, DataError that lists every fault of the input
    before anything runs, TargetError, and what `Generator` does.
    """
    task, source = _source(bundle)
    plan = plan_for(job, task)
    made = made_of(plan, source, device=device)
    target = Target.open(job.output, made, rows=plan.rows, force=force)
    with Generator(bundle, device=device, threads=threads) as generator:
        return carry_out(generator, plan, target, progress=progress)


# --- before -------------------------------------------------------------------------------------


def plan_for(job: Job, task: Task | None) -> Plan:
    """Read all of the input once. Raises OptionError, DataError, TargetError."""
    if task is not None and task.kind == "lm" and not task.prompt:
        task = None
    _check_options(job, task)
    fields = _fields(job, task)
    columns, count = dict[str, None](), 0
    for row in checked_rows(job.input, fields, wrong=no_texts, limit=job.limit):
        columns |= dict.fromkeys(row.columns)
        count += 1
    taken = [name for name in _added(job, task) if name in columns]
    if taken:
        raise DataError(
            f"no column {', '.join(taken)} in {job.input}, for the model's own",
            found="one",
            do="rename it, or give the new columns a --prefix",
        )
    return Plan(job, task, fields, tuple(columns), count)


def _check_options(job: Job, task: Task | None) -> None:
    for name in ("batch_size", "limit"):
        value = getattr(job, name)
        if value is not None and (type(value) is not int or value < 1):
            raise OptionError(f"{name} of 1 or more", found=repr(value), do="correct it")
    config = GenerationConfig.from_options(**job.options)
    if job.options and task is not None and task.kind == "classification":
        raise OptionError(
            "no options of generation where labels are chosen",
            found=", ".join(job.options),
            do="leave them out",
        )
    if config.num_return_sequences != 1:
        raise OptionError(
            "one answer a row", found=f"{config.num_return_sequences}", do="repeat the row"
        )
    if job.output.suffix.lower() not in SUFFIXES:
        raise OptionError(
            f"an output whose name ends in {' or '.join(SUFFIXES)}",
            found=str(job.output),
            do="choose another name",
        )
    if job.input.resolve() in [path.resolve() for path in (job.output, *beside(job.output))]:
        raise OptionError("an output beside the input", found="the same file", do="rename it")
    if not job.output.parent.is_dir():
        raise TargetError(
            f"to write {job.output}", found=f"no folder {job.output.parent}", do="make it first"
        )


def _fields(job: Job, task: Task | None) -> dict[str, str]:
    """The columns that the fields of the prompt stand in."""
    names = (PROMPT,) if task is None else task.fields
    unknown = [name for name in job.fields if name not in names]
    if unknown:
        raise OptionError(
            f"fields of the prompt: {', '.join(names)}",
            found=", ".join(unknown),
            do="give them as NAME=COLUMN",
        )
    lone = len(names) == 1 and job.input.suffix.lower() == ".txt"
    return {name: job.fields.get(name, TEXT if lone else name) for name in names}


def _added(job: Job, task: Task | None) -> list[str]:
    """The columns that the model gives."""
    labels = task is not None and task.kind == "classification"
    names = ("label", "probabilities") if labels else ("answer", "finish_reason")
    return [job.prefix + name for name in names]


def _source(bundle: StrPath | None) -> tuple[Task | None, str]:
    """The task of a bundle, and the sha256 that stands for all of it."""
    if (folder := foreign_folder(bundle)) is not None:
        from gptrt import foreign

        return None, foreign.digest_of(folder)
    path = bundle_path(bundle)
    return read_manifest(path).task, describe_file(path / MANIFEST_FILE).sha256


def made_of(plan: Plan, source: str, *, device: Device = "auto") -> Made:
    """What the output of a plan will be made of, with a bundle that `source` stands for."""
    entry, job = describe_file(plan.job.input), plan.job
    options = {f"field {name}": column for name, column in plan.fields.items()}
    options |= {name: str(value) for name, value in job.options.items()}
    names = ("batch_size", "limit", "prefix")
    options |= {name: str(getattr(job, name)) for name in names} | {"device": device}
    return Made(__version__, source, entry.sha256, entry.size, options)


# --- the work -------------------------------------------------------------------------------------


def carry_out(
    generator: Generator, plan: Plan, target: Target, *, progress: Progress | None = None
) -> Report:
    """Ask for the rows that are not done, batch by batch. Raises DataError, before any is asked,
    with all that the tokenizer refuses."""
    began, before = time.monotonic(), target.state.rows
    if not target.finished:
        config = _config(plan)
        for _ in checked_rows(
            plan.job.input,
            plan.fields,
            wrong=lambda row: _unusable(generator, plan, config, row),
            limit=plan.rows,
        ):
            pass
        ask, rows = asking(generator, plan, config), islice(plan.read(), before, None)
        with target.writing() as stream:
            while batch := list(islice(rows, plan.job.batch_size)):
                if progress is not None:
                    progress(target.state.rows, plan.rows)
                generator.calls.shelf.forget()
                data = _written(plan, batch, ask(batch), first=target.state.rows == 0)
                target.add(stream, data, len(batch))
        if target.state.rows < plan.rows:
            raise DataError(
                f"{plan.rows} rows in {plan.job.input}, as there were when it was checked",
                found=f"{target.state.rows}",
                do="restore it and repeat the command, or start anew with --force",
            )
    target.finish()
    if progress is not None:
        progress(plan.rows, plan.rows)
    return Report(str(plan.job.output), plan.rows, before, time.monotonic() - began)


def asking(generator: Generator, plan: Plan, config: GenerationConfig) -> Ask:
    """How the bundle is asked for the new columns of some rows."""
    task, size, names = plan.task, plan.job.batch_size, _added(plan.job, plan.task)

    def labels(rows: Sequence[Row]) -> list[dict[str, Any]]:
        found = generator.classify_batch([row.values for row in rows])
        shares = [{label: float(f"{p:.6g}") for label, p in each} for each in found]
        return [dict(zip(names, (next(iter(e)), e), strict=True)) for e in shares]

    def texts(rows: Sequence[Row]) -> list[dict[str, Any]]:
        configs = [replace(config, seed=((config.seed or 0) + row.line) % _SEEDS) for row in rows]
        if task is None:
            prompts = [row.values[PROMPT] for row in rows]
            found = generator.complete_batch(prompts, config=configs, batch_size=size)
        else:
            fields = [row.values for row in rows]
            found = generator.answer_batch(fields, config=configs, batch_size=size)
        return [dict(zip(names, (r.text, r.finish_reason), strict=True)) for r in found]

    return labels if task is not None and task.kind == "classification" else texts


def _config(plan: Plan) -> GenerationConfig:
    """What every row is answered with; greedy, if nothing else is asked for."""
    longest = {} if plan.task is None else {"max_new_tokens": plan.task.max_new_tokens}
    return GenerationConfig.from_options(**longest | dict(plan.job.options))


def _unusable(generator: Generator, plan: Plan, config: GenerationConfig, row: Row) -> str | None:
    """Why a row cannot be asked, if it cannot."""
    calls, encode, task = generator.calls, generator.encode, plan.task
    try:
        if task is None:
            calls.prepare([encode(row.values[PROMPT])], [config])
        else:
            room = 1 if task.kind == "classification" else config.max_new_tokens
            ids = question(calls, encode, task, row.values, room)
            if task.kind != "classification":
                calls.prepare([ids], [config])
    except PromptError as e:
        return f"{e.found}, wanted {e.wanted}"
    return None


def _written(
    plan: Plan, rows: Sequence[Row], added: Sequence[dict[str, Any]], *, first: bool
) -> bytes:
    """A batch as it stands in the output; at its beginning with the names of the columns."""
    whole = [row.columns | new for row, new in zip(rows, added, strict=True)]
    if plan.job.output.suffix.lower() == ".jsonl":
        lines = [json.dumps(values, ensure_ascii=False, allow_nan=False) for values in whole]
    else:
        names = [*plan.columns, *_added(plan.job, plan.task)]
        rows_of_cells = [[_cell(row.get(name, "")) for name in names] for row in whole]
        lines = list(map(_csv_line, [names] * first + rows_of_cells))
    return "".join(f"{line}\n" for line in lines).encode()


def _csv_line(cells: Sequence[str]) -> str:
    """Without its end. It is the writer's own end that makes it quote a lone CR, until Python 3.13
    does so anyway; unquoted, no reader could take it."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\r\n").writerow(cells)
    return text.getvalue().removesuffix("\r\n")


def _cell(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
