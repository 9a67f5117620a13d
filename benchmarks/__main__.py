"""gptrt beside its peers: the same weights, the same threads, one run.

    python -m benchmarks install --envs ENVS     # optional: an environment for every peer
    python -m benchmarks run --envs ENVS --out RESULTS
    python -m benchmarks perplexity MODEL --text FILE --calibration-text FILE --out MORE
    python -m benchmarks draw RESULTS MORE --out TOGETHER

Peers that are not installed are left out, by name. `--measures`, `--only` and `--rounds` split a
long run into parts, of which `draw` makes one report.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import click

from . import figures, report, texts
from .models import Checkpoint, Workshop, random_checkpoint, read_checkpoint
from .peers import OURS, PEERS, Kind, Peer
from .processes import Environments
from .results import RESULTS_FILE, Results, load
from .suite import CURVES, TABLE, Run

_MEASURES = (*TABLE, *CURVES, "size")
_ONLY = "Of these alone, with commas: peers, or a peer's kinds, like 'llama.cpp Q4_0'."
_path = click.Path(path_type=Path)


@click.group()
def main() -> None:
    """gptrt beside its peers."""


def _common(command: Callable[..., None]) -> Callable[..., None]:
    """Options of everything that measures."""
    for option in (
        click.option("--out", required=True, type=_path, help="The folder for the results."),
        click.option("--envs", type=_path, help="Environments of the peers, made by `install`."),
        click.option("--work", type=_path, help="Keep models here (default: OUT/work)."),
        click.option("--only", default="", help=_ONLY),
        click.option("--threads", default=2, show_default=True),
    ):
        command = option(command)
    return command


@main.command()
@click.option("--envs", required=True, type=_path, help="The folder for the environments.")
@click.option("--only", default="", help=_ONLY)
def install(envs: Path, only: str) -> None:
    """Make an environment with pip for every peer: their pins exclude each other."""
    for peer in {peer.name: peer for peer, _ in _selected(only)}.values():
        if peer is not OURS:
            click.echo(f"installing {peer.name}", err=True)
            Environments(envs).install(peer)


@main.command()
@_common
@click.option("--shapes", default="gpt2-124m,llama-135m", help="Presets: the tables.")
@click.option("--sizes", default="gpt2-7m,gpt2-13m,gpt2-355m", help="More: the curve of sizes.")
@click.option("--measures", default=",".join(_MEASURES), show_default=True)
@click.option("--rounds", default=5, show_default=True)
def run(shapes: str, sizes: str, measures: str, rounds: int, **common: Any) -> None:
    """Measure speed and memory, on random weights: tables of `shapes`, curves of the first."""
    asked = measures.split(",")
    if unknown := set(asked) - set(_MEASURES):
        raise click.BadParameter(f"{', '.join(unknown)}: choose from {', '.join(_MEASURES)}")
    job = _Job.open(**common)
    bench = Run(job.workshop, rounds)
    first, *others = (random_checkpoint(name, job.workshop.work) for name in shapes.split(","))
    curved = [(peer, kind) for peer, kind in job.kinds if kind.curves]
    tables = [m for m in TABLE if m in asked]
    if tables:
        for checkpoint in (first, *others):
            job.stage(bench, checkpoint, job.kinds, tables)
    if curves := [m for m in CURVES if m in asked]:
        job.stage(bench, first, curved, curves)
    if "size" in asked:
        more = [random_checkpoint(name, job.workshop.work) for name in sizes.split(",")]
        for checkpoint in more if "decode" in tables else [first, *more]:
            job.stage(bench, checkpoint, curved, ["decode"])
    job.finish(bench)


@main.command()
@_common
@click.argument("checkpoint", type=_path)
@click.option("--text", type=_path, multiple=True, required=True, help="A file; may be repeated.")
@click.option(
    "--calibration-text", type=_path, required=True, help="Other text, for those that round by it."
)
@click.option("--window", default=256, show_default=True, help="Tokens predicted in one window.")
@click.option("--windows", default=160, show_default=True, help="How many of them.")
def perplexity(
    checkpoint: Path,
    text: tuple[Path, ...],
    calibration_text: Path,
    window: int,
    windows: int,
    **common: Any,
) -> None:
    """Perplexity of a trained CHECKPOINT, a Hugging Face folder, in everyone's formats."""
    job = _Job.open(**common)
    source = read_checkpoint(checkpoint.name, checkpoint)
    rows = texts.write_windows(source, text, window, windows, job.workshop.work)
    kinds = [(peer, kind) for peer, kind in job.kinds if kind.scores and not kind.borrows]
    bench = Run(job.workshop, rounds=1)
    calibration: dict[str, dict[str, Any]] = {
        OURS.adapter: {"calibration-text": str(calibration_text.resolve()), "window": window}
    }
    for adapter in {peer.adapter for peer, kind in kinds if kind.build.get("imatrix")}:
        found = texts.write_importance(source, calibration_text, window, job.workshop.work)
        calibration[adapter] = {"importance": str(found)}
    bench.perplexity(list(job.workshop.candidates(source, kinds, calibration)), source, rows)
    job.seen[source.name] = source.parameters
    job.finish(bench)


