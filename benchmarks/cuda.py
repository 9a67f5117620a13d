"""Decoding on a card: gptrt in several kinds, onnxruntime-genai on the same bundles, and
transformers with its static cache, compiled.

    python -m benchmarks.cuda WORK [--preset gpt2-124m] [--batches 1 8 64 256] [--peers NAME ...]

Weights are random: speed does not look at them. Each way continues prompts of 32 ids greedily. With
gptrt logits are on the processor at every step, as applications get them; the others choose on the
card. Interleaved rounds in one process, medians. The limit is what copies within the card's memory
reach; a step reads all weights once.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from gptrt.decoder import Decoder
from gptrt.format import open_bundle

from .models import Checkpoint, random_checkpoint
from .peers.gptrt import build

_PROMPT, _NEW, _ROUNDS = 32, 128, 3
_KINDS: dict[str, dict[str, Any]] = {
    "fp16": {"quantize": "fp16"},
    "int8": {"quantize": "int8", "activations": "fp16"},
    "int4": {"quantize": "int4", "activations": "fp16", "block-size": 128},
}

_PACKAGES = {"onnxruntime-genai": "onnxruntime-genai-cuda"}
_PEERS = ("onnxruntime-genai", "transformers")

Seconds = Callable[[], float]


@dataclass(frozen=True)
class Way:
    """One way to decode a batch: `run` gives the seconds of a step; `weights` in bytes."""

    name: str
    weights: int
    run: Seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--preset", default="gpt2-124m")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 64, 256])
    parser.add_argument("--kinds", nargs="+", choices=list(_KINDS), default=list(_KINDS))
    parser.add_argument("--peers", nargs="*", choices=_PEERS, default=list(_PEERS))
    given = parser.parse_args()
    checkpoint = random_checkpoint(given.preset, given.work)
    decoders = {}
    for kind in given.kinds:
        bundle = open_bundle(_bundle(checkpoint, given.work, kind))
        for graphs in (False, True):
            name = f"gptrt {kind}{', CUDA graphs' if graphs else ''}"
            decoder = Decoder(bundle, device="cuda", cuda_graphs=graphs)
            decoders[name] = (decoder, bundle.manifest.weights_bytes)
    limit = next(iter(decoders.values()))[0].engine.bandwidth()
    assert limit is not None
    model = _transformers(checkpoint) if "transformers" in given.peers else None
    names = ["gptrt", "onnxruntime-gpu"]
    names += [_PACKAGES.get(peer, peer) for peer in given.peers]
    versions = ", ".join(f"{name} {version(name)}" for name in names)
    print(f"{given.preset}, {date.today()}, {versions}; copies at {limit / 1e9:,.0f} GB/s\n")
    print("| batch | | tok/s | ms a step | of the limit |\n|---|---|---|---|---|", flush=True)
    for batch in given.batches:
        ways = [
            Way(name, weights, _gptrt(decoder, batch))
            for name, (decoder, weights) in decoders.items()
        ]
        if "onnxruntime-genai" in given.peers and batch == 1:  # more it does not read
            for kind in given.kinds:
                bundle = open_bundle(_bundle(checkpoint, given.work, kind))
                run = _genai(bundle.path, batch, checkpoint.vocab_size)
                ways.append(Way(f"onnxruntime-genai {kind}", bundle.manifest.weights_bytes, run))
        if model is not None:
            weights = 2 * checkpoint.parameters
            run = _compiled(model, batch)
            ways.append(Way("transformers fp16, compiled", weights, run))
        for way in ways:
            way.run()
        rounds = [[way.run() for way in ways] for _ in range(_ROUNDS)]
        for way, times in zip(ways, zip(*rounds, strict=True), strict=True):
            step = statistics.median(times)
            share = way.weights / step / limit
            row = f"{batch / step:,.0f} | {1e3 * step:.3f} | {share:.0%}"
            print(f"| {batch} | {way.name} | {row} |", flush=True)
        gc.collect()


def _bundle(checkpoint: Checkpoint, work: Path, kind: str) -> Path:
    path = work / checkpoint.name / kind
    if not path.exists():
        build(checkpoint.path, path, _KINDS[kind])
    return path


def _prompts(batch: int, vocab_size: int) -> Any:
    return np.random.default_rng(batch).integers(0, vocab_size, (batch, _PROMPT))


def _gptrt(decoder: Decoder, batch: int) -> Seconds:
    prompts = _prompts(batch, decoder.vocab_size)
    cache = decoder.new_cache(_PROMPT + _NEW + 1, batch)

    def run() -> float:
        cache.go_to(0)
        step = decoder.run(prompts, cache)[:, -1].argmax(-1)
        began = time.perf_counter()
        for _ in range(_NEW):
            step = decoder.run(step[:, None], cache)[:, -1].argmax(-1)
        return (time.perf_counter() - began) / _NEW

    return run


def _genai(bundle: Path, batch: int, vocab_size: int) -> Seconds:
    """Its loop over the same graph, CUDA graphs switched on."""
    import onnxruntime_genai as genai

    config = genai.Config(str(bundle))
    config.clear_providers()
    config.append_provider("cuda")
    config.set_provider_option("cuda", "enable_cuda_graph", "1")
    model = genai.Model(config)
    prompts = _prompts(batch, vocab_size)

    def run() -> float:
        parameters = genai.GeneratorParams(model)
        length = _PROMPT + _NEW + 1
        parameters.set_search_options(
            max_length=length, min_length=length, do_sample=False, batch_size=batch
        )
        generator = genai.Generator(model, parameters)
        generator.append_tokens(prompts.astype(np.int32))
        generator.generate_next_token()
        began = time.perf_counter()
        for _ in range(_NEW):
            generator.generate_next_token()
            generator.get_next_tokens()
        return (time.perf_counter() - began) / _NEW

    return run


def _transformers(checkpoint: Checkpoint) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        str(checkpoint.path), local_files_only=True, dtype=torch.float16
    )
    model.generation_config.eos_token_id = None
    return model.to("cuda").eval()


def _compiled(model: Any, batch: int) -> Seconds:
    """Its generate() compiles the step where the cache is static. Of two lengths the difference
    counts, so that reading the prompt does not."""
    import torch

    prompts = torch.from_numpy(_prompts(batch, model.config.vocab_size)).cuda()

    def seconds(new: int) -> float:
        torch.cuda.synchronize()
        began = time.perf_counter()
        model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
            cache_implementation="static",
            pad_token_id=0,
        )
        torch.cuda.synchronize()
        return time.perf_counter() - began

    return lambda: (seconds(_NEW + 8) - seconds(8)) / _NEW


if __name__ == "__main__":
    main()
