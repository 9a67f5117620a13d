"""The decoder: graphs that are not what the manifest says, devices, threads, caches."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper

from export.checkpoint import load_checkpoint
from export.options import ConvertOptions
from export.pipeline import convert
from export.runs import Run
from gptrt.decoder import Decoder
from gptrt.engine import import_onnxruntime
from gptrt.errors import BundleError, DeviceError, OptionError, PromptError
from gptrt.format import Bundle, open_bundle

from .conftest import rehash

Change = Callable[[dict[str, Any]], object]
EditManifest = Callable[[Change], Path]


@pytest.fixture(scope="module")
def decoder(bundle: Path) -> Decoder:
    return Decoder(open_bundle(bundle), device="cpu", threads=1)


def rehashed(folder: Path) -> Bundle:
    """The bundle, its manifest made to agree with a graph that was changed."""
    rehash(folder, "model.onnx")
    return open_bundle(folder)


# --- a graph that is not what the manifest says -------------------------------------------------


def rename_logits(graph: onnx.GraphProto) -> None:
    graph.node.append(helper.make_node("Identity", ["logits"], ["scores"]))
    graph.output[0].name = "scores"


def add_input(graph: onnx.GraphProto) -> None:
    extra = helper.make_tensor_value_info("token_type_ids", TensorProto.INT64, ["batch", "new"])
    graph.input.append(extra)


def require_optional_input(graph: onnx.GraphProto) -> None:
    (default,) = (i for i in graph.initializer if i.name == "num_logits_to_keep")
    graph.initializer.remove(default)


def drop_last_cache(graph: onnx.GraphProto) -> None:
    del graph.output[-1]


@pytest.mark.parametrize(
    ("change", "faults"),
    [
        (rename_logits, ("output scores is unknown", "output logits is missing")),
        (add_input, ("input token_type_ids is unknown",)),
        (require_optional_input, ("optional input num_logits_to_keep is missing",)),
        (drop_last_cache, ("output present.1.value is missing",)),
    ],
)
def test_a_sound_graph_with_other_names_is_refused(
    change: Callable[[onnx.GraphProto], None], faults: tuple[str, ...], copied: Path
) -> None:
    model = onnx.load(copied / "model.onnx")
    Decoder(rehashed(copied), device="cpu")
    change(model.graph)
    onnx.save(model, copied / "model.onnx")
    with pytest.raises(BundleError, match="inputs and outputs of a 2-layer decoder") as caught:
        Decoder(rehashed(copied), device="cpu")
    assert all(fault in caught.value.found for fault in faults), caught.value.found


@pytest.mark.parametrize(
    ("model", "cache", "fault"),
    [
        ({"vocab_size": 301}, {}, "output logits is tensor(float) ['batch', 'kept', 300]"),
        ({"n_layer": 1}, {"layers": 1}, "input past_key_values.1.key is unknown"),
        ({"n_layer": 3}, {"layers": 3}, "output present.2.value is missing"),
        ({"n_kv_head": 2}, {"kv_heads": 2}, "input past_key_values.0.key is tensor(float)"),
        ({"head_dim": 8}, {"head_dim": 8}, "output present.1.key is tensor(float)"),
        ({}, {"dtype": "float16"}, "input past_key_values.0.value is tensor(float)"),
    ],
)
def test_a_graph_of_another_shape_or_type_is_refused(
    model: dict[str, Any], cache: dict[str, Any], fault: str, edit_manifest: EditManifest
) -> None:
    def change(manifest: dict[str, Any]) -> None:
        manifest["model"] |= model
        manifest["cache"] |= cache

    with pytest.raises(BundleError, match="export the bundle again") as caught:
        Decoder(open_bundle(edit_manifest(change)), device="cpu")
    assert fault in caught.value.found


@pytest.mark.parametrize("keep", [0, 1000, -1000])
def test_bytes_that_are_no_graph_are_refused_in_one_line(copied: Path, keep: int) -> None:
    graph = copied / "model.onnx"
    graph.write_bytes(b"no graph at all" if keep == 0 else graph.read_bytes()[:keep])
    with pytest.raises(BundleError, match=r"model\.onnx that onnxruntime .* can open"):
        Decoder(rehashed(copied), device="cpu")
    code = "from gptrt.cli import main; main()"
    command = [sys.executable, "-c", code, "generate", str(copied), "x"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1, done.stderr  # the library itself is silent too


# --- devices, threads, packages -----------------------------------------------------------------


@pytest.mark.parametrize("threads", [0, -1, 1025, 10**18, True, 1.0, "2"])
def test_an_impossible_number_of_threads_is_refused(bundle: Path, threads: Any) -> None:
    with pytest.raises(OptionError, match="1 to 1024 threads"):
        Decoder(open_bundle(bundle), threads=threads)


@pytest.mark.parametrize("device", ["tpu", "CPU", "", None])
def test_a_device_that_there_is_not_is_refused(bundle: Path, device: Any) -> None:
    with pytest.raises(DeviceError, match="wanted device auto, cpu or cuda; found "):
        Decoder(open_bundle(bundle), device=device)


def test_cuda_runs_there_or_is_refused_with_what_is_missing(bundle: Path) -> None:
    if "CUDAExecutionProvider" in import_onnxruntime().get_available_providers():
        wanted = "--quantize fp16"  # this bundle is in float32, whose attention CUDA has not
    else:
        wanted = r"pip install 'gptrt\[cuda\]'"
    with pytest.raises(DeviceError, match=wanted):
        Decoder(open_bundle(bundle), device="cuda")
    assert Decoder(open_bundle(bundle), device="auto").engine.device == "cpu"


_WITHOUT_ONNXRUNTIME = """
import sys

