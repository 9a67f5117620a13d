"""Training speed: tinyshakespeare at the shape of nanoGPT's CPU configuration.

    python benchmarks/tinyshakespeare.py input.txt [--set KEY=VALUE ...]

4 layers, 4 heads, 128 wide, context 64, characters, 90/10 split, no dropout. nanoGPT reaches a
validation loss of 1.874 in 117 s on a 2-core machine with AVX-512. Prints the validation loss over
the whole held-out tenth, and the wall time of the command: start of Python, tokenizer, training,
evaluation and pictures included.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path

NANOGPT_LOSS, NANOGPT_SECONDS = 1.874, 117.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", type=Path)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        settings = [part for setting in args.set for part in ("--set", setting)]
        command = [sys.executable, "-c", "from gptrt_export.cli import main; main()", "train"]
        command += ["--preset", "nano-char", "--data", str(args.text), "--out", str(run), *settings]
        began = time.perf_counter()
        subprocess.run(command, check=True)
        seconds = time.perf_counter() - began
        lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    losses = [line["valid_loss"] for line in lines if "valid_loss" in line]
    print(
        f"{date.today()}, torch {version('torch')}: validation loss {min(losses):.4f} "
        f"(nanoGPT {NANOGPT_LOSS}) in {seconds:.1f} s, {seconds / NANOGPT_SECONDS:.0%} of nanoGPT's"
    )


if __name__ == "__main__":
    main()