@main.command()
@click.argument("parts", type=_path, nargs=-1, required=True)
@click.option("--out", required=True, type=_path, help="The folder for report and pictures.")
@click.option("--readme", type=_path, help="A file to put the first table into, at its marks.")
def draw(parts: tuple[Path, ...], out: Path, readme: Path | None) -> None:
    """One report and its pictures from the folders of earlier runs."""
    try:
        results = load([part / RESULTS_FILE for part in parts])
    except ValueError as e:
        raise click.UsageError(str(e)) from e
    out.mkdir(parents=True, exist_ok=True)
    _write(results, out)
    if readme:
        readme.write_text(report.into_readme(results, readme.read_text()))


@dataclass
class _Job:
    """What a command is to do, where, and what it had to leave out."""

    out: Path
    workshop: Workshop
    kinds: list[tuple[Peer, Kind]]
    versions: dict[str, dict[str, str]]  # by peer and package
    skipped: list[str]
    seen: dict[str, int] = field(default_factory=dict)  # parameters of the shapes

    @classmethod
    def open(cls, out: Path, envs: Path | None, work: Path | None, only: str, threads: int) -> _Job:
        skipped: list[str] = []

        def say(line: str) -> None:
            click.echo(line, err=True)
            if "left out" in line:
                skipped.append(line)

        workshop = Workshop(work or out / "work", Environments(envs), threads, say)
        for folder in (out, workshop.work):
            folder.mkdir(parents=True, exist_ok=True)
        versions: dict[str, dict[str, str]] = {}
        kinds = _selected(only)
        for peer in {peer.name: peer for peer, _ in kinds}.values():
            found = workshop.environments.versions(peer)
            if found is None:
                say(f"{peer.name} is left out: pip install {' '.join(peer.needs)}")
            else:
                versions[peer.name] = found
        kinds = [(peer, kind) for peer, kind in kinds if peer.name in versions]
        return cls(out, workshop, kinds, versions, skipped)

    def stage(
        self, bench: Run, checkpoint: Checkpoint, kinds: list[tuple[Peer, Kind]], asked: list[str]
    ) -> None:
        self.seen[checkpoint.name] = checkpoint.parameters
        fast = [(peer, kind) for peer, kind in kinds if kind.speed]
        bench.stage(checkpoint, list(self.workshop.candidates(checkpoint, fast)), asked)
        self.results(bench).save(self.out / RESULTS_FILE)  # so that nothing is lost

    def results(self, bench: Run) -> Results:
        return Results(
            date=str(date.today()),
            machine=_processor(),
            threads=self.workshop.threads,
            versions=self.versions,
            skipped=list(dict.fromkeys(self.skipped)),
            parameters=self.seen,
            entries=bench.entries,
            samples=bench.samples,
        )

    def finish(self, bench: Run) -> None:
        results = self.results(bench)
        results.save(self.out / RESULTS_FILE)
        _write(results, self.out)


def _selected(only: str) -> list[tuple[Peer, Kind]]:
    """The kinds named, by themselves or by their peer; of ours all, unless some are named."""
    everything = [(peer, kind) for peer in PEERS for kind in peer.kinds]
    known = {p.name for p in PEERS} | {f"{p.name} {k.name}" for p, k in everything}
    wanted = {name.strip() for name in only.split(",") if name.strip()} or {p.name for p in PEERS}
    if unknown := wanted - known:
        raise click.BadParameter(f"{', '.join(unknown)}: choose from {', '.join(sorted(known))}")
    if not any(name.startswith(f"{OURS.name} ") for name in wanted):
        wanted.add(OURS.name)
    return [(p, k) for p, k in everything if wanted & {p.name, f"{p.name} {k.name}"}]


def _write(results: Results, out: Path) -> None:
    text = report.report(results)
    (out / "results.md").write_text(text)
    if results.shapes("decode"):
        figures.draw_bars(results, out / "bars.png")
    figures.draw_curves(results, out / "curves.png")
    click.echo(text)


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


if __name__ == "__main__":
    main()
