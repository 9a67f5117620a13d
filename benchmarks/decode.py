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
from dataclasses import dataclass
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from statistics import median

ROOT = Path(__file__).parents[1]


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
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = args.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        peers = prepare(args.preset, work)
        settings = (args.threads, args.prompt_tokens, args.new_tokens)
        speeds = interleave(peers, settings, args.rounds)
    report(args.preset, peers, speeds, settings)


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
    for mode in ("int4", "int8"):
        out = work / f"gptrt-{mode}"
        if not out.exists():
            options = ConvertOptions(mode, verify_text=text, verify_tokens=64, allow_loss=True)
            convert(source, out, options)
        peers.append(Peer(f"gptrt {mode} block 128", _GPTRT, out))
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


def report(
    preset: str, peers: list[Peer], speeds: dict[str, list[float]], settings: tuple[int, int, int]
) -> None:
    threads, prompt, new = settings
    print(f"\n{preset}, batch 1, {threads} threads, {prompt} + {new} tokens, {date.today()}, ")
    print(f"{_processor()}, {_versions()}\n")
    print("| runtime | decode tok/s, median | lowest to highest | weights MB |\n|---|---|---|---|")
    for peer in peers:
        values = speeds[peer.name]
        spread = f"{min(values):.0f} to {max(values):.0f}"
        print(f"| {peer.name} | {median(values):.0f} | {spread} | {peer.bytes / 1e6:.1f} |")
    for ours, theirs in (("int4", "Q4_0"), ("int8", "Q8_0")):
        a, b = f"gptrt {ours} block 128", f"llama.cpp {theirs}"
        if b in speeds:
            ratio = median(x / y for x, y in zip(speeds[a], speeds[b], strict=True))
            print(f"\n{a} / {b}: {ratio:.2f} (median of paired rounds)")
    print("\n" + json.dumps({"preset": preset, "speeds": speeds}))


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
