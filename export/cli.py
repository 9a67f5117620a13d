"""The command `gptrt-export`: train, fine-tune, convert, verify, evaluate, estimate."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import click

from gptrt.cli import INTERRUPTED, OneLineErrors
from gptrt.errors import OptionError, TargetError
from gptrt.task import Kind

if TYPE_CHECKING:
    from .quantize import Mode

_path = click.Path(path_type=Path)


@click.group(name="gptrt-export", cls=OneLineErrors)
def main() -> None:
    """Train or fine-tune a GPT and turn it into a quantized, verified bundle."""


@main.command()
@click.option("--preset", help="A shape and a way to train it; `presets` lists them.")
@click.option("--data", multiple=True, type=_path, help="Text files or folders; may be repeated.")
@click.option("--valid", multiple=True, type=_path, help="Validation text; else a share of --data.")
@click.option("--out", required=True, type=_path, help="The run folder.")
@click.option("--from", "start", type=_path, help="Fine-tune this checkpoint or bundle.")
@click.option("--tokenizer", type=_path, help="tokenizer.json, or a folder with GPT-2's files.")
@click.option(
    "--resume", is_flag=True, help="Go on with the run in --out, with its own data and settings."
)
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto")
@click.option("--max-steps", type=click.IntRange(min=0))
@click.option("--max-time", type=click.FloatRange(min=0), help="Seconds of training.")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Any training setting.")
@click.option(
    "--quantize",
    "mode",
    type=click.Choice(["int8", "int4", "int2"]),
    help="Train through the rounding of such a bundle.",
)
@click.option("--block-size", type=int, help="Weights that share a scale, with --quantize.")
@click.option("--head-bits", type=int, help="Bits of the vocabulary matrix; those of --quantize.")
@click.option("--distill", type=click.FloatRange(min=0), help="Weight of learning from --from.")
def train(
    preset: str | None,
    data: tuple[Path, ...],
    valid: tuple[Path, ...],
    out: Path,
    start: Path | None,
    tokenizer: Path | None,
    resume: bool,
    device: str,
    max_steps: int | None,
    max_time: float | None,
    settings: tuple[str, ...],
    mode: Mode | None,
    block_size: int | None,
    head_bits: int | None,
    distill: float | None,
) -> None:
    """Train from scratch, fine-tune, or go on where a run stopped.

    gptrt-export train --preset nano-char --data input.txt --out runs/nano
    gptrt-export train --from models/tales --data texts/ --quantize int4 --out runs/int4
    """
    from .hub import local_checkpoint
    from .progress import ProgressBar
    from .runs import create_run, open_run
    from .start import plan_run, recipe_to_train
    from .train import train as run_training

    if resume:
        run = open_run(out)
        if preset or data or valid or start or tokenizer or settings or mode or distill:
            _say(f"resuming {out}: model, data and settings are those that it was started with")
    else:
        texts, held_out, changes = list(data), list(valid), _pairs("--set", settings)
        if distill is not None:
            changes["distill"] = str(distill)
        recipe = recipe_to_train(mode, block_size, head_bits)
        start = local_checkpoint(start) if start else None
        plan = plan_run(preset, start, texts, held_out, device, changes, tokenizer, recipe)
        with ProgressBar("preparing") as bar:
            run = create_run(out, plan, bar.update)
    run = run.with_limits(max_steps, max_time)
    with _interruptible() as interrupted, ProgressBar("training") as bar:
        result = run_training(run, bar, interrupted)
    if result.reason == "interrupted":
        click.echo(f"stopped at step {result.steps}; go on with: {_resume_line(out)}", err=True)
        sys.exit(INTERRUPTED)
    click.echo(
        f"{result.steps} steps in {result.seconds:.0f} s, ended by {result.reason}; "
        f"best validation loss {result.best_loss:.4f}, perplexity {result.perplexity:.2f}; "
        f"curves in {out / 'loss.png'}",
        err=True,
    )


@main.command()
@click.option("--task", "kind", type=click.Choice(list(get_args(Kind))), help="What to learn.")
@click.option("--from", "start", type=_path, help="The checkpoint or bundle to begin with.")
@click.option("--data", multiple=True, type=_path, help="Tables: .jsonl, .tsv, .csv, .txt.")
@click.option("--valid", multiple=True, type=_path, help="To validate by; else a share of --data.")
@click.option("--test", multiple=True, type=_path, help="To evaluate on; else a share of --data.")
@click.option("--valid-share", type=click.FloatRange(0, 0.45), default=0.1, show_default=True)
@click.option("--test-share", type=click.FloatRange(0, 0.45), default=0.1, show_default=True)
@click.option("--out", required=True, type=_path, help="The run folder.")
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
@click.option("--epochs", type=click.FloatRange(0, min_open=True), help="Times to read the table.")
@click.option("--resume", is_flag=True, help="Go on with the run in --out.")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto")
@click.option("--max-time", type=click.FloatRange(min=0), help="Seconds of training.")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Any training setting.")
def finetune(
    kind: Kind | None,
    start: Path | None,
    data: tuple[Path, ...],
    valid: tuple[Path, ...],
    test: tuple[Path, ...],
    valid_share: float,
    test_share: float,
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
) -> None:
    """Teach a model a task from a table of examples.

    gptrt-export finetune --task classification --from models/tales --data reviews.tsv
      --column answer=label --label 1=positive --label 0=negative --out runs/reviews
    """
    from .finetune import EPOCHS, Tables, finish, plan_finetuning, task_metric
    from .hub import local_checkpoint
    from .lora import lora_config
    from .progress import ProgressBar
    from .runs import create_run, open_run
    from .train import train as run_training

    if resume:
        run = open_run(out)
        if kind or start or data or settings:
            _say(f"resuming {out}: model, data and settings are those that it was started with")
    else:
        if kind is None or start is None or not data:
            raise OptionError(
                "--task, --from and --data", found="not all of them", do="add what is missing"
            )
        tables = Tables(
            *(data, valid, test, _pairs("--column", columns), _pairs("--label", labels)),
            valid_share=valid_share,
            test_share=test_share,
        )
        plan = plan_finetuning(
            *(kind, local_checkpoint(start), tables),
            prompt=prompt,
            lora=lora_config(lora_rank, lora_alpha, lora_dropout, targets),
            class_weights=class_weights,
            epochs=epochs or EPOCHS,
            device=device,
            settings=_pairs("--set", settings),
        )
        with ProgressBar("preparing") as bar:
            run = create_run(out, plan, bar.update)
    run = run.with_limits(None, max_time)
    with _interruptible() as interrupted, ProgressBar("training") as bar:
        result = run_training(run, bar, interrupted, task_metric(run))
    if result.reason == "interrupted":
        line = _resume_line(out, "finetune")
        click.echo(f"stopped at step {result.steps}; go on with: {line}", err=True)
        sys.exit(INTERRUPTED)
    finish(run)
    found = "" if result.best_metric is None else f", {result.best_metric:.2f} by its own metric"
    click.echo(
        f"{result.steps} steps in {result.seconds:.0f} s, ended by {result.reason}; "
        f"best validation loss {result.best_loss:.4f}{found}; examples that nothing was learnt "
        f"from are in {out / 'data' / 'test.jsonl'}",
        err=True,
    )


def _pairs(option: str, words: tuple[str, ...]) -> dict[str, str]:
    for word in words:
        if "=" not in word:
            raise OptionError(f"{option} KEY=VALUE", found=word, do="add the value")
    return dict(word.split("=", 1) for word in words)


def _resume_line(out: Path, command: str = "train") -> str:
    return f"gptrt-export {command} --resume --out {out}"


@contextmanager
def _interruptible() -> Iterator[Callable[[], bool]]:
    """Ctrl-C or a polite kill asks the loop to save and stop; a second Ctrl-C stops at once."""
    asked = False

    def ask(signum: int, _frame: object) -> None:
        nonlocal asked
        if asked and signum == signal.SIGINT:
            raise KeyboardInterrupt
        asked = True

    before = {s: signal.signal(s, ask) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: asked
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


@main.command()
def presets() -> None:
    """List the presets."""
    from .presets import load_preset, preset_names

    for name in preset_names():
        click.echo(f"{name:16} {load_preset(name).about}")


@main.command()
@click.argument("checkpoint", type=_path)
@click.option("--out", required=True, type=_path, help="The bundle folder to write.")
@click.option(
    "--quantize",
    "mode",
    type=click.Choice(["none", "fp16", "int8", "int4", "int2"]),
    help="int4 if not given; int2 is for models that were trained for it.",
)
@click.option(
    "--method",
    type=click.Choice(["nearest", "k-quant", "hqq", "gptq", "learned"]),
    help="How to round: gptq, with calibration text, for 4 bits and less; nearest for 8.",
)
@click.option("--block-size", type=int, help="Weights that share a scale.")
@click.option("--head-bits", type=int, help="Bits of the vocabulary matrix.")
@click.option(
    "--symmetric/--asymmetric", default=None, help="Whether blocks have zeros of their own."
)
@click.option(
    "--bits-per-weight",
    type=click.FloatRange(min=0, min_open=True),
    help="A budget over all parameters: bits and block are chosen matrix by matrix.",
)
@click.option(
    "--target-ratio",
    type=click.FloatRange(min=1, min_open=True),
    help="A budget of perplexity: the smallest bundle within it.",
)
@click.option(
    "--via",
    type=click.Choice(["mobius", "optimum"]),
    help="The library that builds the graph, for an architecture that is not native.",
)
@click.option("--hidden-states", is_flag=True, help="Let it give embeddings of texts, too.")
@click.option("--kv-cache", type=click.Choice(["float", "int8"]), help="Numbers in the KV cache.")
@click.option("--verify-text", type=_path, help="Text to measure fidelity on.")
@click.option("--calibration-text", type=_path, help="Other text, to correct rounding errors by.")
@click.option("--window", type=int, help="Tokens in a row of either text: the context.")
@click.option("--against", type=_path, help="Another checkpoint to be compared with.")
@click.option("--max-perplexity-ratio", type=click.FloatRange(min=0), help="Fail above it.")
@click.option("--allow-loss", is_flag=True, help="Write the bundle even if fidelity fails.")
@click.option("--force", is_flag=True, help="Replace an existing bundle.")
@click.option(
    "--note", "notes", multiple=True, metavar="KEY=TEXT", help="For the card: licence=..."
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object on standard output.")
def convert(
    checkpoint: Path, out: Path, notes: tuple[str, ...], as_json: bool, **options: Any
) -> None:
    """Convert a checkpoint into a bundle that `gptrt` runs: int4 by default.

    A checkpoint is a run, a Hugging Face folder or its name on the hub, or a ckpt.pt.

    gptrt-export convert runs/nano --out bundles/nano --quantize int8
    gptrt-export convert runs/nano --out bundles/nano --bits-per-weight 4.4
    """
    from . import pipeline
    from .hub import local_checkpoint
    from .options import ConvertOptions

    checkpoint = local_checkpoint(checkpoint)
    given = {name: value for name, value in options.items() if value is not None}
    given["notes"] = _pairs("--note", notes)
    manifest = pipeline.convert(checkpoint, out, ConvertOptions(**given), _say)
    _report(pipeline.summary(out, manifest, manifest.fidelity), as_json)


@main.command()
@click.argument("bundle", type=_path)
@click.option("--against", required=True, type=_path, help="The checkpoint it was made from.")
@click.option("--text", required=True, type=_path, help="Text to compare on.")
@click.option("--max-perplexity-ratio", type=click.FloatRange(min=0), help="Fail above it.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on standard output.")
def verify(
    bundle: Path, against: Path, text: Path, max_perplexity_ratio: float | None, as_json: bool
) -> None:
    """Measure a bundle against its checkpoint, through the runtime.

    gptrt-export verify bundles/nano --against runs/nano --text input.txt
    """
    from . import pipeline
    from .hub import local_checkpoint

    manifest, fidelity = pipeline.verify(bundle, local_checkpoint(against), text, _say)
    _report(pipeline.summary(bundle, manifest, fidelity), as_json)
    pipeline.check_fidelity(fidelity, manifest.quantization.mode, max_perplexity_ratio)


def _say(line: str) -> None:
    click.echo(line, err=True)


def _report(summary: dict[str, Any], as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(summary))
    else:
        for key, value in summary.items():
            click.echo(f"{key:22} {value:.5g}" if isinstance(value, float) else f"{key:22} {value}")


@main.command()
@click.option("--preset", help="A shape and a way to train it; `presets` lists them.")
@click.option("--from", "start", type=_path, help="A checkpoint or bundle to fine-tune.")
@click.option("--data", multiple=True, type=_path, help="Text files or folders; may be repeated.")
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
    settings: tuple[str, ...],
    as_json: bool,
    **options: Any,
) -> None:
    """How much data a training wants, how long it takes and how much memory.

    The data by published scaling laws, the rest measured in a few steps of the training itself.

    gptrt-export estimate --preset gpt2-13m --data texts/ --inference-tokens 1000000000
    """
    from dataclasses import asdict

    from .estimate import Request
    from .estimate import estimate as run
    from .hub import local_checkpoint
    from .needs import describe

    changes = _pairs("--set", settings)
    start = local_checkpoint(start) if start else None
    found = run(Request(preset, start, data, settings=changes, **options))
    if as_json:
        click.echo(json.dumps(asdict(found)))
    else:
        for what, text in describe(found):
            click.echo(f"{what:18} {text}")


@main.command()
@click.argument("models", nargs=-1, required=True, type=_path, metavar="MODEL...")
@click.option("--data", required=True, type=_path, help="A table: .jsonl, .tsv, .csv, .txt.")
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
@click.option("--out", type=_path, help="Write the table into this file, too.")
def evaluate(
    models: tuple[Path, ...],
    data: Path,
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
    from .finetune import Tables, read_examples
    from .hub import local_checkpoint
    from .progress import ProgressBar

    names = _pairs("--field", columns) | ({"answer": answer} if answer else {})
    tables = Tables([data], columns=names, labels=_pairs("--label", labels))
    if out is not None and not out.parent.is_dir():
        raise TargetError(f"a folder {out.parent}", found="none", do="make it, or check --out")
    given = {name: value for name, value in options.items() if value is not None}
    with ProgressBar("evaluating") as bar:
        found = evaluation.compare(
            *([local_checkpoint(path) for path in models], data),
            lambda task: read_examples([data], task, tables),
            **given,
            progress=bar.update,
        )
    table = evaluation.as_table(found)
    if out is not None:
        out.write_text(table, encoding="utf-8")
    click.echo(json.dumps(evaluation.as_json(found)) if as_json else table, nl=as_json)
