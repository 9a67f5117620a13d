"""The model is the one that transformers computes, and its checkpoints are interchangeable."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from export.checkpoint import load_checkpoint
from export.loss import IGNORED, linear_cross_entropy
from export.model import GPT
from export.optimizer import muon
from gptrt.errors import CheckpointError

from .conftest import GPT2_SHAPE, LLAMA_SHAPE, scrambled

transformers = pytest.importorskip("transformers", reason="the reference implementation")

SHAPES = {
    "gpt2": GPT2_SHAPE,
    "gpt2-erf-untied": replace(GPT2_SHAPE, activation="gelu_erf", tied=False),
    "llama-grouped-heads": LLAMA_SHAPE,
    "llama-untied": replace(LLAMA_SHAPE, tied=False, rope_theta=5e5),
}
IDS = torch.tensor([[5, 250, 17, 3, 3, 99, 120, 7], [1, 2, 3, 4, 5, 6, 7, 8]])


@pytest.mark.parametrize("shape", SHAPES)
def test_transformers_loads_our_checkpoint_and_gives_the_same_logits(
    shape: str, save_model: Callable[[GPT], Path]
) -> None:
    model = scrambled(SHAPES[shape])
    theirs = transformers.AutoModelForCausalLM.from_pretrained(save_model(model)).eval()
    with torch.no_grad():
        difference = (model(IDS) - theirs(IDS).logits).abs().max()
    assert difference < 1e-4


@pytest.mark.parametrize("shape", SHAPES)
def test_a_checkpoint_that_transformers_saved_loads_back_unchanged(
    shape: str, save_model: Callable[[GPT], Path], tmp_path: Path
) -> None:
    model = scrambled(SHAPES[shape])
    theirs = transformers.AutoModelForCausalLM.from_pretrained(save_model(model))
    theirs.save_pretrained(tmp_path)
    loaded = load_checkpoint(tmp_path)
    assert loaded.config == model.config
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state[name], tensor), name


def test_a_shape_that_no_family_has_is_kept_in_our_own_format(
    save_model: Callable[[GPT], Path],
) -> None:
    model = scrambled(replace(GPT2_SHAPE, positions="rotary"))
    loaded = load_checkpoint(save_model(model))
    assert loaded.config == model.config
    assert torch.equal(loaded.model().eval()(IDS), model(IDS))


def test_a_checkpoint_with_wrong_weights_is_refused_with_every_fault(
    save_model: Callable[[GPT], Path],
) -> None:
    folder = save_model(scrambled(GPT2_SHAPE))
    config = (folder / "config.json").read_text()
    config = config.replace('"n_inner": 128', '"n_inner": 256')
    (folder / "config.json").write_text(config.replace('"vocab_size": 300', '"vocab_size": 299'))
    with pytest.raises(CheckpointError) as refused:
        load_checkpoint(folder)
    for name in ("h.0.mlp.c_fc.weight", "h.1.mlp.c_proj.weight", "h.1.mlp.c_fc.bias"):
        assert name in str(refused.value)
    assert "ids up to 299, vocab_size is 299" in str(refused.value)


@pytest.mark.parametrize("change", ["truncated", "missing", "unknown family"])
def test_a_damaged_checkpoint_is_refused(change: str, save_model: Callable[[GPT], Path]) -> None:
    folder = save_model(scrambled(GPT2_SHAPE))
    weights = folder / "model.safetensors"
    if change == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif change == "missing":
        weights.unlink()
    else:
        (folder / "config.json").write_text('{"model_type": "mamba"}')
    with pytest.raises(CheckpointError):
        load_checkpoint(folder)


def test_the_chunked_loss_has_the_value_and_the_gradients_of_cross_entropy() -> None:
    torch.manual_seed(0)
    x = torch.randn(3000, 8, requires_grad=True)
    weight = torch.randn(1024, 8, requires_grad=True)  # several chunks of rows
    targets = torch.randint(1024, (3000,))
    targets[::7] = IGNORED
    ours = linear_cross_entropy(x, weight, targets, torch.float32)
    found = torch.autograd.grad(ours, (x, weight))
    theirs = torch.nn.functional.cross_entropy(x @ weight.T, targets)
    wanted = torch.autograd.grad(theirs, (x, weight))
    torch.testing.assert_close(ours, theirs)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("shape", [(24, 64), (64, 24), (32, 32)])
def test_muon_is_that_of_pytorch(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    start, grads = torch.randn(shape), [torch.randn(shape) for _ in range(5)]
    rates = {"lr": 0.02, "weight_decay": 0.1, "momentum": 0.95}
    ours, theirs = (nn.Parameter(start.clone()) for _ in range(2))
    optimizer, moments = torch.optim.Muon([theirs], **rates), dict[str, torch.Tensor]()
    for grad in grads:
        ours.grad, theirs.grad = grad.clone(), grad.clone()
        optimizer.step()
        with torch.no_grad():
            muon(ours, moments, **rates)
    moved = (theirs - start).norm()
    assert (ours - theirs).norm() < 0.02 * moved  # theirs computes in bfloat16
