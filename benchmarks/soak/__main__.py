"""The command line: run the parts, print the table; the exit status is 1 if anything failed."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
from dataclasses import asdict
from datetime import date
from importlib.metadata import version
from pathlib import Path

from gptrt import __version__
from gptrt.engine import import_onnxruntime
from gptrt.opening import embedded_bundle

from .fuzz import damage_often
from .harness import Harness
from .kinds import kind_of
from .memory import generate_often, open_often
from .report import Report
from .storm import cancel_often
from .workload import open_generator

_TIMES = {"generations": 10_000, "opens": 1000, "cancels": 1000, "fuzz": 2000}


def main() -> None:
    """Many calls, openings, cancellations and damaged files of a bundle, or of the embedded one."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description=main.__doc__)
    parser.add_argument("bundle", nargs="?", type=Path, default=embedded_bundle())
    for name, times in _TIMES.items():
        help = f"how many, {times} if not given, 0 to leave this part out"
        parser.add_argument(f"--{name}", type=_count, default=times, help=help)
    parser.add_argument("--json", type=Path, help="write all figures here")
    parser.add_argument("--case", type=int, help="only this seed's damaged file, in this process")
    args = parser.parse_args()
    if args.case is not None:
        _run_case(args.bundle, args.case)
        return
    opened = open_generator(args.bundle)
    report = Report(
        date=str(date.today()),
        machine=f"{platform.platform()}, {os.cpu_count()} cores",
        versions=_versions(),
        bundle=args.bundle.name,
        generations=generate_often(opened, args.generations) if args.generations else None,
        opens=open_often(args.bundle, args.opens) if args.opens else None,
        cancels=cancel_often(opened, args.cancels) if args.cancels else None,
        fuzz=damage_often(args.bundle, args.fuzz) if args.fuzz else None,
    )
    print(report.table())
    if args.json:
        args.json.write_text(json.dumps(asdict(report), indent=1) + "\n")
    sys.exit(1 if report.failed else 0)


def _count(text: str) -> int:
    if (count := int(text)) < 0:
        raise ValueError
    return count


def _run_case(bundle: Path, seed: int) -> None:
    """A finding again, where it can be looked at: a crash is one of this process."""
    print(f"{kind_of(seed)}:")
    with tempfile.TemporaryDirectory() as folder:
        outcome = Harness(bundle, Path(folder)).outcome(seed)
    print(f"{outcome.result} {outcome.what}")


def _versions() -> dict[str, str]:
    found = {"gptrt": __version__, "Python": platform.python_version()}
    found |= {"onnxruntime": import_onnxruntime().__version__}
    return found | {name: version(name) for name in ("numpy", "tokenizers")}


if __name__ == "__main__":
    main()
