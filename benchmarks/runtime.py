"""What the runtime gains by doing several things in one pass: batches, and guessing ahead.

    python -m benchmarks.runtime WORK [--preset gpt2-124m] [--quantize int8] [--rounds 5]

Weights are random: speed does not look at them. What is written is prescribed by a logits
processor therefore, in all ways of writing it: an edited text, of which a prompt holds the
original; one that repeats nothing; and one whose ids are as unequally frequent as words are, so
that pairs of them come again by chance and promise a continuation that does not come. Interleaved
rounds in one process, medians of their ratios.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gptrt import GenerationConfig, Generator

from .models import random_checkpoint
from .peers.gptrt import build

_PROMPTS, _LENGTHS, _NEW = 8, (8, 48), 128
Ids = list[int]
_TEXT, _EDIT_EVERY, _GUESSES = 240, 16, 16  # ids; one in so many is changed


@dataclass(frozen=True)
class Prescribed:
    """A logits processor that leaves one choice: the text, after a prompt of `start` ids."""

    start: int
    text: tuple[int, ...]

    def __call__(self, ids: NDArray[np.int64], logits: NDArray[np.float32]) -> Any:
        only = np.full_like(logits, -np.inf)
        only[self.text[len(ids) - self.start]] = 0.0
        return only


@dataclass(frozen=True)
class Gain:
    """Tokens a second of one way and of another, in each round."""

    name: str
    plain: list[float]
    other: list[float]
    note: str = ""

    @property
    def ratios(self) -> list[float]:
        return [b / a for a, b in zip(self.plain, self.other, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--preset", default="gpt2-124m")
    parser.add_argument("--quantize", default="int8")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    bundle = random_bundle(args.work, args.preset, args.quantize)
    opened = Generator(bundle, threads=args.threads)
    generator = Generator.from_parts(opened.decoder, opened.tokenizer.endless(), reuse="none")
    print(
        f"{args.preset} {args.quantize}, random weights, {args.threads} threads; {date.today()}; "
        f"gptrt {version('gptrt')}, onnxruntime {version('onnxruntime')}\n\n"
        "| | plain tok/s | tok/s | ratio | lowest | highest | |\n|---|---|---|---|---|---|---|"
    )
    for gain in measure(generator, args.rounds):
        plain, other = (statistics.median(speeds) for speeds in (gain.plain, gain.other))
        ratios = gain.ratios
        print(
            f"| {gain.name} | {plain:.0f} | {other:.0f} | {statistics.median(ratios):.2f} "
            f"| {min(ratios):.2f} | {max(ratios):.2f} | {gain.note} |"
        )


def random_bundle(work: Path, preset: str, quantize: str) -> Path:
    work.mkdir(parents=True, exist_ok=True)
    checkpoint, out = random_checkpoint(preset, work), work / preset / f"gptrt-{quantize}"
    if not out.exists():
        build(checkpoint.path, out, {"quantize": quantize})
    return out


def measure(generator: Generator, rounds: int) -> list[Gain]:
    draw = random.Random(0)
    return [
        _batch(generator, draw, rounds),
        *(_guessing(generator, rounds, *text) for text in _texts(draw, generator)),
    ]


def _texts(draw: random.Random, generator: Generator) -> Iterator[tuple[str, Ids, Ids]]:
    """A name, the prompt, and what is to be written after it."""
    original, new, other = (_ids(draw, generator, _TEXT) for _ in range(3))
    edited = [
        b if n % _EDIT_EVERY == 0 else a for n, (a, b) in enumerate(zip(original, new, strict=True))
    ]
    yield "edited text, looked up", original, edited
    yield "text that repeats nothing, looked up in vain", original, other
    # Zipf and Mandelbrot's law: the word of rank r has a share in proportion to 1 / (r + 2.7).
    ranks = range(generator.decoder.vocab_size)
    words = draw.choices(ranks, [1 / (rank + 2.7) for rank in ranks], k=2 * _TEXT)
    yield "text that repeats words by chance", words[:_TEXT], words[_TEXT:]


def _ids(draw: random.Random, generator: Generator, count: int) -> Ids:
    return [draw.randrange(generator.decoder.vocab_size) for _ in range(count)]


def _batch(generator: Generator, draw: random.Random, rounds: int) -> Gain:
    """Ragged prompts one after the other, and all at once."""
    prompts = [_ids(draw, generator, draw.randint(*_LENGTHS)) for _ in range(_PROMPTS)]
    config = GenerationConfig(max_new_tokens=_NEW)

    def alone() -> list[tuple[int, ...]]:
        return [generator.complete(prompt, config=config).ids for prompt in prompts]

    def together() -> list[tuple[int, ...]]:
        results = generator.complete_batch(prompts, config=config, batch_size=_PROMPTS)
        return [result.ids for result in results]

    same = sum(a == b for a, b in zip(alone(), together(), strict=True))
    speeds = _rounds(alone, together, _PROMPTS * _NEW, rounds)
    note = f"{same} of {_PROMPTS} with the same ids"
    return Gain(f"{_PROMPTS} prompts in a batch", *speeds, note)


def _guessing(generator: Generator, rounds: int, name: str, prompt: Ids, text: Ids) -> Gain:
    wanted = tuple(text)
    only = Prescribed(len(prompt), wanted)

    def write(**options: Any) -> Any:
        result = generator.complete(
            prompt, max_new_tokens=len(text), logits_processor=only, **options
        )
        assert result.ids == wanted
        return result.timings

    timings = write(prompt_lookup_num_tokens=_GUESSES)
    speeds = _rounds(write, lambda: write(prompt_lookup_num_tokens=_GUESSES), len(text), rounds)
    note = f"{timings.accepted_tokens} of {timings.guessed_tokens} guesses came true"
    return Gain(name, *speeds, note)


def _rounds(
    plain: Callable[[], object], other: Callable[[], object], tokens: int, rounds: int
) -> tuple[list[float], list[float]]:
    """Tokens a second, prompts and all, one way and the other in turn."""
    speeds: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        for way, found in zip((plain, other), speeds, strict=True):
            began = time.perf_counter()
            way()
            found.append(tokens / (time.perf_counter() - began))
    return speeds


if __name__ == "__main__":
    main()
