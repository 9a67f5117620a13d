"""The command `gptrt-export`: train, fine-tune, convert, verify, evaluate, estimate."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import click

from gptrt.console import PATH, OneLineErrors, pairs, report

from . import cli_tasks
from .console import say
from .settings import Method, Mode, Via

_TOKENS = "Of it, to measure on: 16,384; more tell smaller losses from chance."
_projection = click.option(
    "--projection/--no-projection",
    default=None,
    help="Whether the vocabulary has a basis of its own, in which few bits lose less.",
)
_limit = click.option(
    "--max-perplexity-ratio",
    type=click.FloatRange(min=0, min_open=True),
    help="Fail above it.",
)


@click.group(name="gptrt-export", cls=OneLineErrors)
def main() -> None:
    """Train or fine-tune a GPT and turn it into a quantized, verified bundle."""


for _command in (cli_tasks.finetune, cli_tasks.evaluate, cli_tasks.estimate):
    main.add_command(_command)


@main.command()
@click.option("--preset", help="A shape and a way to train it, by name or in a .json.")
@click.option("--data", multiple=True, type=PATH, help="Text files or folders; may be repeated.")
@click.option("--valid", multiple=True, type=PATH, help="Validation text; else a share of --data.")
@click.option("--out", required=True, type=PATH, help="The run folder.")
@click.option("--from", "start", type=PATH, help="Fine-tune this checkpoint or bundle.")
@click.option("--tokenizer", type=PATH, help="tokenizer.json, or a folder with GPT-2's files.")
@click.option(
    "--resume", is_flag=True, help="Go on with the run in --out; its limits and device may change."
)
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto")
@click.option("--max-steps", type=click.IntRange(min=0))
@click.option("--max-time", type=click.FloatRange(min=0), help="Seconds of training.")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Any training setting.")
@click.option(
    "--quantize",
    "mode",
    type=click.Choice(get_args(Mode)),
    help="Train through the rounding of such a bundle.",
)
@click.option("--block-size", type=int, help="Weights that share a scale, with --quantize.")
@click.option("--head-bits", type=int, help="Bits of the vocabulary matrix.")
@click.option(
    "--bits-per-weight",
    type=float,
    help="A budget over all parameters, with --quantize: it gives the most frequent tokens more "
    "bits, and the rarest fewer.",
)
@_projection
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
    bits_per_weight: float | None,
    projection: bool | None,
    distill: float | None,
) -> None:
    """Train from scratch, fine-tune, or go on where a run stopped.

    \b
    gptrt-export train --preset nano-char --data input.txt --out runs/nano
    gptrt-export train --from models/tales --data texts/ --quantize int4 --out runs/int4
    """
    from .hub import local_checkpoint
    from .new_run import create_run
    from .progress import ProgressBar
    from .start import plan_run, recipe_to_train
    from .training import resumed, train_to_end

    if resume:
        train_to_end(resumed(out, device, max_steps, max_time))
        return
    texts, held_out, changes = list(data), list(valid), pairs("--set", settings)
    own = {"max_steps": max_steps, "max_time": max_time, "distill": distill}
    changes |= {name: str(value) for name, value in own.items() if value is not None}
    recipe = recipe_to_train(mode, block_size, head_bits, projection, bits_per_weight)
    if preset and start:
        say("--from brings shape, tokenizer and ways of its own: nothing of the preset is taken")
    start = local_checkpoint(start) if start else None
    plan = plan_run(preset, start, texts, held_out, device, changes, tokenizer, recipe)
    with ProgressBar("preparing") as bar:
        run = create_run(out, plan, bar.update)
    train_to_end(run)


@main.command()
@click.argument("name", required=False)
def presets(name: str | None) -> None:
    """List the presets, or print one, to begin a .json of your own with.

    gptrt-export presets nano-char > mine.json
    """
    from .presets import load_preset, preset_file, preset_names

    if name is not None:
        click.echo(preset_file(name).read_text("utf-8"), nl=False)
        return
    for each in preset_names():
        click.echo(f"{each:16} {load_preset(each).about}")


@main.command()
@click.argument("checkpoint", type=PATH)
@click.option("--out", required=True, type=PATH, help="The bundle folder to write.")
@click.option(
    "--quantize",
    "mode",
    type=click.Choice(["none", "fp16", *get_args(Mode)]),
    help="int4, or what the model was trained for, if not given.",
)
@click.option(
    "--method",
    type=click.Choice(get_args(Method)),
    help="How to round: gptq, with calibration text, for 4 bits and less; nearest for 8.",
)
@click.option("--block-size", type=int, help="Weights that share a scale.")
@click.option("--head-bits", type=int, help="Bits of the vocabulary matrix.")
@click.option(
    "--symmetric/--asymmetric", default=None, help="Whether blocks have zeros of their own."
)
@_projection
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
    type=click.Choice(get_args(Via)),
    help="The library that builds the graph, for an architecture that is not native.",
)
@click.option(
    "--activations",
    type=click.Choice(["fp32", "fp16"]),
    help="Numbers between the matrices: fp16 for a bundle that CUDA runs.",
)
@click.option("--hidden-states", is_flag=True, help="Let it give embeddings of texts, too.")
@click.option("--kv-cache", type=click.Choice(["float", "int8"]), help="Numbers in the KV cache.")
@click.option("--verify-text", type=PATH, help="Text to measure fidelity on.")
@click.option("--verify-tokens", type=click.IntRange(min=2), help=_TOKENS)
@click.option("--calibration-text", type=PATH, help="Other text, to correct rounding errors by.")
@click.option("--window", type=int, help="Tokens in a row of either text, at most the context.")
@click.option("--against", type=PATH, help="Another checkpoint to be compared with.")
@_limit
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

    A checkpoint is a run, a Hugging Face folder or its name on the hub, a GGUF file, or a ckpt.pt.

    \b
    gptrt-export convert runs/nano --out bundles/nano --quantize int8
    gptrt-export convert runs/nano --out bundles/nano --bits-per-weight 4.4
    """
    from . import pipeline
    from .hub import local_checkpoint
    from .options import ConvertOptions

    checkpoint = local_checkpoint(checkpoint)
    given = {name: value for name, value in options.items() if value is not None}
    given["notes"] = pairs("--note", notes)
    if "against" in given:
        given["against"] = local_checkpoint(given["against"])
    manifest = pipeline.convert(checkpoint, out, ConvertOptions(**given), say)
    report(pipeline.summary(out, manifest, manifest.fidelity), as_json)


