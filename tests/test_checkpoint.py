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

from export.cli import main as gptrt_export
from export.families.opt import OPT
from export.model import GPT

from .conftest import GPT2_SHAPE, LLAMA_SHAPE, assert_refused, run_cli, scrambled

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
