"""Cold start and memory of a bundle, and what each way of loading it would cost.

    python benchmarks/loading.py BUNDLE [--gguf FILE] [--rounds 7]

Every figure comes from a process of its own; rounds are interleaved, medians are printed. The
files are in the page cache. The peer, llama.cpp, is measured if its file is given.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from shutil import copyfile
from statistics import median

os.environ["ORT_DISABLE_TELEMETRY"] = "1"
Figures = dict[str, float]  # milliseconds and MB (10**6 bytes)

_MEMORY = """
import json, time
def memory():
    lines = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return {k: int(lines[v].split()[0]) * 1.024e-3 for k, v in
            (("peak MB", "VmHWM"), ("at rest MB", "VmRSS"))}
began = time.perf_counter()
def since(start):
    return 1e3 * (time.perf_counter() - start)
"""
# argv: graph, JSON of session entries. Nothing of gptrt: onnxruntime alone, settings as they come.
_OPEN = f"""{_MEMORY}
import sys
import numpy, onnxruntime as ort
options = ort.SessionOptions()
options.intra_op_num_threads, options.log_severity_level = 2, 3
for key, value in json.loads(sys.argv[2]).items():
    options.add_session_config_entry(key, value)
start = time.perf_counter()
session = ort.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
opened = since(start)
feeds = {{"input_ids": [[1] * 8], "position_ids": [range(8)], "attention_mask": [[1] * 8]}}
feeds = {{name: numpy.array(value, numpy.int64) for name, value in feeds.items()}}
for node in session.get_inputs():
    if node.name.startswith("past"):
        dtype = numpy.int8 if "int8" in node.type else numpy.float32
        feeds[node.name] = numpy.zeros((1, node.shape[1], 8, node.shape[3]), dtype)
start = time.perf_counter()
session.run(["logits"], feeds)
print(json.dumps({{"open ms": opened, "first run ms": since(start), **memory()}}))
"""
# argv: bundle, prompt tokens, new tokens. All that a user meets, from an interpreter on.
_GPTRT = f"""{_MEMORY}
import sys
from gptrt import Generator
path, prompt, new = sys.argv[1], *map(int, sys.argv[2:])
generator = Generator(path, device="cpu", threads=2)
endless = Generator.from_parts(generator.decoder, generator.tokenizer.endless(), reuse="none")
ids = endless.tokens([i * 7919 % 250 for i in range(prompt)], max_new_tokens=new)
next(ids)
first = since(began)
list(ids)
print(json.dumps({{"first token ms": first, **memory()}}))
"""
_LLAMA = f"""{_MEMORY}
import sys
import llama_cpp
path, prompt, new = sys.argv[1], *map(int, sys.argv[2:])
llm = llama_cpp.Llama(path, n_ctx=prompt + new, n_threads=2, n_threads_batch=2, verbose=False)
ids = llm.generate([i * 7919 % 250 for i in range(prompt)], temp=0.0)
next(ids)
first = since(began)
for _ in range(new - 1):
    next(ids)
print(json.dumps({{"first token ms": first, **memory()}}))
"""


@dataclass(frozen=True)
class Case:
    name: str
    worker: str
    arguments: tuple[str, ...]

    def measure(self) -> Figures:
        command = [sys.executable, "-c", self.worker, *self.arguments]
        found: Figures = json.loads(subprocess.check_output(command, stderr=subprocess.DEVNULL))
        return found


@dataclass(frozen=True)
class Way:
    """One way of storing the graph, and of opening it."""

    name: str
    store: Callable[[Path, Path], None]
    settings: dict[str, str] = field(default_factory=dict)


def inline(source: Path, target: Path) -> None:
    """Weights inside the protobuf."""
    import onnx_ir as ir

    ir.save(ir.external_data.load_to_model(ir.load(source)), target)


def beside(source: Path, target: Path) -> None:
    """Weights beside the graph, every matrix under one name."""
    import onnx_ir as ir

    model = ir.load(source)
    for node in model.graph:
        for index, value in enumerate(node.inputs):
            if value is not None and str(value.name).endswith("_rows"):
                shared = model.graph.initializers[str(value.name).removesuffix("_rows")]
                node.replace_input_with(index, shared)
    for name in [n for n, v in model.graph.initializers.items() if not v.uses()]:
        if name.endswith("_rows"):
            model.graph.initializers.pop(name)
    ir.save(model, target, external_data=f"{target.name}.data")


def as_exported(source: Path, target: Path) -> None:
    for name in (source.name, f"{source.name}.data"):
        copyfile(source.parent / name, target.parent / name)


def optimized(source: Path, target: Path, **settings: str) -> None:
    """As onnxruntime saves it: what it fuses at load, without what depends on the processor."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(target)
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    stem = "session.optimized_model_external_initializers"
    options.add_session_config_entry(f"{stem}_file_name", f"{target.name}.data")
    options.add_session_config_entry(f"{stem}_min_size_in_bytes", "1024")
    for key, value in settings.items():
        options.add_session_config_entry(f"session.{key}", value)
    ort.InferenceSession(str(source), options, providers=["CPUExecutionProvider"])


def prepacked(source: Path, target: Path) -> None:
    """With the kernels' own layout of this processor stored as well."""
    optimized(source, target, save_external_prepacked_constant_initializers="1")


WAYS = (
    Way("weights in the graph", inline),
    Way("weights beside it", beside),
    Way("as exported: rows under a name of their own", as_exported),
    Way("+ prepacking by all threads", as_exported, {"session.prepack.enable_parallel": "1"}),
    Way("+ no prepacking", as_exported, {"session.disable_prepacking": "1"}),
    Way("+ optimized graph saved", optimized),
    Way("+ prepacked weights saved", prepacked),
)


def cases(bundle: Path, gguf: Path | None, work: Path) -> list[Case]:
    found = []
    for number, way in enumerate(WAYS):
        target = work / str(number) / "model.onnx"
        target.parent.mkdir()
        way.store(bundle / "model.onnx", target)
        found.append(Case(way.name, _OPEN, (str(target), json.dumps(way.settings))))
    for prompt, new in (("8", "1"), ("1000", "20")):
        found.append(Case(f"gptrt, {prompt} + {new} tokens", _GPTRT, (str(bundle), prompt, new)))
        if gguf:
            name = f"llama.cpp, {prompt} + {new} tokens"
            found.append(Case(name, _LLAMA, (str(gguf), prompt, new)))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--gguf", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.bundle.parent) as work:
        measured = cases(args.bundle.absolute(), args.gguf, Path(work))
        rounds = [[case.measure() for case in measured] for _ in range(args.rounds)]
    for case, *figures in zip(measured, *rounds, strict=True):
        medians = {key: median(f[key] for f in figures) for key in figures[0]}
        print(f"| {case.name} | " + " | ".join(f"{v:.0f} {k}" for k, v in medians.items()) + " |")


if __name__ == "__main__":
    main()
