"""What each way of quantizing a checkpoint costs: perplexity, divergence, agreement, and bytes.

    python -m benchmarks.fidelity CHECKPOINT --verify-text FILE --calibration-text FILE
        [--window N] [--verify-tokens N] [--only RECIPE ...]

Every row is a bundle made by `gptrt-export convert` and measured through the runtime against the
checkpoint in fp32. `bits in all` are those of the graph and its weights for each parameter of the
model, structure, embeddings, norms and all. A run folder needs no texts. One of the embedded
default, whose weights are then those that it ships:

    gptrt-export train --from models/tales --data TRAIN --valid VALID --max-steps 0 --out RUN
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

RECIPES: dict[str, list[str]] = {
    "int8": ["--quantize", "int8"],
    "int4 (default)": [],
    "int4, no projection": ["--no-projection"],
    "int4, head int8": ["--head-bits", "8"],
    "int4, head int4": ["--head-bits", "4"],
    "int4, block 64, head int4": ["--block-size", "64", "--head-bits", "4"],
    "int4, block 128": ["--block-size", "128"],
    "int4, block 128, head int4": ["--block-size", "128", "--head-bits", "4"],
    "int4, block 128, no projection": ["--block-size", "128", "--no-projection"],
    "int4, block 128, head int4, no projection": [
        *("--block-size", "128", "--head-bits", "4", "--no-projection"),
    ],
    "int4, asymmetric": ["--asymmetric"],
    "mixed, 4.46 bits": ["--bits-per-weight", "4.46"],
    "mixed, 5 bits": ["--bits-per-weight", "5"],
    "int4, learned, block 128, head int4": [
        *("--method", "learned", "--block-size", "128", "--head-bits", "4"),
    ],
    "int4, learned, block 128, head int4, no projection": [
        *("--method", "learned", "--block-size", "128", "--head-bits", "4", "--no-projection"),
    ],
    "mixed, 4.46 bits, learned": ["--bits-per-weight", "4.46", "--method", "learned"],
    "int4, nearest": ["--method", "nearest"],
    "int4, k-quant": ["--method", "k-quant"],
    "int4, hqq": ["--method", "hqq"],
    "int2": ["--quantize", "int2"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--verify-text", type=Path)
    parser.add_argument("--calibration-text", type=Path)
    parser.add_argument("--window", type=int)
    parser.add_argument("--verify-tokens", type=int)
    parser.add_argument("--only", nargs="*", choices=list(RECIPES), default=list(RECIPES))
    args = parser.parse_args()
    texts = {
        "--verify-text": args.verify_text,
        "--calibration-text": args.calibration_text,
        "--window": args.window,
        "--verify-tokens": args.verify_tokens,
    }
    given = [str(word) for key, value in texts.items() if value for word in (key, value)]
    print(
        f"{args.checkpoint.name}; {date.today()}; torch {version('torch')}, "
        f"onnxruntime {version('onnxruntime')}\n\n"
        "| recipe | ratio | mean KL (nats) | top-1 | greedy | bits a weight | bits in all | MB |\n"
        "|---|---|---|---|---|---|---|---|",
        flush=True,
    )
    for name in args.only:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "bundle"
            try:
                found = convert(args.checkpoint, out, [*RECIPES[name], *given])
                print(row(name, found, out), flush=True)
            except subprocess.CalledProcessError as e:  # a budget that this shape cannot keep
                print(f"| {name} | {e.stderr.strip().splitlines()[-1]} |", flush=True)


def convert(checkpoint: Path, out: Path, options: list[str]) -> dict[str, Any]:
    command = [sys.executable, "-c", "from gptrt_export.cli import main; main()", "convert"]
    command += [str(checkpoint), "--out", str(out), *options, "--allow-loss", "--json"]
    done = subprocess.run(command, capture_output=True, check=True, text=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def row(name: str, found: dict[str, Any], bundle: Path) -> str:
    from gptrt_export.quantize import own_parameters

    from gptrt.format import open_bundle

    opened = open_bundle(bundle)
    weights, size = own_parameters(opened.manifest.model), opened.manifest.weights_bytes
    return (
        f"| {name} | {found['perplexity_ratio']:.4f} ± {found['ratio_error']:.4f} "
        f"| {found['kl']:.5f} | {found['top1']:.1%} "
        f"| {found['greedy']:.0%} | {found['bits_per_weight']:.2f} | {8 * size / weights:.2f} "
        f"| {size / 1e6:.1f} |"
    )


if __name__ == "__main__":
    main()