class Nowhere:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "onnxruntime":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Nowhere())
from gptrt.cli import main
main()
"""


def test_without_onnxruntime_the_way_to_install_it_is_shown(bundle: Path) -> None:
    command = [sys.executable, "-W", "error", "-c", _WITHOUT_ONNXRUNTIME]
    asked = [*command, "generate", str(bundle), "The king"]
    done = subprocess.run(asked, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert "wanted the package onnxruntime; found No module named 'onnxruntime'; " in line
    assert line.endswith("pip install 'gptrt[cpu]' (or 'gptrt[cuda]')")

    looked = subprocess.run([*command, "doctor"], capture_output=True, text=True)
    assert looked.returncode == 1
    assert "missing  onnxruntime" in looked.stdout


# --- caches -------------------------------------------------------------------------------------


def walk(decoder: Decoder, prompt: list[int], steps: int) -> NDArray[np.float32]:
    """Logits of a prompt and of greedy steps after it: [1 + steps, vocab]."""
    cache = decoder.new_cache(len(prompt) + steps)
    rows = [decoder.run([prompt], cache)[0, -1].copy()]
    for _ in range(steps):
        rows.append(decoder.run([[int(rows[-1].argmax())]], cache)[0, -1].copy())
    return np.stack(rows)


def test_threads_that_share_a_decoder_get_the_logits_that_they_get_alone(decoder: Decoder) -> None:
    prompts = [[i, 2 * i + 1, 299 - i] for i in range(1, 9)]
    alone = [walk(decoder, prompt, 50) for prompt in prompts]
    assert not np.array_equal(alone[0], alone[1])
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(lambda prompt: walk(decoder, prompt, 50), prompts))
    for found, wanted in zip(together, alone, strict=True):
        assert np.array_equal(found, wanted)


@pytest.mark.parametrize("capacity", [0, -1, 65, 10**18])
def test_a_cache_is_never_larger_than_the_context(decoder: Decoder, capacity: int) -> None:
    with pytest.raises(PromptError, match=rf"wanted 1 to 64 tokens; found {capacity}; "):
        decoder.new_cache(capacity)


def test_a_full_cache_takes_no_more_and_stays_usable(decoder: Decoder) -> None:
    cache = decoder.new_cache(4)
    decoder.run([[1, 2, 3]], cache)
    with pytest.raises(PromptError, match="1 to 1 more tokens in 1 rows; found 2 in 1"):
        decoder.run([[4, 5]], cache)
    last = decoder.run([[4]], cache).copy()
    with pytest.raises(PromptError, match="found 1 in 1"):
        decoder.run([[5]], cache)
    whole = decoder.run([[1, 2, 3, 4]], decoder.new_cache(4))
    np.testing.assert_allclose(last, whole, atol=1e-5)


def test_ids_that_do_not_fit_the_rows_of_a_cache_are_refused(decoder: Decoder) -> None:
    with pytest.raises(PromptError, match="found 0 in 1"):
        decoder.run([[]], decoder.new_cache(4))
    with pytest.raises(PromptError, match="in 1 rows; found 1 in 2"):
        decoder.run([[1], [2]], decoder.new_cache(4))
    batch = decoder.new_cache(4, batch=2)
    decoder.run([[1], [2]], batch)
    with pytest.raises(PromptError, match="one token at a time in each row"):
        decoder.run([[1, 2], [3, 4]], batch)


# --- float16 ------------------------------------------------------------------------------------


def test_a_float16_bundle_computes_nearly_what_pytorch_does_in_float32(
    run: Run, tmp_path: Path
) -> None:
    convert(run.path, tmp_path / "half", ConvertOptions("fp16"))
    half = open_bundle(tmp_path / "half")
    assert half.manifest.cache.dtype == "float16"
    decoder = Decoder(half, device="cpu", threads=1)
    ids = np.random.default_rng(0).integers(0, 300, (1, 40))
    cache = decoder.new_cache(41)
    found = [decoder.run(ids[:, :30], cache, keep=0).copy()]
    found += [decoder.run(ids[:, i : i + 1], cache).copy() for i in range(30, 40)]
    with torch.no_grad():
        wanted = load_checkpoint(run.path).model().eval()(torch.from_numpy(ids)).numpy()
    assert found[0].dtype == np.float32
    np.testing.assert_allclose(np.concatenate(found, axis=1), wanted, atol=0.02)