@main.command()
@click.argument("bundle", type=PATH)
@click.option("--against", required=True, type=PATH, help="The checkpoint it was made from.")
@click.option("--text", type=PATH, help="Text to compare on; a run brings its own.")
@click.option("--verify-tokens", type=click.IntRange(min=2), help=_TOKENS)
@click.option("--window", type=int, help="Tokens in a row of it: as when the bundle was made.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu")
@_limit
@click.option("--json", "as_json", is_flag=True, help="One JSON object on standard output.")
def verify(
    bundle: Path,
    against: Path,
    text: Path | None,
    verify_tokens: int | None,
    window: int | None,
    device: Any,
    max_perplexity_ratio: float | None,
    as_json: bool,
) -> None:
    """Measure a bundle against its checkpoint, through the runtime.

    gptrt-export verify bundles/nano --against runs/nano
    gptrt-export verify bundles/gpt2 --against openai-community/gpt2 --text input.txt
    """
    from . import pipeline
    from .hub import local_checkpoint
    from .options import check_above

    check_above("--max-perplexity-ratio", max_perplexity_ratio, 0)
    against = local_checkpoint(against)
    manifest, fidelity = pipeline.verify(
        *(bundle, against, text, say), tokens=verify_tokens, window=window, device=device
    )
    report(pipeline.summary(bundle, manifest, fidelity), as_json)
    pipeline.check_fidelity(fidelity, manifest.quantization, max_perplexity_ratio)
