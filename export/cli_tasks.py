"""The commands for tasks and for what comes before a training: finetune, evaluate, estimate."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import click

from gptrt.console import PATH, pairs
from gptrt.errors import OptionError, TargetError
from gptrt.task import Kind

if TYPE_CHECKING:
    from .needs import Estimate


@click.command()
@click.option("--task", "kind", type=click.Choice(list(get_args(Kind))), help="What to learn.")
@click.option("--from", "start", type=PATH, help="The checkpoint or bundle to begin with.")
@click.option("--data", multiple=True, type=PATH, help="Tables: .jsonl, .tsv, .csv, .txt.")
@click.option("--valid", multiple=True, type=PATH, help="To validate by; else a share of --data.")
@click.option("--test", multiple=True, type=PATH, help="To evaluate on; else a share of --data.")
@click.option("--valid-share", type=click.FloatRange(0, 0.45), help="Of --data; a tenth.")
@click.option("--test-share", type=click.FloatRange(0, 0.45), help="Of --data; a tenth.")
@click.option("--out", required=True, type=PATH, help="The run folder.")
@click.option("--prompt", help="What stands before an answer, columns in braces.")
@click.option(
    "--column", "columns", multiple=True, metavar="NAME=COLUMN", help="Where it has another name."
)
@click.option(
    "--label", "labels", multiple=True, metavar="VALUE=NAME", help="What a label is to be called."
)
@click.option("--class-weights", type=click.Choice(["none", "balanced"]), default="none")
@click.option("--lora-rank", type=click.IntRange(1, 4096), help="Learn an adapter of this rank.")
@click.option("--lora-alpha", type=click.FloatRange(0), help="Its scale; twice the rank.")
@click.option("--lora-dropout", type=click.FloatRange(0, 0.99), default=0.0)
@click.option("--lora-target", "targets", multiple=True, help="attn.c_attn, mlp.c_fc ...: all.")
@click.option(
    "--epochs",
    type=click.FloatRange(0, min_open=True),
    help="Times to read the table, if no other limit ends it before.",
)
@click.option("--resume", is_flag=True, help="Go on with the run in --out.")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto")
@click.option("--max-time", type=click.FloatRange(min=0), help="Seconds of training.")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Any training setting.")
@click.option("--estimate", "only_estimate", is_flag=True, help="Say what it takes; train nothing.")
def finetune(
    kind: Kind | None,
    start: Path | None,
    data: tuple[Path, ...],
    valid: tuple[Path, ...],
    test: tuple[Path, ...],
    valid_share: float | None,
    test_share: float | None,
    out: Path,
    prompt: str | None,
    columns: tuple[str, ...],
    labels: tuple[str, ...],
    class_weights: Literal["none", "balanced"],
    lora_rank: int | None,
    lora_alpha: float | None,
    lora_dropout: float,
    targets: tuple[str, ...],
    epochs: float | None,
    resume: bool,
    device: str,
    max_time: float | None,
    settings: tuple[str, ...],
    only_estimate: bool,
) -> None:
    """Teach a model a task from a table of examples.

    gptrt-export finetune --task classification --from models/tales --data reviews.tsv
      --column answer=label --label 1=positive --label 0=negative --out runs/reviews
    """
    from .estimate import estimate, tables_request
    from .example_tables import Tables
    from .finetune import plan_finetuning
    from .hub import local_checkpoint
    from .lora import lora_config
    from .new_run import create_run
    from .progress import ProgressBar
    from .task_metric import task_metric
    from .training import resumed, train_to_end

    if resume:
        train_to_end(resumed(out, device, max_time=max_time))
        return
    if kind is None or start is None or not data:
        raise OptionError(
            "--task, --from and --data", found="not all of them", do="add what is missing"
        )
    tables = Tables(
        *(data, valid, test, pairs("--column", columns), pairs("--label", labels)),
        valid_share=valid_share,
        test_share=test_share,
    )
    limit = {} if max_time is None else {"max_time": str(max_time)}
    plan = partial(
        plan_finetuning,
        *(kind, local_checkpoint(start), tables),
        prompt=prompt,
        lora=lora_config(lora_rank, lora_alpha, lora_dropout, targets),
        class_weights=class_weights,
        epochs=epochs,
        device=device,
        settings=pairs("--set", settings) | limit,
    )
    if only_estimate:
        _tell(estimate(tables_request(plan, task_metric)))
        return
    with ProgressBar("preparing") as bar:
        run = create_run(out, plan(), bar.update)
    train_to_end(run)


@click.command()
@click.option("--preset", help="A shape and a way to train it; `presets` lists them.")
@click.option("--from", "start", type=PATH, help="A checkpoint or bundle to fine-tune.")
@click.option("--data", multiple=True, type=PATH, help="Text files or folders; may be repeated.")
@click.option("--target-tokens", type=click.IntRange(min=1), help="To train on.")
@click.option("--inference-tokens", type=click.IntRange(min=0), help="To read and write in use.")
@click.option(
    "--steps",
    type=click.IntRange(min=0),
    default=6,
    show_default=True,
    help="Steps to measure; 0 measures nothing.",
)
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Any training setting.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on standard output.")
def estimate(
    preset: str | None,
    start: Path | None,
    data: tuple[Path, ...],
    device: str,
    settings: tuple[str, ...],
    as_json: bool,
    **limits: Any,
) -> None:
    """How much data a training wants, how long it takes and how much memory.

    The data by published scaling laws, the rest measured in a few steps of the training itself.
    For a task, add --estimate to the command `finetune`.

    gptrt-export estimate --preset gpt2-13m --data texts/ --inference-tokens 1000000000
    """
    from dataclasses import asdict

    from .estimate import estimate as run
    from .estimate import texts_request
    from .hub import local_checkpoint

    changes = pairs("--set", settings)
    start = local_checkpoint(start) if start else None
    found = run(texts_request(preset, start, data, device, changes, **limits))
    if as_json:
        click.echo(json.dumps(asdict(found)))
    else:
        _tell(found)


def _tell(found: Estimate) -> None:
    from .needs import describe

    for what, text in describe(found):
        click.echo(f"{what:18} {text}")


@click.command()
@click.argument("models", nargs=-1, required=True, type=PATH, metavar="MODEL...")
@click.option("--data", required=True, type=PATH, help="A table: .jsonl, .tsv, .csv, .txt.")
@click.option(
    "--task", "kind", type=click.Choice(list(get_args(Kind))), help="For models without one."
)
@click.option("--prompt", help="Of --task: what stands before an answer, fields in braces.")
@click.option(
    *("--field", "--column", "columns"),
    multiple=True,
    metavar="NAME=COLUMN",
    help="Where a field has another name.",
)
@click.option("--answer", metavar="COLUMN", help="The column of the right answers.")
@click.option(
    "--label", "labels", multiple=True, metavar="VALUE=NAME", help="What a label is called."
)
@click.option("--extract", is_flag=True, help="Summarize by the likeliest sentence of the text.")
@click.option("--limit", type=click.IntRange(min=1), help="So many examples, from all over.")
@click.option("--batch-size", type=click.IntRange(min=1), help="Answers written at a time.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on standard output.")
@click.option("--out", type=PATH, help="Write the table into this file, too.")
def evaluate(
    models: tuple[Path, ...],
    data: Path,
    kind: Kind | None,
    prompt: str | None,
    columns: tuple[str, ...],
    answer: str | None,
    labels: tuple[str, ...],
    as_json: bool,
    out: Path | None,
    **options: Any,
) -> None:
    """How well models do their task, side by side: runs, checkpoints, bundles.

    gptrt-export evaluate runs/reviews bundles/reviews-int4 --data runs/reviews/data/test.jsonl
    """
    from . import evaluate as evaluation
    from .example_tables import Tables, asked_task, read_examples
    from .hub import local_checkpoint
    from .progress import ProgressBar

    names = pairs("--field", columns) | ({"answer": answer} if answer else {})
    tables = Tables([data], columns=names, labels=pairs("--label", labels))
    if out is not None and not out.parent.is_dir():
        raise TargetError(f"a folder {out.parent}", found="none", do="make it, or check --out")
    if out is not None and out.is_dir():
        raise TargetError("a file for --out", found=f"the folder {out}", do="name a file in it")
    if prompt is not None and kind is None:
        raise OptionError("--task, which --prompt is for", found="none", do="add it")
    given = {name: value for name, value in options.items() if value is not None}
    asked = asked_task(kind, prompt, tables) if kind else None
    with ProgressBar("evaluating") as bar:
        found = evaluation.compare(
            *([local_checkpoint(path) for path in models], data),
            lambda task: read_examples([data], task, tables),
            asked=asked,
            **given,
            progress=bar.update,
        )
    table = evaluation.as_table(found)
    click.echo(json.dumps(evaluation.as_json(found)) if as_json else table, nl=as_json)
    if out is not None:
        out.write_text(table, encoding="utf-8")
