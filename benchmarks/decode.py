"""Decode speed of gptrt beside llama.cpp: the same GPT-2 weights, the same threads, one run.

    pip install llama-cpp-python gguf          # the peer; without it gptrt is measured alone
    python benchmarks/decode.py --preset gpt2-124m --threads 2

Weights are random (speed does not look at them). Each runtime lives in a process of its own and
waits while the other one measures; rounds are interleaved, medians and extremes are printed.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

PAIRS = (
    ("gptrt int4", "llama.cpp Q4_0"),
    ("gptrt int4, head int4", "llama.cpp Q4_0"),
    ("gptrt int8", "llama.cpp Q8_0"),
)


@dataclass(frozen=True)
class Peer:
    """One runtime with one file of weights: `worker` is the code of its process."""

    name: str
    worker: str
    path: Path

    @property
    def bytes(self) -> int:
        files = [self.path] if self.path.is_file() else list(self.path.glob("model.onnx*"))
        return sum(file.stat().st_size for file in files)


# Each worker prints "ready", then for every line it reads decodes and prints tokens/s.
_GPTRT = """
import sys, time
from gptrt import Generator
path, threads, prompt, new = sys.argv[1], *map(int, sys.argv[2:])
gen = Generator(path, device="cpu", threads=threads)
gen.tokenizer = gen.tokenizer.endless()
print("ready", flush=True)
for line in sys.stdin:
    ids = gen.tokens([1 + i % 900 for i in range(prompt)], max_new_tokens=new + 1)
    next(ids)
    began = time.perf_counter()
    count = sum(1 for _ in ids)
    print(count / (time.perf_counter() - began), flush=True)
"""
# llama.cpp's C interface, as its Python classes copy all logits at every token.
_LLAMA = """
import ctypes, sys, time
import llama_cpp as ll
import numpy as np
path, threads, prompt, new = sys.argv[1], *map(int, sys.argv[2:])
llm = ll.Llama(path, n_ctx=1024, n_threads=threads, n_threads_batch=threads, verbose=False)
context, size = llm.ctx, llm.n_vocab()
def step(ids):
    tokens = (ll.llama_token * len(ids))(*ids)
    assert ll.llama_decode(context, ll.llama_batch_get_one(tokens, len(ids))) == 0
    return int(np.ctypeslib.as_array(ll.llama_get_logits_ith(context, -1), (size,)).argmax())
print("ready", flush=True)
for line in sys.stdin:
    ll.llama_memory_clear(ll.llama_get_memory(context), True)
    token = step([1 + i % 900 for i in range(prompt)])
    began = time.perf_counter()
    for _ in range(new):
        token = step([token])
    print(new / (time.perf_counter() - began), flush=True)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="gpt2-124m")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--work", type=Path, help="Keep the weights here for the next run.")
    parser.add_argument("--json", type=Path, help="Write the results here.")
    parser.add_argument("--plot", type=Path, help="Draw them here, as PNG.")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = args.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        peers = prepare(args.preset, work)
        settings = (args.threads, args.prompt_tokens, args.new_tokens)
        speeds = interleave(peers, settings, args.rounds)
        results = {
            "preset": args.preset,
            "date": str(date.today()),
            "machine": _processor(),
            "versions": _versions(),
            "settings": settings,
            "peers": [{"name": p.name, "bytes": p.bytes, "speeds": speeds[p.name]} for p in peers],
        }
    print(report(results))
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")
    if args.plot:
        plot(results, args.plot)


def prepare(preset: str, work: Path) -> list[Peer]:
    """Bundles of ours and GGUF files of llama.cpp, made from one random checkpoint."""
    from gptrt_export import checkpoint as ck
    from gptrt_export.model import GPT
    from gptrt_export.pipeline import ConvertOptions, convert
    from gptrt_export.presets import load_preset

    source, text = work / "checkpoint", work / "text.txt"
    text.write_text("It was the best of times, it was the worst of times.\n" * 40)
    if not source.exists():
        config = load_preset(preset).model
        tokenizer = numbered_tokenizer(config.vocab_size)
        model = ck.Checkpoint(config, GPT(config).state_dict(), tokenizer, {"source": "random"})
        ck.save_checkpoint(model, source)
    peers = []
    recipes: tuple[tuple[str, ConvertOptions], ...] = (
        ("gptrt int4", ConvertOptions("int4")),
        ("gptrt int4, head int4", ConvertOptions("int4", head_bits=4)),
        ("gptrt int8", ConvertOptions("int8")),
    )
    for name, options in recipes:
        out = work / name.replace(" ", "-")
        if not out.exists():
            quick = replace(options, verify_text=text, verify_tokens=64, allow_loss=True)
            convert(source, out, quick)
        peers.append(Peer(name, _GPTRT, out))
    if find_spec("llama_cpp") and find_spec("gguf"):
        import gguf_gpt2

        for kind in ("Q4_0", "Q8_0"):
            path = work / f"llama-{kind}.gguf"
            if not path.exists():
                gguf_gpt2.write(source, path, kind)
            peers.append(Peer(f"llama.cpp {kind}", _LLAMA, path))
    else:
        print("llama.cpp is left out: pip install llama-cpp-python gguf", file=sys.stderr)
    return peers


