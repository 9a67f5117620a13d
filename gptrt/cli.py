"""The command `gptrt`: generate, run, bench, perplexity, verify, info, doctor."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from gptrt import __version__
from gptrt.console import PATH, OneLineErrors, RowProgress, duration, pairs, report
from gptrt.errors import DataError

F = TypeVar("F", bound=Callable[..., Any])


def _options(*options: Callable[[F], F]) -> Callable[[F], F]:
    def decorate(function: F) -> F:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


_engine = _options(
    click.option(
        "--device",
        type=click.Choice(["auto", "cpu", "cuda"]),
        help="auto (default): CUDA where it can run the bundle, else the processor.",
    ),
    click.option("--threads", type=int, help="Of the processor; default: every core."),
)
_graphs = click.option(
    "--cuda-graphs", is_flag=True, default=None, help="On CUDA start a step's kernels at once."
)
_generation = _options(
    click.option("--max-new-tokens", type=int, help="So many ids at most; default: 256."),
    click.option("--min-new-tokens", type=int, help="No end of the text before so many."),
    click.option("--temperature", type=float, help="0 is greedy; above it, by chance."),
    click.option("--top-k", type=int, help="Draw from the K most likely."),
    click.option("--top-p", type=float, help="Draw from the most likely that reach P together."),
    click.option("--min-p", type=float, help="Draw from those P times as likely as the first."),
    click.option("--repetition-penalty", type=float, help="Above 1, repeat less."),
    click.option("--no-repeat-ngram-size", type=int, help="Never repeat so many ids in a row."),
    click.option("--stop", "stop_strings", multiple=True, help="End before this; may be repeated."),
    click.option("--num-beams", type=int, help="Search with so many beams."),
    click.option("--json-schema", type=PATH, help="Write JSON that follows the schema in a file."),
    click.option("--regex", help="Write what matches this pattern."),
    click.option("--seed", type=int, help="The same seed gives the same text."),
)
_json = click.option("--json", "as_json", is_flag=True, help="One JSON object, nothing else.")
_bundle = click.argument("bundle", type=PATH, required=False)


@click.group(name="gptrt", cls=OneLineErrors, no_args_is_help=False)
@click.version_option(__version__, prog_name="gptrt")
def main() -> None:
    """Run GPT bundles offline. Where BUNDLE is left out, the embedded one serves.

    Example: gptrt generate "Once upon a time"
    """


@main.command()
@click.argument("words", nargs=-1, required=True, metavar="[BUNDLE] PROMPT")
@_generation
@click.option("--prompt-lookup-num-tokens", type=int, help="Guess ids by the text so far.")
@click.option("--draft", type=PATH, help="A smaller bundle that guesses.")
@click.option(
    "--context-overflow",
    type=click.Choice(["stop", "slide"]),
    help="Where the context is full: stop (default), or go on from its last half.",
)
@click.option("--max-time", type=float, help="Seconds, after which no id is begun.")
@click.option("--timeout", type=float, help="Seconds, after which nothing is waited for.")
@_engine
@_graphs
@_json
def generate(words: tuple[str, ...], as_json: bool, **options: Any) -> None:
    """Continue PROMPT; `-` reads it from standard input.

    Example: gptrt generate bundles/tales "The king said" --temperature 0.8 --seed 7
    """
    from gptrt.generator import Generator

    if len(words) > 2:
        raise click.UsageError(f"Wanted [BUNDLE] PROMPT, got {len(words)} words: quote the prompt.")
    *bundle, prompt = words
    if not bundle and _is_bundle(prompt):
        raise click.UsageError(f"Wanted a prompt after the bundle {prompt}, got none.")
    names = ("device", "threads", "draft", "cuda_graphs")
    engine = _given(**{name: options.pop(name) for name in names})
    options = _for_generation(options)
    with Generator(*bundle, **engine) as generator:
        if as_json or options.get("num_beams"):  # a search has nothing to stream
            result = generator.complete(_read_prompt(prompt), **options)
            keys = ("text", "prompt_ids", "ids", "finish_reason")
            shown = {key: getattr(result, key) for key in keys}
            click.echo(json.dumps(shown) if as_json else result.text)
            return
        for piece in generator.stream(_read_prompt(prompt), **options):
            click.echo(piece, nl=False)  # flushes
    click.echo()


@main.command()
@_bundle
@click.option("--input", "source", type=PATH, required=True, help="A .jsonl, .csv, .tsv or .txt.")
@click.option("--output", type=PATH, required=True, help="A .jsonl or .csv.")
@click.option("--field", "fields", multiple=True, metavar="NAME=COLUMN", help="May be repeated.")
@click.option("--batch-size", type=int, help="Rows at a time.")
@click.option("--limit", type=int, help="Only so many rows, from the first.")
@click.option("--prefix", help="Before the names of the new columns.")
@click.option("--force", is_flag=True, help="Begin anew, and replace OUTPUT at the end.")
@_generation
@_engine
@_json
def run(
    bundle: Path | None,
    source: Path,
    output: Path,
    fields: tuple[str, ...],
    force: bool,
    batch_size: int | None,
    limit: int | None,
    prefix: str | None,
    device: Any,
    threads: int | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Ask BUNDLE about every row of a table: its task, or else to go on after the column `prompt`.

    What was ended, by Ctrl-C or kill -9, goes on where it was when the same is asked again.

    Example: gptrt run bundles/reviews --input reviews.csv --output labelled.jsonl --field text=body
    """
    from dataclasses import asdict

    from gptrt.run import Job
    from gptrt.run import run as carry_out

    given = _given(batch_size=batch_size, limit=limit, prefix=prefix)
    job = Job(source, output, pairs("--field", fields), options=_for_generation(options), **given)
    engine, progress = _given(device=device, threads=threads), RowProgress()
    try:
        done = carry_out(bundle, job, force=force, progress=progress, **engine)
    except KeyboardInterrupt:
        progress.stopped()
        raise
    finally:
        progress.clear()
    if as_json:
        report(asdict(done), as_json)
    else:
        click.echo(f"{done.rows:,} rows in {done.output} after {duration(done.seconds)}")


