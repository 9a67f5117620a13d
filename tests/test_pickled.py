"""Checkpoints of nanoGPT, minGPT and makemore, as their code writes them."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from export.checkpoint import load_checkpoint
from export.cli import main as gptrt_export
from export.model import GPT
from export.tokenization import TokenizerConfig, train_tokenizer

from .conftest import GPT2_SHAPE, SHARED, assert_refused, run_cli, scrambled, story

IDS = torch.tensor([[5, 250, 17, 3, 3, 99, 120, 7]])


def their_state(model: GPT, prefix: str = "") -> dict[str, torch.Tensor]:
    """Under their names, with the mask that their attention keeps."""
    names = {n: n if n.startswith("lm_head") else f"transformer.{n}" for n in model.state_dict()}
    state = {prefix + names[n]: tensor for n, tensor in model.state_dict().items()}
    masks = {f"{prefix}transformer.h.{n}.attn.bias": torch.ones(1, 1, 64, 64) for n in range(2)}
    return state | masks


def nanogpt(model: GPT, folder: Path) -> Path:
    config = model.config
    arguments: dict[str, Any] = {
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_embd": config.n_embd,
        "block_size": config.n_positions,
        "bias": config.bias,
        "vocab_size": config.vocab_size,
    }
    content = {"model": their_state(model, "_orig_mod."), "model_args": arguments, "iter_num": 7}
    torch.save(content, folder / "ckpt.pt")
    return folder / "ckpt.pt"


def mingpt(model: GPT, folder: Path) -> Path:
    torch.save(their_state(model), folder / "model.pt")
    (folder / "config.json").write_text('{"model": {"model_type": "gpt-micro", "n_head": null}}')
    return folder / "model.pt"


NANO = replace(GPT2_SHAPE, activation="gelu_erf", bias=False)
MINI = replace(GPT2_SHAPE, tied=False)


@pytest.mark.parametrize(("write", "shape"), [(nanogpt, NANO), (mingpt, MINI)])
def test_a_pickled_checkpoint_is_the_model_that_was_saved(
    write: Any, shape: Any, tmp_path: Path
) -> None:
    model = scrambled(shape)
    file = write(model, tmp_path)
    for path in (file, tmp_path):
        found = load_checkpoint(path)
        assert found.config == model.config
        assert torch.equal(found.model().eval()(IDS), model(IDS))


def test_a_pickled_checkpoint_converts(text_file: Path, tmp_path: Path) -> None:
    train_tokenizer(TokenizerConfig("bpe", 300), [story()]).save(str(tmp_path / "tokenizer.json"))
    file = nanogpt(scrambled(NANO), tmp_path)
    out = tmp_path / "bundle"
    result = run_cli(
        gptrt_export, "convert", file, "--out", out, "--quantize", "none",
        "--verify-text", text_file,
    )  # fmt: skip
    assert result.exit_code == 0, result.output


def test_heads_that_no_file_tells_are_asked_for(tmp_path: Path) -> None:
    file = mingpt(scrambled(MINI), tmp_path)
    (tmp_path / "config.json").unlink()  # as makemore leaves it
    result = run_cli(gptrt_export, "convert", file, "--out", tmp_path / "b")
    assert_refused(result, "heads", "n_head")
    (tmp_path / "config.json").write_text('{"model": {"n_head": 4}}')
    assert load_checkpoint(file).config == MINI


@pytest.mark.parametrize(
    "content",
    [
        {"model_args": {"n_head": 4}, "model": [1]},
        {1: torch.ones(2)},
        {"model_args": {"n_head": 4}, "model": {"wte.weight": torch.ones(3)}},
        {"model_args": {"n_head": 4}, "model": {"wpe.weight": torch.ones(())}},
        {"model_args": {"n_head": 4}, "model": {"h.0.mlp.c_fc.weight": torch.ones(())}},
    ],
)
def test_a_pickle_of_something_else_is_refused(content: dict[Any, Any], tmp_path: Path) -> None:
    if isinstance(content.get("model"), dict):
        tables = {"wte.weight": torch.ones(300, 64), "wpe.weight": torch.ones(64, 64)}
        content |= {"model": tables | content["model"]}
    torch.save(content, tmp_path / "ckpt.pt")
    result = run_cli(gptrt_export, "convert", tmp_path, "--out", tmp_path / "b")
    assert_refused(result, "ckpt.pt")


class Trap:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("sprung"),))


def test_code_in_a_pickle_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.pt").write_bytes(pickle.dumps({"transformer.wte.weight": Trap()}))
    result = run_cli(gptrt_export, "convert", tmp_path / "model.pt", "--out", tmp_path / "b")
    assert_refused(result, "model.pt")
    torch.save({"transformer.wte.weight": Trap()}, tmp_path / "model.pt")
    result = run_cli(gptrt_export, "convert", tmp_path / "model.pt", "--out", tmp_path / "b")
    assert_refused(result, "model.pt")
    assert not (tmp_path / "sprung").exists()


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs minGPT's adder, not part of the project")
def test_mingpts_own_adder_loads() -> None:
    config = load_checkpoint(SHARED / "golden" / "mingpt-adder").config
    assert (config.n_head, config.n_layer, config.n_positions, config.tied) == (3, 3, 6, False)
