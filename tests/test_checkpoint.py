"""Checkpoint folders as users have them: incomplete ones, damaged ones, older ones."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from export.checkpoint import load_checkpoint
from export.cli import main as gptrt_export
from export.families.opt import OPT
from export.model import GPT

from .conftest import GPT2_SHAPE, LLAMA_SHAPE, assert_refused, run_cli, scrambled, story

Spoil = Callable[[Path], object]
_Q = "model.layers.0.self_attn.q_proj.weight"
_WPE = "transformer.wpe.weight"


@pytest.fixture(scope="module")
def saved(save_model: Callable[[GPT], Path]) -> dict[str, Path]:
    shapes = {"gpt2": GPT2_SHAPE, "llama": LLAMA_SHAPE, "opt": GPT2_SHAPE}
    folders = {family: save_model(scrambled(shape)) for family, shape in shapes.items()}
    model = scrambled(replace(GPT2_SHAPE, activation="relu"))  # which gpt2 could hold as well
    (folders["opt"] / "config.json").write_text(json.dumps(OPT.to_json(model.config)))
    tensors = OPT.to_tensors(model.config, model.state_dict())
    save_file(tensors, folders["opt"] / "model.safetensors")
    return folders


def tensor(name: str, value: torch.Tensor | None) -> Spoil:
    def spoil(folder: Path) -> None:
        state = load_file(folder / "model.safetensors")
        state.pop(name)
        save_file(state if value is None else state | {name: value}, folder / "model.safetensors")

    return spoil


def content(file: str, value: Any) -> Spoil:
    return lambda folder: (folder / file).write_text(json.dumps(value))


@pytest.mark.parametrize(
    ("family", "spoil", "words"),
    [
        ("gpt2", tensor("transformer.wte.weight", None), ["wte.weight is missing"]),
        ("gpt2", tensor("transformer.h.0.mlp.c_fc.weight", torch.ones(())), ["c_fc", "shape []"]),
        ("gpt2", tensor(_WPE, torch.ones(64, 64, dtype=torch.int8)), [_WPE[12:], "torch.int8"]),
        ("gpt2", tensor(_WPE, torch.ones(64, 64, dtype=torch.bool)), [_WPE[12:], "torch.bool"]),
        ("gpt2", tensor(_WPE, torch.ones(64, 64) * 1j), [_WPE[12:], "torch.complex64"]),
        ("llama", tensor(_Q, torch.ones(64, 95)), [f"{_Q} is unknown", "[64, 95]"]),
        ("llama", tensor(_Q, torch.ones(5)), [f"{_Q} is unknown", "[5]"]),
        ("llama", tensor(_Q, torch.ones(())), [f"{_Q} is unknown", "[]"]),
        ("opt", tensor(_Q.replace("model.", "model.decoder."), torch.ones(64, 63)), ["[64, 63]"]),
        ("opt", tensor("model.decoder.embed_positions.weight", torch.ones(())), ["config.json"]),
        ("gpt2", content("model.safetensors.index.json", {}), ["weight_map in", "None"]),
        ("gpt2", content("model.safetensors.index.json", [1]), ["weight_map in", "[1]"]),
        ("gpt2", content("model.safetensors.index.json", {"weight_map": {"a": 1}}), ["['a'] is 1"]),
        ("gpt2", content("lineage.json", [1]), ["lineage.json", "[1]"]),
        ("gpt2", content("lineage.json", {"data": {"a": "b"}}), ["lineage.json", "['data']"]),
    ],
)
def test_a_folder_that_is_not_whole_is_refused(
    family: str, spoil: Spoil, words: list[str], saved: dict[str, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(saved[family], tmp_path / "model"))
    spoil(folder)
    result = run_cli(gptrt_export, "convert", folder, "--out", tmp_path / "bundle")
    assert_refused(result, *words)


def test_a_bundle_is_no_checkpoint_to_convert(bundle: Path, tmp_path: Path) -> None:
    result = run_cli(gptrt_export, "convert", bundle, "--out", tmp_path / "again")
    assert_refused(result, "a bundle", "what it was converted from")


@pytest.mark.parametrize("shards", [1, 2])
def test_weights_that_pytorch_pickled_are_the_model(
    shards: int, saved: dict[str, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(saved["llama"], tmp_path / "model"))
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    if shards == 1:
        torch.save(state, folder / "pytorch_model.bin")
    else:
        place = {name: f"pytorch_model-{n % shards}.bin" for n, name in enumerate(state)}
        for file in set(place.values()):
            torch.save({n: t for n, t in state.items() if place[n] == file}, folder / file)
        content("pytorch_model.bin.index.json", {"weight_map": place})(folder)
    found, wanted = load_checkpoint(folder), load_checkpoint(saved["llama"])
    assert found.config == wanted.config
    assert all(torch.equal(found.state[name], wanted.state[name]) for name in wanted.state)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_gpt2s_own_files_are_the_tokenizer_of_a_gpt2_and_of_nothing_else(
    family: str, saved: dict[str, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(saved[family], tmp_path / "model"))
    known = load_checkpoint(folder).tokenizer
    assert known is not None
    vocabulary, merges = folder / "vocab.json", folder / "merges.txt"
    model = json.loads(known.to_str())["model"]
    vocabulary.write_text(json.dumps(model["vocab"]))
    merges.write_text("#version: 0.2\n" + "\n".join(" ".join(pair) for pair in model["merges"]))
    (folder / "tokenizer.json").unlink()
    found = load_checkpoint(folder).tokenizer
    if family == "gpt2":
        assert found is not None
        assert found.encode(story(9)).ids == known.encode(story(9)).ids
    else:
        assert found is None


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_of_a_file_of_weights_the_folder_is_named(name: str, tmp_path: Path) -> None:
    (tmp_path / name).touch()
    result = run_cli(gptrt_export, "convert", tmp_path / name, "--out", tmp_path / "b")
    assert_refused(result, f"give {tmp_path}")
