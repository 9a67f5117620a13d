"""The command `gptrt`: generate, bench, perplexity, verify, info, doctor."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from gptrt.errors import DataError, GptrtError

INTERRUPTED = 130  # what a shell expects after Ctrl-C
_path = click.Path(path_type=Path)


class OneLineErrors(click.Group):
    """Errors as one line on standard error, with the exit status of their kind."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().main(*args, **kwargs | {"standalone_mode": False})
        except GptrtError as e:
            message, status = str(e), e.exit_status
        except click.ClickException as e:
            message, status = f"{e.format_message()}; see `{self.name} --help`", 2
        except (click.Abort, KeyboardInterrupt):
            message, status = "interrupted", INTERRUPTED
        except BrokenPipeError:  # the reader has gone: nobody is left to tell
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(0)
        click.echo(f"{self.name}: error: {' '.join(message.split())}", err=True)
        sys.exit(status)


@click.group(name="gptrt", cls=OneLineErrors)
@click.version_option(package_name="gptrt")
def main() -> None:
    """Run a GPT bundle offline. Without BUNDLE, the embedded default serves."""


_device = click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto")
_threads = click.option("--threads", type=int, help="Cores to use; all of them by default.")
_json = click.option("--json", "as_json", is_flag=True, help="One JSON object, nothing else.")
_bundle = click.argument("bundle", type=_path, required=False)


@main.command()
@click.argument("bundle_and_prompt", nargs=-1, required=True, metavar="[BUNDLE] PROMPT")
@click.option("--max-new-tokens", type=int)
@click.option("--temperature", type=float, help="Above 0 means sampling.")
@click.option("--top-k", type=int)
@click.option("--top-p", type=float)
@click.option("--min-p", type=float)
@click.option("--repetition-penalty", type=float)
@click.option("--stop", "stop_strings", multiple=True, help="Stop before this text; repeatable.")
@click.option("--seed", type=int)
@_device
@_threads
@_json
def generate(
    bundle_and_prompt: tuple[str, ...],
    device: Any,
    threads: int | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Continue PROMPT; "-" reads it from standard input.

    gptrt generate "Once upon a time" --temperature 0.8 --seed 7
    """
    from gptrt.config import GenerationConfig
    from gptrt.generator import Generator

    if len(bundle_and_prompt) > 2:
        raise click.UsageError("wanted [BUNDLE] PROMPT; found more: put the prompt in quotes")
    *bundle, prompt = bundle_and_prompt
    given = {name: value for name, value in options.items() if value not in (None, ())}
    config = GenerationConfig.from_options(**given)
    if prompt == "-":
        prompt = sys.stdin.read()
    with Generator(*bundle, device=device, threads=threads) as generator:
        if as_json:
            done = generator.complete(prompt, config=config)
            keys = ("text", "prompt_ids", "ids", "finish_reason")
            _print_json({key: getattr(done, key) for key in keys})
            return
        for piece in generator.stream(prompt, config=config):
            click.echo(piece, nl=False)
            sys.stdout.flush()
        click.echo()


@main.command()
@_bundle
@click.option("--prompt-tokens", type=int)
@click.option("--new-tokens", type=int)
@_threads
@_json
def bench(bundle: Path | None, as_json: bool, **options: Any) -> None:
    """Measure load, prefill and decode on this machine.

    gptrt bench --threads 2
    """
    from gptrt.bench import bench as measure

    given = {name: value for name, value in options.items() if value is not None}
    _print(asdict(measure(_or_default(bundle), **given)), as_json)


@main.command()
@click.argument("bundle", type=_path)
@click.argument("file", type=_path)
@click.option("--stride", type=int, help="New tokens a window; the context by default.")
@_device
@_threads
@_json
def perplexity(
    bundle: Path, file: Path, stride: int | None, device: Any, threads: int | None, as_json: bool
) -> None:
    """Perplexity of a text file under a bundle.

    gptrt perplexity bundles/nano input.txt
    """
    from gptrt.generator import Generator
    from gptrt.scoring import perplexity as score
    from gptrt.session import Session

    text = _read_text(file)
    with Generator(bundle, device=device, threads=threads) as generator:
        session = generator.session
        assert isinstance(session, Session)
        _print(asdict(score(session, generator.tokenizer.encode(text), stride=stride)), as_json)


@main.command()
@_bundle
@_device
@_threads
def verify(bundle: Path | None, device: Any, threads: int | None) -> None:
    """Check that the files are whole and that this machine computes what was promised.

    gptrt verify bundles/nano
    """
    from gptrt.doctor import verify as check

    manifest = check(_or_default(bundle), device=device, threads=threads)
    ids = sum(len(golden.ids) for golden in manifest.golden)
    click.echo(f"{manifest.name}: {len(manifest.files)} files whole, {ids} golden ids as promised")


@main.command()
@_bundle
def info(bundle: Path | None) -> None:
    """What a bundle is and where it comes from.

    gptrt info bundles/nano
    """
    from gptrt.doctor import describe
    from gptrt.format import open_bundle

    for key, value in describe(open_bundle(_or_default(bundle)).manifest).items():
        click.echo(f"{key:16} {value}")


@main.command()
def doctor() -> None:
    """What this machine can run, and why not.

    gptrt doctor
    """
    from gptrt.doctor import examine

    findings = examine()
    for finding in findings:
        click.echo(f"{'!' if finding.fatal else ' '} {finding.what:12} {finding.says}")
    if any(finding.fatal for finding in findings):
        sys.exit(1)


def _or_default(bundle: Path | None) -> Path:
    from gptrt.generator import default_bundle

    return default_bundle() if bundle is None else bundle


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise DataError(f"UTF-8 text in {path}", found=str(e), do="check the file") from e


def _print(values: dict[str, Any], as_json: bool) -> None:
    if as_json:
        _print_json(values)
        return
    for key, value in values.items():
        click.echo(f"{key:18} {value:,.4g}" if isinstance(value, float) else f"{key:18} {value:,}")


def _print_json(value: dict[str, Any]) -> None:
    click.echo(json.dumps(value))
