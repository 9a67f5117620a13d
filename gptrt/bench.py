"""Speed of a bundle on this machine, as an application sees it."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np

from gptrt.errors import OptionError
from gptrt.format import open_bundle
from gptrt.generator import Generator
from gptrt.session import Session
from gptrt.tokenizer import Tokenizer

_ROUNDS = 5


@dataclass(frozen=True)
class Bench:
    """Medians over rounds. `ttft_s` is the time to the first token of a loaded model;
    `loop_overhead_us` is what a decode step costs beside onnxruntime's run."""

    load_s: float
    prefill_tok_s: float
    decode_tok_s: float
    ttft_s: float
    loop_overhead_us: float
    peak_rss_mb: float
    weights_bytes: int


def bench(
    path: Path, *, prompt_tokens: int = 64, new_tokens: int = 128, threads: int | None = None
) -> Bench:
    """Measure greedy generation. Raises OptionError if the lengths do not fit the context."""
    began = time.perf_counter()
    bundle = open_bundle(path)
    session = Session(bundle, device="auto", threads=threads)
    generator = Generator.from_parts(session, Tokenizer.of(bundle))
    load = time.perf_counter() - began
    context = bundle.manifest.cache.max_length
    if prompt_tokens < 1 or new_tokens < 2 or prompt_tokens + new_tokens > context:
        raise OptionError(
            f"a prompt of 1 or more and 2 or more new tokens, {context} together at most",
            found=f"{prompt_tokens} and {new_tokens}",
            do="choose fewer tokens",
        )
    generator.tokenizer.end = None  # a closing token must not end a measurement
    rounds = [_round(generator, session, prompt_tokens, new_tokens) for _ in range(_ROUNDS + 1)]
    first, steps, overheads = zip(*rounds[1:], strict=True)  # the first one warms up
    return Bench(
        load_s=load,
        prefill_tok_s=prompt_tokens / median(first),
        decode_tok_s=1 / median(median(one) for one in steps),
        ttft_s=median(first),
        loop_overhead_us=1e6 * median(median(one) for one in overheads),
        peak_rss_mb=_peak_rss_mb(),
        weights_bytes=bundle.weights_bytes,
    )


def _round(
    generator: Generator, session: Session, prompt_tokens: int, new_tokens: int
) -> tuple[float, list[float], list[float]]:
    """Seconds to the first token; per further token, its seconds and those outside the graph."""
    random = np.random.default_rng(0)
    prompt = random.integers(session.manifest.model.vocab_size, size=prompt_tokens).tolist()
    marks = [(time.perf_counter(), session.seconds_in_graph)]
    for _ in generator.tokens(prompt, max_new_tokens=new_tokens):
        marks.append((time.perf_counter(), session.seconds_in_graph))
    walls, graphs = (np.diff([mark[i] for mark in marks]) for i in (0, 1))
    return float(walls[0]), walls[1:].tolist(), (walls - graphs)[1:].tolist()


def _peak_rss_mb() -> float:
    """Largest resident memory of this process so far, in 10^6 bytes."""
    try:
        import resource
    except ImportError:  # Windows
        return float("nan")
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6
