"""A GPT-2 of 1.5 billion parameters, random weights: what converting and running it takes.

    python -m benchmarks.large WORK [--modes none int8]

Each conversion and each run is a process of its own, so that its peak of memory is its own. WORK
needs 15 GB of room; the checkpoint stays there.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

_PRESET = "gpt2-1.5b"
_PROMPT, _NEW, _VERIFY_TOKENS, _WINDOW = 64, 32, 256, 64

_CONVERT = """
import json, sys, time
from pathlib import Path
from gptrt.machine import peak_memory
from gptrt_export.options import ConvertOptions
from gptrt_export.pipeline import convert
source, out, text, mode, tokens, window = sys.argv[1:]
options = ConvertOptions(
    mode, method=None if mode == "none" else "nearest", verify_text=Path(text),
    verify_tokens=int(tokens), window=int(window), force=True,
)
began = time.perf_counter()
manifest = convert(Path(source), Path(out), options, lambda line: print(line, file=sys.stderr))
print(json.dumps({
    "seconds": time.perf_counter() - began,
    "peak": peak_memory(),
    "ratio": manifest.fidelity.perplexity_ratio,
}))
"""
_RUN = """
import json, sys, time
from gptrt import Generator
from gptrt.machine import peak_memory
began = time.perf_counter()
opened = Generator(sys.argv[1], device="cpu")
loaded = time.perf_counter()
ids, stamps = list(range(5, 5 + int(sys.argv[2]))), []
generator = Generator.from_parts(opened.decoder, opened.tokenizer.endless())
for _ in generator.tokens(ids, max_new_tokens=int(sys.argv[3])):
    stamps.append(time.perf_counter())
print(json.dumps({
    "load": loaded - began,
    "decode": (len(stamps) - 1) / (stamps[-1] - stamps[0]),
    "peak": peak_memory(),
}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--modes", nargs="*", default=["none", "int8"])
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    source, text = args.work / _PRESET / "checkpoint", args.work / "text.txt"
    text.write_text("".join(chr(97 + i * i % 26) for i in range(4 * _VERIFY_TOKENS)))
    if not source.is_dir():
        subprocess.run(_python("-c", _MAKE, args.work, _PRESET), check=True)
    print(
        f"GPT-2 1.5B, random weights; {date.today()}; torch {version('torch')}, onnxruntime "
        f"{version('onnxruntime')}\n\n| | conversion s | its peak GB | ratio | weights GB | load s "
        "| decode tok/s | peak GB |\n|---|---|---|---|---|---|---|---|"
    )
    for mode in args.modes:
        out = args.work / mode
        limits = (str(_VERIFY_TOKENS), str(_WINDOW))
        made = _json(_python("-c", _CONVERT, source, out, text, mode, *limits))
        found = _json(_python("-c", _RUN, out, str(_PROMPT), str(_NEW)))
        size = sum(f.stat().st_size for f in out.glob("model.onnx*"))
        print(
            f"| {mode} | {made['seconds']:.0f} | {made['peak'] / 1e9:.1f} | {made['ratio']:.4f} "
            f"| {size / 1e9:.2f} | {found['load']:.1f} | {found['decode']:.2f} "
            f"| {found['peak'] / 1e9:.1f} |",
            flush=True,
        )


_MAKE = """
import sys
from pathlib import Path
from benchmarks.models import random_checkpoint
random_checkpoint(sys.argv[2], Path(sys.argv[1]))
"""


def _python(*arguments: object) -> list[str]:
    return [sys.executable, *map(str, arguments)]


def _json(command: list[str]) -> dict[str, Any]:
    began = time.perf_counter()
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    print(f"{time.perf_counter() - began:.0f} s", file=sys.stderr)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


if __name__ == "__main__":
    main()
