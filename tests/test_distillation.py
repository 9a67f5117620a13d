"""What is learnt from a teacher, and what that is worth."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from export.checkpoint import load_checkpoint
from export.cli import main as gptrt_export
from export.data import open_ids, spread_windows
from export.distillation import Teacher
from export.fisher import OutputCosts
from export.loss import Lesson, linear_cross_entropy, state_divergence
from export.new_run import create_run
from export.runs import Run
from export.train import train

from .conftest import assert_refused, run_cli
from .test_quantize import aware_plan
from .test_train import QUIET


def test_a_lesson_alone_is_the_divergence_from_the_teacher() -> None:
    x, head = torch.randn(40, 8, requires_grad=True), torch.randn(30, 8)
    lesson = Lesson(torch.randn(40, 8), torch.randn(30, 8), 1.0)
    loss = linear_cross_entropy(x, head, None, torch.float32, lesson)
    wanted = F.kl_div(
        (x @ head.T).log_softmax(-1),
        (lesson.x @ lesson.head.T).log_softmax(-1),
        reduction="batchmean",
        log_target=True,
    )
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    torch.testing.assert_close(
        *(torch.autograd.grad(value, x)[0] for value in (loss, wanted)), rtol=1e-4, atol=1e-6
    )


def test_a_lesson_adds_the_divergence_from_the_teacher_and_its_gradients() -> None:
    torch.manual_seed(0)
    x, head = torch.randn(40, 8, requires_grad=True), torch.randn(30, 8, requires_grad=True)
    taught, teacher, targets = torch.randn(40, 8), torch.randn(30, 8), torch.randint(0, 30, (40,))
    lesson = Lesson(taught, teacher, 0.7)
    loss = linear_cross_entropy(x, head, targets, torch.float32, lesson)
    logits = x @ head.T
    wanted = F.cross_entropy(logits, targets) + 0.7 * F.kl_div(
        logits.log_softmax(-1), (taught @ teacher.T).log_softmax(-1), None, None, "batchmean", True
    )
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    found = torch.autograd.grad(loss, (x, head))
    for a, b in zip(found, torch.autograd.grad(wanted, (x, head)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("layer", [0, 1])
def test_a_state_that_is_astray_costs_what_the_predictions_diverge_by(run: Run, layer: int) -> None:
    model = load_checkpoint(run.path).model().eval()
    windows = spread_windows(open_ids(run.train_ids), 32, 8192)
    costs = OutputCosts.measure(model, windows).of_blocks()
    ids, random = torch.from_numpy(windows), torch.Generator().manual_seed(0)
    noise = 0.02 * torch.randn(*windows.shape, model.config.n_embd, generator=random)
    with torch.no_grad():
        shown: list[torch.Tensor] = []
        plain = model.lm_head(model.hidden(ids, outputs=shown)).log_softmax(-1)
        block = model.get_submodule(f"h.{layer}")
        handle = block.register_forward_hook(lambda _module, _read, given: given + noise)
        outputs: list[torch.Tensor] = []
        noisy = model.lm_head(model.hidden(ids, outputs=outputs)).log_softmax(-1)
        handle.remove()
    diverged = float((plain.exp() * (plain - noisy)).sum(-1).mean())
    at_that_block = ([part[layer]] for part in (outputs, shown, costs))
    assert state_divergence(*at_that_block).item() == pytest.approx(diverged, rel=0.15)
    assert len(costs) == len(outputs) == model.config.n_layer


def test_blocks_that_are_held_to_the_teachers_go_less_astray(
    run: Run, text_file: Path, tmp_path: Path
) -> None:
    unseen = torch.from_numpy(spread_windows(open_ids(run.valid_ids), 32, 1024))
    costs = OutputCosts.measure(load_checkpoint(run.path).model(), unseen.numpy()).of_blocks()

    def astray(name: str, weight: str) -> float:
        settings = {"max_steps": "40", "eval_every": "40", "distill_states": weight}
        made = create_run(tmp_path / name, aware_plan(run, text_file, "int2", **settings))  # type: ignore[arg-type]
        train(made, QUIET)
        teacher = Teacher.open(made.path, torch.device("cpu"))
        assert bool(teacher.costs) == (weight != "0")
        outputs: list[torch.Tensor] = []
        with torch.no_grad():
            load_checkpoint(made.path).frozen().hidden(unseen, outputs=outputs)
        return state_divergence(outputs, teacher.show(unseen, None, None).outputs, costs).item()

    assert astray("held", "100") < 0.9 * astray("free", "0")


def test_damaged_costs_are_refused(run: Run, text_file: Path, tmp_path: Path) -> None:
    made = create_run(tmp_path / "aware", aware_plan(run, text_file, max_steps="1"))  # type: ignore[arg-type]
    file = made.path / "teacher" / "costs.safetensors"
    whole = file.read_bytes()
    for damaged, word in ((whole[:20], "safetensors"), (whole.replace(b'"1"', b'"7"'), "matrices")):
        file.write_bytes(damaged)
        resumed = run_cli(gptrt_export, "train", "--resume", "--out", made.path)
        assert_refused(resumed, word, "costs.safetensors")