@main.command()
@_bundle
@click.option("--prompt-tokens", type=int, help="Length of the prompt.")
@click.option("--new-tokens", type=int, help="Ids to generate.")
@_engine
@_graphs
@_json
def bench(bundle: Path | None, as_json: bool, **options: Any) -> None:
    """Measure speed and memory on this machine.

    Example: gptrt bench bundles/tales --new-tokens 64 --threads 2
    """
    from gptrt.bench import bench as run

    report(run(bundle, **_given(**options)), as_json)


@main.command()
@click.argument("paths", nargs=-1, required=True, type=PATH, metavar="[BUNDLE] FILE")
@click.option("--stride", type=int, help="New ids a window; smaller is slower and fairer.")
@_engine
@_json
def perplexity(paths: tuple[Path, ...], stride: int | None, as_json: bool, **options: Any) -> None:
    """How well BUNDLE predicts the text in FILE.

    Example: gptrt perplexity bundles/tales test.txt --stride 256
    """
    from dataclasses import asdict

    from gptrt.generator import Generator

    if len(paths) > 2:
        raise click.UsageError(f"Wanted [BUNDLE] FILE, got {len(paths)} paths.")
    *bundle, file = paths
    with Generator(*bundle, **_given(**options)) as generator:
        report(asdict(generator.perplexity(_read_text(file), stride=stride)), as_json)


@main.command()
@_bundle
@_engine
@_json
def verify(bundle: Path | None, as_json: bool, **options: Any) -> None:
    """Check that BUNDLE is whole and that this machine computes what its exporter promised.

    Example: gptrt verify bundles/tales
    """
    from gptrt.doctor import verify as check

    report(check(bundle, **_given(**options)), as_json)


@main.command()
@_bundle
@_json
def info(bundle: Path | None, as_json: bool) -> None:
    """Show what BUNDLE is: model, quantization, fidelity, origin.

    Example: gptrt info bundles/tales
    """
    from gptrt.doctor import info as describe

    report(describe(bundle), as_json)


@main.command()
@_bundle
@_json
def doctor(bundle: Path | None, as_json: bool) -> None:
    """Show what this machine has, and where it would run BUNDLE if there is one; status 1 if
    something needed is missing.

    Example: gptrt doctor
    """
    from gptrt.doctor import diagnose

    findings = diagnose(bundle)
    if as_json:
        report({f.what: {"level": f.level, "found": f.found} for f in findings}, as_json)
    else:
        for f in findings:
            click.echo(f"{f.level:8} {f.what:16} {f.found}")
    sys.exit(any(f.level == "missing" for f in findings))


def _constraint(schema: Path | None, pattern: str | None) -> Any:
    """Of the two at most one."""
    from gptrt.constraint import JsonSchema, Regex

    if schema is not None and pattern is not None:
        raise click.UsageError("Wanted --json-schema or --regex, got both: choose one.")
    if schema is not None:
        return JsonSchema(_read_text(schema))
    return None if pattern is None else Regex(pattern)


def _for_generation(options: dict[str, Any]) -> dict[str, Any]:
    """The options of `_generation`, as the library takes them."""
    found = dict(options)
    found["stop_strings"] = found["stop_strings"] or None
    found["constraint"] = _constraint(found.pop("json_schema"), found.pop("regex"))
    return _given(**found)


def _given(**options: Any) -> dict[str, Any]:
    """Only what was given: every default is the library's own."""
    return {name: value for name, value in options.items() if value is not None}


def _is_bundle(words: str) -> bool:
    """Whether a prompt was forgotten: words may also be no path at all."""
    from gptrt.format import MANIFEST_FILE

    try:
        return (Path(words) / MANIFEST_FILE).is_file()
    except (OSError, ValueError):
        return False


def _read_prompt(prompt: str) -> str:
    if prompt != "-":
        return prompt
    if sys.stdin is None:
        raise DataError("a prompt on standard input", found="it is closed", do="give it one")
    return _decoded(sys.stdin.buffer.read(), "standard input")


def _read_text(path: Path) -> str:
    try:
        return _decoded(path.read_bytes(), str(path))
    except OSError as e:
        raise DataError(f"to read {path}", found=str(e.strerror), do="check the path") from e


def _decoded(data: bytes, source: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as e:
        raise DataError(f"UTF-8 text in {source}", found=str(e), do="convert it first") from e