def numbered_tokenizer(size: int) -> object:
    """A byte-level tokenizer padded to `size`: speed needs a vocabulary, not a language."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = alphabet + [f"<{i}>" for i in range(len(alphabet), size)]
    tokenizer = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def interleave(
    peers: list[Peer], settings: tuple[int, int, int], rounds: int
) -> dict[str, list[float]]:
    """Tokens/s of every peer in every round, after one round to warm up."""
    asks = [_start(peer, settings) for peer in peers]
    for ask in asks:
        ask()
    speeds: dict[str, list[float]] = {peer.name: [] for peer in peers}
    for _ in range(rounds):
        for peer, ask in zip(peers, asks, strict=True):
            speeds[peer.name].append(ask())
    return speeds


def _start(peer: Peer, settings: tuple[int, int, int]) -> Callable[[], float]:
    command = [sys.executable, "-c", peer.worker, str(peer.path), *map(str, settings)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin and process.stdout
    stdin, stdout = process.stdin, process.stdout
    if stdout.readline().strip() != "ready":
        sys.exit(f"{peer.name} did not start")

    def ask() -> float:
        stdin.write("go\n")
        stdin.flush()
        return float(stdout.readline())

    return ask


def report(results: dict[str, Any]) -> str:
    """A Markdown table, and how ours compare with theirs round by round."""
    threads, prompt, new = results["settings"]
    lines = [
        f"{results['preset']} shape, random weights, batch 1, {threads} threads, "
        f"{prompt} + {new} tokens; {results['machine']}; {results['date']}; {results['versions']}; "
        f"medians of {len(results['peers'][0]['speeds'])} interleaved rounds.",
        "",
        "| runtime | decode tok/s | lowest to highest | weights MB |",
        "|---|---|---|---|",
    ]
    for peer in results["peers"]:
        values = peer["speeds"]
        spread = f"{min(values):.0f} to {max(values):.0f}"
        size = f"{peer['bytes'] / 1e6:.1f}"
        lines.append(f"| {peer['name']} | {median(values):.0f} | {spread} | {size} |")
    speeds = {peer["name"]: peer["speeds"] for peer in results["peers"]}
    for ours, theirs in PAIRS:
        if theirs in speeds:
            ratio = median(x / y for x, y in zip(speeds[ours], speeds[theirs], strict=True))
            lines += ["", f"{ours} / {theirs}: {ratio:.2f}, the median over rounds."]
    return "\n".join(lines)


def plot(results: dict[str, Any], target: Path) -> None:
    """Bars of the medians, with the lowest and the highest round."""
    from gptrt_export.plots import new_figure

    figure, axes = new_figure()
    peers = results["peers"][::-1]
    medians = [median(peer["speeds"]) for peer in peers]
    low = [m - min(peer["speeds"]) for m, peer in zip(medians, peers, strict=True)]
    high = [max(peer["speeds"]) - m for m, peer in zip(medians, peers, strict=True)]
    colors = ["tab:blue" if peer["name"].startswith("gptrt") else "0.7" for peer in peers]
    bars = axes.barh([p["name"] for p in peers], medians, xerr=[low, high], color=colors)
    axes.bar_label(bars, [f"{m:.0f} " for m in medians], label_type="center", color="white")
    axes.set_xlabel(
        f"decode, tokens/s ({results['preset']} shape, {results['settings'][0]} threads)"
    )
    axes.spines[["top", "right"]].set_visible(False)
    figure.set_size_inches(7, 2.6)
    figure.savefig(target, dpi=110)


def _versions() -> str:
    found = []
    for name in ("gptrt", "onnxruntime", "llama-cpp-python"):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found)


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


if __name__ == "__main__":
    main()
