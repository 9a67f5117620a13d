"""How fast a bundle runs on this machine, as a user of Generator meets it."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from gptrt.decoder import Decoder
from gptrt.engine import Device
from gptrt.errors import OptionError
from gptrt.foreign_decoder import ForeignDecoder
from gptrt.format import open_bundle
from gptrt.generator import Generator
from gptrt.huge_pages import gather
from gptrt.machine import peak_memory
from gptrt.opening import bundle_path, open_decoder
from gptrt.tokenizer import Tokenizer


@dataclass(frozen=True)
class _Round:
    """Times of one generation, in seconds; `loop` has one a step, outside onnxruntime."""

    first: float
    decode: float
    loop: list[float]


def bench(
    path: str | os.PathLike[str] | None = None,
    *,
    device: Device = "auto",
    threads: int | None = None,
    cuda_graphs: bool = False,
    prompt_tokens: int | None = None,
    new_tokens: int | None = None,
    rounds: int = 3,
) -> dict[str, Any]:
    """Load the bundle at `path` (default: the embedded one) and measure it.

    Medians of `rounds` after one that warms up, on the CPU with the weights in huge pages, as they
    come to be in use. `load_s` hashes the files, imports onnxruntime and opens the graph, once;
    `ttft_s` lasts from the call to the first id, `prefill_tok_s` is the prompt over that;
    `decode_tok_s` counts the ids after the first. `loop_overhead_us` is the median over all steps
    of what the loop over ids takes outside onnxruntime; no text is made. `peak_rss_mb` is of the
    whole process, in 10**6 bytes, None where the system does not tell. On CUDA `bandwidth_gb_s` is
    what copies within the card's memory reach, and `bandwidth_share` how much of it decoding takes
    to read all weights once an id.
    """
    began = time.perf_counter()
    bundle = open_bundle(bundle_path(path))
    decoder = open_decoder(bundle, device=device, threads=threads, cuda_graphs=cuda_graphs)
    tokenizer = Tokenizer.open(bundle)
    generator = Generator.from_parts(decoder, tokenizer.endless(), reuse="none")
    load = time.perf_counter() - began

    prompt, new = _sizes(decoder.context, prompt_tokens, new_tokens)
    _round(generator, decoder, prompt, new)
    if decoder.engine.device == "cpu":
        gather(rest=0.0)
    measured = [_round(generator, decoder, prompt, new) for _ in range(rounds)]
    first = _median(measured, lambda r: r.first)
    speed = (new - 1) / _median(measured, lambda r: r.decode)
    peak = peak_memory()
    return {
        "load_s": load,
        "prefill_tok_s": prompt / first,
        "decode_tok_s": speed,
        "ttft_s": first,
        "loop_overhead_us": 1e6 * statistics.median(t for r in measured for t in r.loop),
        "peak_rss_mb": None if peak is None else peak / 1e6,
        "weights_bytes": bundle.manifest.weights_bytes,
        **_beside_limit(decoder.engine.bandwidth(), speed * bundle.manifest.weights_bytes),
    }


def _beside_limit(bandwidth: float | None, read: float) -> dict[str, float]:
    """Bytes a second that memory gives, if that is known, and the share of it that is read."""
    if bandwidth is None:
        return {}
    return {"bandwidth_gb_s": bandwidth / 1e9, "bandwidth_share": read / bandwidth}


def _round(
    generator: Generator, decoder: Decoder | ForeignDecoder, prompt: int, new: int
) -> _Round:
    """One generation of ids that no text is needed for: the same ones every time."""
    vocab_size = decoder.vocab_size
    ids = [(i * 7919) % vocab_size for i in range(prompt)]
    ends, inside = [time.perf_counter()], [decoder.engine.seconds]
    for _ in generator.tokens(ids, max_new_tokens=new):
        ends.append(time.perf_counter())
        inside.append(decoder.engine.seconds)
    loop = [(ends[i + 1] - ends[i]) - (inside[i + 1] - inside[i]) for i in range(1, new)]
    return _Round(ends[1] - ends[0], ends[-1] - ends[1], loop)


def _sizes(context: int, prompt: int | None, new: int | None) -> tuple[int, int]:
    """64 prompt and 128 new tokens, or what the context has room for."""
    prompt = min(64, context // 2) if prompt is None else prompt
    new = max(2, min(128, context - prompt)) if new is None else new
    if prompt < 1 or new < 2 or prompt + new > context:
        raise OptionError(
            f"a prompt of 1 or more and 2 or more new tokens, at most {context} together",
            found=f"{prompt} and {new}",
            do="ask for fewer",
        )
    return prompt, new


def _median(rounds: list[_Round], value: Callable[[_Round], float]) -> float:
    return statistics.median(map(value, rounds))
