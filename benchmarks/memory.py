"""Peak memory against the length of a text: what was estimated before opening, and what was taken.

    python -m benchmarks.memory WORK [--preset gpt2-124m] [--quantize int4] [--out docs/memory.png]

Every point is a process of its own that opens the bundle, continues prompts until `length` ids are
reached, and says its peak (Linux: VmHWM). Weights are random: memory does not look at them.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path

from gptrt import Generator

from .figures import canvas
from .runtime import random_bundle

_LENGTHS, _BATCHES, _NEW = (32, 128, 256, 512, 768, 1024), (1, 8), 16
_CHILD = """
import sys
from gptrt import Generator
from gptrt.machine import peak_memory
path, length, batch, new = sys.argv[1], *map(int, sys.argv[2:])
opened = Generator(path, device="cpu", threads=2)
endless = Generator.from_parts(opened.decoder, opened.tokenizer.endless())
prompts = [[(row + n * 7919) % 250 for n in range(length - new)] for row in range(batch)]
endless.complete_batch(prompts, max_new_tokens=new, batch_size=batch)
print(peak_memory())
"""


@dataclass(frozen=True)
class Point:
    """`length` ids in each of `batch` texts; bytes."""

    length: int
    batch: int
    estimated: int
    taken: int


def measure(bundle: Path, length: int, batch: int) -> Point:
    arguments = [str(bundle), *map(str, (length, batch, _NEW))]
    done = subprocess.run(
        [sys.executable, "-c", _CHILD, *arguments], check=True, capture_output=True, text=True
    )
    estimated = Generator.estimate(bundle, max_length=length, batch=batch).total
    return Point(length, batch, estimated, json.loads(done.stdout))


def draw(points: list[Point], title: str, target: Path) -> None:
    figure, (axes,) = canvas(6, 3.6, 1, 1)
    for batch, color in zip(_BATCHES, ("tab:blue", "tab:orange"), strict=True):
        own = [p for p in points if p.batch == batch]
        lengths = [p.length for p in own]
        axes.plot(lengths, [p.taken / 1e6 for p in own], "o", color=color, label=f"batch {batch}")
        axes.plot(lengths, [p.estimated / 1e6 for p in own], "--", color=color, label="estimated")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("prompt and new text, ids")
    axes.set_ylabel("peak memory of the process, MB")
    axes.set_title(title, fontsize=9)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(target, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--preset", default="gpt2-124m")
    parser.add_argument("--quantize", default="int4")
    parser.add_argument("--out", type=Path, help="a picture")
    args = parser.parse_args()
    bundle = random_bundle(args.work, args.preset, args.quantize)
    title = f"{args.preset} {args.quantize}, {date.today()}, onnxruntime {version('onnxruntime')}"
    print(f"{title}\n\n| ids | batch | estimated MB | taken MB | estimated / taken |")
    print("|---|---|---|---|---|")
    points = []
    for batch in _BATCHES:
        for length in _LENGTHS:
            point = measure(bundle, length, batch)
            points.append(point)
            mb = [bytes_ / 1e6 for bytes_ in (point.estimated, point.taken)]
            print(f"| {length} | {batch} | {mb[0]:.0f} | {mb[1]:.0f} | {mb[0] / mb[1]:.2f} |")
    if args.out:
        draw(points, title, args.out)


if __name__ == "__main__":
    main()
