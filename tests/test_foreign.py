"""Decoders that other tools exported: their layouts, made here from a graph of ours by renaming."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from gptrt.constraint import Regex
from gptrt.decoder import Decoder
from gptrt.errors import BundleError, MemoryLimitError, PromptError
from gptrt.foreign import digest_of, open_foreign
from gptrt.foreign_decoder import ForeignDecoder
from gptrt.format import open_bundle
from gptrt.generator import Generator
from gptrt.scoring import perplexity

from .conftest import SHARED

PROMPT = [5, 250, 17, 3]
UNCHECKED = "ignore:.*has no manifest of gptrt:UserWarning"


@pytest.fixture(scope="module")
def wanted(exact: Path) -> list[int]:
    with Generator(exact, device="cpu") as generator:
        return list(generator.tokens(PROMPT, max_new_tokens=40))


def without_manifest(bundle: Path, folder: Path) -> Path:
    shutil.copytree(bundle, folder)
    for name in ("gptrt.json", "README.md"):
        (folder / name).unlink()
    return folder


def as_genai(bundle: Path, folder: Path) -> Path:
    """As onnxruntime-genai has them today; what its graphs leave open, its JSON says."""
    without_manifest(bundle, folder)
    (folder / "config.json").unlink()
    model = onnx.load(folder / "model.onnx")
    for node in model.graph.input:
        if node.name.startswith("past"):
            node.type.tensor_type.shape.dim[3].dim_param = "head_size"
    onnx.save(model, folder / "model.onnx")
    path = folder / "genai_config.json"
    config = json.loads(path.read_text())
    config["model"]["decoder"] |= {"filename": "other.onnx", "head_size": 16}
    path.write_text(json.dumps(config))
    (folder / "model.onnx").rename(folder / "other.onnx")
    return folder


def as_optimum(bundle: Path, folder: Path) -> Path:
    """Merged decoders have a flag for the first run."""
    without_manifest(bundle, folder)
    (folder / "genai_config.json").unlink()
    model = onnx.load(folder / "model.onnx")
    flag = helper.make_tensor_value_info("use_cache_branch", TensorProto.BOOL, [1])
    model.graph.input.append(flag)
    onnx.save(model, folder / "decoder_model_merged.onnx")
    (folder / "model.onnx").unlink()
    return folder


def as_transformers_js(bundle: Path, folder: Path) -> Path:
    """Graphs in a folder of their own, in several precisions; logits in half of it."""
    without_manifest(bundle, folder)
    (folder / "genai_config.json").unlink()
    (folder / "onnx").mkdir()
    model = onnx.load(folder / "model.onnx")
    graph = model.graph
    _rename(graph, "logits", "logits32")
    graph.node.append(helper.make_node("Cast", ["logits32"], ["logits"], to=TensorProto.FLOAT16))
    (logits,) = (node for node in graph.output if node.name in ("logits", "logits32"))
    logits.name, logits.type.tensor_type.elem_type = "logits", TensorProto.FLOAT16
    onnx.save(model, folder / "onnx" / "model_q4.onnx")
    (folder / "model.onnx").unlink()
    (folder / "onnx" / "model_fp16.onnx").write_bytes(b"never opened")
    return folder


def as_old_genai(bundle: Path, folder: Path) -> Path:
    """Keys and values of a layer in one tensor, everything else in int32."""
    as_genai(bundle, folder)
    model = onnx.load(folder / "other.onnx")
    graph = model.graph
    before: list[Any] = []
    after: list[Any] = []
    for node in list(graph.input):
        name = node.name
        if name.startswith("past"):
            graph.input.remove(node)
        elif name != "num_logits_to_keep":
            _rename(graph, name, f"{name}_64")
            node.name, node.type.tensor_type.elem_type = name, TensorProto.INT32
            before.append(helper.make_node("Cast", [name], [f"{name}_64"], to=TensorProto.INT64))
    graph.initializer.append(helper.make_tensor("first", TensorProto.INT64, [1], [0]))
    for node in list(graph.output):
        if node.name.startswith("present"):
            graph.output.remove(node)
    for layer in range(2):
        whole = ["past", "present"]
        for name, nodes in zip(whole, (graph.input, graph.output), strict=True):
            shape = [2, "batch", 4, name, 16]
            info = helper.make_tensor_value_info(f"{name}_{layer}", TensorProto.FLOAT, shape)
            nodes.append(info)
        parts = [f"{layer}_key", f"{layer}_value"]
        before.append(helper.make_node("Split", [f"past_{layer}"], parts, axis=0, num_outputs=2))
        for part, kind in zip(parts, ("key", "value"), strict=True):
            past, present = f"past_key_values.{layer}.{kind}", f"present.{layer}.{kind}"
            before.append(helper.make_node("Squeeze", [part, "first"], [past]))
            after.append(helper.make_node("Unsqueeze", [present, "first"], [f"{present}_2"]))
        joined = [f"present.{layer}.{kind}_2" for kind in ("key", "value")]
        after.append(helper.make_node("Concat", joined, [f"present_{layer}"], axis=0))
    nodes = [*before, *graph.node, *after]
    del graph.node[:]
    graph.node.extend(nodes)
    onnx.save(model, folder / "other.onnx")
    return folder


def _rename(graph: Any, old: str, new: str) -> None:
    for node in graph.node:
        for names in (node.input, node.output):
            for at, name in enumerate(names):
                names[at] = new if name == old else name


LAYOUTS = (without_manifest, as_genai, as_optimum, as_transformers_js, as_old_genai)


@pytest.mark.filterwarnings(UNCHECKED)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_another_tools_folder_gives_the_same_greedy_ids_and_text(
    layout: Callable[[Path, Path], Path], exact: Path, wanted: list[int], tmp_path: Path
) -> None:
    folder = layout(exact, tmp_path / "theirs")
    with Generator(folder, device="cpu") as theirs, Generator(exact, device="cpu") as ours:
        assert list(theirs.tokens(PROMPT, max_new_tokens=40)) == wanted
        assert theirs.generate("The king", max_new_tokens=20) == ours.generate(
            "The king", max_new_tokens=20
        )
        assert theirs.tokenizer.eos_token_ids == ours.tokenizer.eos_token_ids


def test_that_nothing_is_checked_is_said(exact: Path, tmp_path: Path) -> None:
    folder = without_manifest(exact, tmp_path / "theirs")
    with pytest.warns(UserWarning, match="is not checked") as warned:
        Generator(folder / "model.onnx", device="cpu").close()
    assert [Path(w.filename).name for w in warned] == [Path(__file__).name]


def test_a_graph_of_ours_is_no_foreign_one(exact: Path) -> None:
    with pytest.raises(BundleError, match="give the folder"):
        Generator(exact / "model.onnx", device="cpu")


@pytest.mark.filterwarnings(UNCHECKED)
def test_a_limit_counts_the_weights_beside_a_graph(exact: Path, tmp_path: Path) -> None:
    folder = without_manifest(exact, tmp_path / "theirs")
    limit = 1 << 28
    assert Generator(folder, device="cpu", memory_limit=limit).generate("The", max_new_tokens=1)
    with (folder / "model.onnx.data").open("wb") as stream:
        stream.truncate(limit)
    with pytest.raises(MemoryLimitError):
        Generator(folder, device="cpu", memory_limit=limit)


def test_one_digest_stands_for_all_that_makes_the_model(exact: Path, tmp_path: Path) -> None:
    folder = without_manifest(exact, tmp_path / "theirs")
    before = digest_of(open_foreign(folder))
    for name in ("out.jsonl", "out.jsonl.partial.json"):
        (folder / name).write_text("{}")
        assert digest_of(open_foreign(folder)) == before
    for name in ("model.onnx", "model.onnx.data", "tokenizer.json", "config.json"):
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data + b"\n")
        assert digest_of(open_foreign(folder)) != before, name
        (folder / name).write_bytes(data)
    assert digest_of(open_foreign(folder)) == before


def test_batches_windows_and_going_back_are_those_of_a_bundle(exact: Path, tmp_path: Path) -> None:
    theirs = ForeignDecoder(open_foreign(without_manifest(exact, tmp_path / "theirs")))
    ours = Decoder(open_bundle(exact), device="cpu")
    assert (theirs.context, theirs.vocab_size) == (ours.context, ours.vocab_size)
    rows = np.random.default_rng(0).integers(0, 300, (3, 9))
    caches = theirs.new_cache(12, 3), ours.new_cache(12, 3)
    for keep in (0, 2):
        for ids in (rows[:, :8], rows[:, 8:]):
            found, promised = (
                decoder.run(ids, cache, keep=keep)
                for decoder, cache in zip((theirs, ours), caches, strict=True)
            )
            np.testing.assert_allclose(found, promised, atol=1e-4)
        for cache in caches:  # the last id once more, after going back one
            cache.go_to(8)
        found, promised = (
            decoder.run(rows[:, 8:], cache)
            for decoder, cache in zip((theirs, ours), caches, strict=True)
        )
        np.testing.assert_allclose(found, promised, atol=1e-4)
        for cache in caches:
            cache.go_to(0)
    text = rows.flatten()
    found, promised = (perplexity(s, text, window=8, stride=4).nll for s in (theirs, ours))
    assert found == pytest.approx(promised, abs=1e-5)


@pytest.mark.filterwarnings(UNCHECKED)
def test_without_a_tokenizer_ids_still_go_in_and_come_out(
    exact: Path, wanted: list[int], tmp_path: Path
) -> None:
    folder = without_manifest(exact, tmp_path / "theirs")
    (folder / "tokenizer.json").unlink()
    with Generator(folder, device="cpu") as generator:
        assert list(generator.tokens(PROMPT, max_new_tokens=40)) == wanted
        for call in (
            lambda: generator.generate("The king"),
            lambda: generator.generate(PROMPT),
            lambda: generator.generate(PROMPT, constraint=Regex("a")),
            lambda: generator.tokenizer.words(),
        ):
            with pytest.raises(PromptError, match=r"tokenizer\.json in .*give ids"):
                call()


def no_cache(folder: Path) -> None:
    model = onnx.load(folder / "model.onnx")
    for node in [n for n in model.graph.output if n.name.startswith("present.1")]:
        model.graph.output.remove(node)
    model.graph.input.append(
        helper.make_tensor_value_info("encoder_hidden_states", TensorProto.FLOAT, [1])
    )
    onnx.save(model, folder / "model.onnx")


def no_context(folder: Path) -> None:
    (folder / "config.json").write_text("{}")
    (folder / "genai_config.json").write_text('{"model": {"context_length": "long"}}')


def other_graph(folder: Path) -> None:
    (folder / "genai_config.json").write_text('{"model": {"decoder": {"filename": "x.onnx"}}}')


def no_json(folder: Path) -> None:
    (folder / "config.json").write_text("[")


def odd_end(folder: Path) -> None:
    (folder / "generation_config.json").write_text('{"eos_token_id": "the end"}')
    (folder / "genai_config.json").unlink()


@pytest.mark.filterwarnings(UNCHECKED)
@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (no_cache, "output present.1.key is missing.*encoder_hidden_states is unknown"),
        (no_context, "the context of.*'long'"),
        (other_graph, r"a decoder in .*: x\.onnx"),
        (no_json, "config.json"),
        (odd_end, "ids as eos_token_id.*the end"),
    ],
)
def test_a_folder_that_is_no_decoder_is_refused(
    spoil: Callable[[Path], None], words: str, exact: Path, tmp_path: Path
) -> None:
    folder = without_manifest(exact, tmp_path / "theirs")
    spoil(folder)
    with pytest.raises(BundleError, match=words):
        Generator(folder, device="cpu")


@pytest.mark.filterwarnings(UNCHECKED)
@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared golden models are not here")
def test_the_graph_of_tiny_random_gpt2_gives_the_ids_that_onnxruntime_genai_expects() -> None:
    folder = SHARED / "golden" / "tiny-random-gpt2"
    expected = json.loads((folder / "expected.json").read_text())["greedy"]
    with Generator(folder, device="cpu") as generator:
        for prompt, whole in zip(expected["input_ids"], expected["output_ids"], strict=True):
            new = len(whole) - len(prompt)
            assert [*prompt, *generator.tokens(prompt, max_new_tokens=new)] == whole
