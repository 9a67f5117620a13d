"""What an error is said to cost is what it costs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from export.blocks import BlockFormat
from export.calibration import Ids, correct_errors
from export.checkpoint import load_checkpoint
from export.data import open_ids, spread_windows
from export.fisher import OutputCosts
from export.model import GPT
from export.progress import silent
from export.quantize import matrix_shapes
from export.runs import Run


def divergence_with_noise(model: GPT, module: nn.Module, noise: Tensor, ids: Tensor) -> float:
    """Mean KL in nats of the predictions where `module` gives `noise` [count, length, out] more."""
    with torch.no_grad():
        plain = model(ids).log_softmax(-1)
        handle = module.register_forward_hook(lambda _module, _read, given: given + noise)
        noisy = model(ids).log_softmax(-1)
    handle.remove()
    return float((plain.exp() * (plain - noisy)).sum(-1).mean())


@pytest.fixture(scope="module")
def measured(run: Run) -> tuple[GPT, Ids, OutputCosts]:
    """A model, windows of its text, and what errors of its outputs cost there."""
    model = load_checkpoint(run.path).model().eval()
    windows = spread_windows(open_ids(run.train_ids), 32, 8192)
    return model, windows, OutputCosts.measure(model, windows)


@pytest.mark.parametrize("name", ["h.0.attn.c_attn", "h.1.mlp.c_proj", "wte"])
@pytest.mark.parametrize("at", [-1, -8])  # the direction that matters most, and another
def test_an_error_in_an_output_costs_what_was_said(
    measured: tuple[GPT, Ids, OutputCosts], name: str, at: int
) -> None:
    model, windows, found = measured
    costs = found.embedded if name == "wte" else found.products[f"{name}.weight"]
    spread, directions = torch.linalg.eigh(costs)
    random = torch.Generator().manual_seed(0)
    sizes = 0.1 * spread[at] ** -0.5 * torch.randn(*windows.shape, 1, generator=random)
    noise = sizes * directions[:, at]
    cost = divergence_with_noise(model, model.get_submodule(name), noise, torch.from_numpy(windows))
    assert cost == pytest.approx(0.5 * 0.1**2, rel=0.15)


@pytest.mark.parametrize("tied", [True, False])
def test_a_model_too_large_for_the_costs_of_its_products_is_rounded_without(
    run: Run, monkeypatch: pytest.MonkeyPatch, tied: bool
) -> None:
    monkeypatch.setattr("export.fisher._MOST_VALUES", 0)
    whole = load_checkpoint(run.path).model()
    model = GPT(replace(whole.config, tied=tied)).eval()
    model.load_state_dict(whole.state_dict())
    windows = spread_windows(open_ids(run.train_ids), 32, 2048)
    costs = OutputCosts.measure(model, windows)
    assert not costs.products
    assert (costs.embedded is None) == (not tied)
    formats = dict.fromkeys(matrix_shapes(model.config), BlockFormat(8, 32))
    for name, matrix in correct_errors(model, formats, windows, silent).items():
        weight = model.get_parameter(name).detach().numpy()
        assert abs(matrix.dequantize() - weight).max() < 0.02 * abs(weight).max()
