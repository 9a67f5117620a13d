"""Quantization: what is stored, what error correction gains, how budgets are kept, what training
for rounding promises, and what is refused before the work begins."""

from __future__ import annotations

import json
import logging
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from export.blocks import BITS, BlockFormat, BlockMatrix, Grid, least_squares_grid
from export.calibration import correct_errors
from export.checkpoint import load_checkpoint
from export.cli import main as gptrt_export
from export.data import open_ids, spread_windows
from export.heads import with_padded_heads
from export.learned_rounding import learn_rounding
from export.loss import Lesson, linear_cross_entropy
from export.model import GPT
from export.new_run import RunPlan, create_run
from export.options import ConvertOptions
from export.parts import parameter_of, parts_of, rows_of, shape_of, split
from export.pipeline import convert, verify
from export.progress import silent
from export.quantize import BY_TEXT, Recipe, average_bits, matrix_shapes, quantize_model
from export.reopen import load_bundle
from export.rounding import DATA_FREE, Moments, error_corrected, nearest
from export.runs import Run, open_run, run_pointer
from export.sensitivity import Option, formats_of, plan_for_bits, plan_for_damage
from export.settings import Mode
from export.start import plan_run
from export.texts import TextFiles, choose_texts
from export.train import train
from export.vocabulary import RowCosts
from gptrt.errors import OptionError
from gptrt.format import read_manifest

from .conftest import GPT2_SHAPE, LLAMA_SHAPE, assert_refused, run_cli, scrambled
from .test_train import QUIET, losses

_VOCABULARY = {"wte.weight", "lm_head.weight"}

WEIGHT = np.random.default_rng(0).standard_normal((24, 200)).astype(np.float32)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", BITS)
def test_integers_of_a_grid_survive_packing_and_lie_nearest(bits: int, symmetric: bool) -> None:
    grid = least_squares_grid(WEIGHT, BlockFormat(bits, 64, symmetric))
    matrix = grid.matrix(grid.integers(WEIGHT), WEIGHT.shape[1])
    found = matrix.dequantize()
    assert found.shape == WEIGHT.shape
    assert np.array_equal(matrix.scales.astype(np.float16), matrix.scales)  # as they are stored
    again = Grid(grid.format, grid.scales, grid.zeros).integers(found)
    assert np.array_equal(again, grid.integers(WEIGHT))
    bits_a_weight = 8 * matrix.nbytes / WEIGHT.size
    assert bits_a_weight == pytest.approx(grid.format.bits_per_weight(200), abs=0.2)


@pytest.mark.parametrize("method", DATA_FREE)
def test_a_zero_block_and_a_constant_block_stay_what_they_are(method: str) -> None:
    weight = np.zeros((4, 64), np.float32)
    weight[1] = 0.5
    symmetric = method == "nearest"
    found = DATA_FREE[method](weight, BlockFormat(4, 32, symmetric)).dequantize()  # type: ignore[index]
    np.testing.assert_allclose(found, weight, atol=0.04)


@pytest.mark.parametrize("method", DATA_FREE)
def test_rounding_leaves_the_logging_of_the_process_alone(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.startswith("onnxruntime.quantization.")]:
        monkeypatch.delitem(sys.modules, name)  # as if imported for the first time
    monkeypatch.setattr(logging.root, "handlers", [])
    level = logging.root.level
    DATA_FREE[method](WEIGHT, BlockFormat(4, 64, symmetric=method == "nearest"))  # type: ignore[index]
    assert (logging.root.handlers, logging.root.level) == ([], level)


@pytest.mark.parametrize("bits", [2, 4])
def test_error_correction_loses_less_than_plain_rounding_on_inputs_like_those_it_saw(
    bits: int,
) -> None:
    random = np.random.default_rng(1)
    mix = random.standard_normal((200, 200)) * random.random(200)
    seen, unseen = (
        torch.from_numpy((random.standard_normal((2000, 200)) @ mix).astype(np.float32))
        for _ in range(2)
    )
    fmt = BlockFormat(bits, 64)

    def loss(matrix: object) -> float:
        rounded = torch.from_numpy(matrix.dequantize())  # type: ignore[attr-defined]
        return float((unseen @ (rounded - torch.from_numpy(WEIGHT)).T).square().mean())

    (corrected,) = error_corrected(WEIGHT, [fmt], Moments(seen.T @ seen))
    assert loss(corrected) < 0.6 * loss(nearest(WEIGHT, fmt))


def test_errors_are_made_good_in_other_rows_where_it_is_known_what_they_cost() -> None:
    random = np.random.default_rng(2)
    weight = random.standard_normal((200, 64)).astype(np.float32)

    def covariance(size: int) -> torch.Tensor:
        mixed = random.standard_normal((2000, size)) @ random.standard_normal((size, size))
        return torch.from_numpy((mixed.T @ mixed / 2000).astype(np.float32))

    hessian, costs = covariance(64), covariance(200)

    def loss(moments: Moments) -> float:
        found = error_corrected(weight, [BlockFormat(4, 32)], moments)[0].dequantize()
        errors = torch.from_numpy(found - weight)
        return float(torch.trace(costs @ errors @ hessian @ errors.T))

    assert loss(Moments(hessian, output_costs=costs)) < 0.8 * loss(Moments(hessian))


def test_error_correction_bears_inputs_that_are_always_zero() -> None:
    seen = torch.randn(500, 200)
    seen[:, 10:20] = 0
    hessian = seen.T @ seen
    for moments in (
        Moments(hessian),
        Moments(hessian, output_costs=torch.zeros(24, 24)),
        Moments(hessian, hessian * 0.01),
    ):
        found = error_corrected(WEIGHT, [BlockFormat(4, 32)], moments)[0].dequantize()
        assert np.isfinite(found).all()


@pytest.mark.parametrize("tied", [True, False])
def test_rows_of_the_vocabulary_rounded_each_for_itself_diverge_less(run: Run, tied: bool) -> None:
    """In a model that is about as sure of its predictions as a longer training would make it."""
    whole = load_checkpoint(run.path).model()
    model = GPT(replace(whole.config, tied=tied)).eval()
    model.load_state_dict(whole.state_dict())
    with torch.no_grad():
        model.lm_head.weight.mul_(2.0)
    seen = spread_windows(open_ids(run.train_ids), 32, 8192)
    unseen = torch.from_numpy(spread_windows(open_ids(run.valid_ids), 32, 2048))
    formats = {"wte.weight" if tied else "lm_head.weight": BlockFormat(4, 64)}
    alike, by_row = (
        divergence(model, correct_errors(model, formats, seen, silent, by_row=way), unseen)
        for way in (False, None)  # None: where it is quick
    )
    assert by_row < 0.9 * alike


def test_the_row_of_a_token_that_is_likely_nowhere_is_rounded_as_well() -> None:
    contexts = torch.rand(500, 200) + 0.5
    head = torch.from_numpy(WEIGHT).clone()
    head[3] -= 10.0  # hundreds of nats below the others
    ((rows, costs),) = RowCosts.measure(head, contexts).of(3, 4)
    (found,) = error_corrected(head[rows].numpy(), [BlockFormat(4, 32)], Moments(costs))
    np.testing.assert_allclose(found.dequantize()[0], head[3].numpy(), atol=2.0)  # a step is 1.4


def options_by_hand() -> dict[str, tuple[Option, ...]]:
    """Attention's first matrix is hurt most, the feed-forward's least."""
    costs = ((4, 64, 1.0), (4, 32, 0.5), (8, 64, 0.01))

    def of(name: str, shape: tuple[int, int]) -> tuple[Option, ...]:
        hurt = 1.0 if "c_attn" in name else 0.01 if "mlp" in name else 0.1
        return tuple(Option(name, BlockFormat(b, s), shape, hurt * c) for b, s, c in costs)

    shapes = matrix_shapes(GPT2_SHAPE)
    return {name: of(name, shape) for name, shape in shapes.items()}


def test_a_budget_of_bits_goes_to_the_matrices_that_need_it() -> None:
    found = options_by_hand()
    for budget in (8.9, 7.0, 6.2):
        plan = plan_for_bits(GPT2_SHAPE, found, budget)
        assert average_bits(GPT2_SHAPE, formats_of(plan)) <= budget
        assert plan == plan_for_bits(GPT2_SHAPE, found, budget)
        for name, options in found.items():  # nothing is left that would undo more
            for option in (o for o in options if o.damage < plan[name].damage):
                better = formats_of(plan | {name: option})
                assert average_bits(GPT2_SHAPE, better) > budget
    bits = {name: option.format.bits for name, option in plan.items()}
    assert bits["h.0.attn.c_attn.weight"] > bits["h.0.mlp.c_fc.weight"]


def test_a_budget_of_damage_is_kept_and_spent_on_the_most_bits() -> None:
    found = options_by_hand()
    small, large = (plan_for_damage(found, budget) for budget in (0.1, 1.0))
    assert sum(o.damage for o in small.values()) <= 0.1
    assert sum(o.damage for o in large.values()) <= 1.0
    assert sum(o.bits for o in large.values()) < sum(o.bits for o in small.values())


def test_a_budget_that_no_plan_keeps_is_refused_with_what_is_possible() -> None:
    with pytest.raises(OptionError, match="at least"):
        plan_for_bits(GPT2_SHAPE, options_by_hand(), 2.0)
    with pytest.raises(OptionError, match="at least"):
        plan_for_damage(options_by_hand(), 1e-6)


@pytest.mark.parametrize("method", ["gptq", "learned"])
def test_a_mixed_bundle_keeps_its_budget_and_shows_why(
    run: Run, tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(BY_TEXT, "learned", partial(learn_rounding, steps=2))  # of 600
    out = tmp_path / "mixed"
    budget = ("--bits-per-weight", 7.5, "--method", method)
    result = run_cli(gptrt_export, "convert", run.path, "--out", out, *budget, "--allow-loss")
    assert result.exit_code == 0, result.output
    stored = read_manifest(out).quantization
    assert stored.method == f"{method}, mixed"
    assert stored.bits_per_weight <= 7.5
    assert f"int{stored.bits}" == stored.mode
    assert {m.name for m in stored.matrices} >= {"wte.weight", "h.0.mlp.c_fc.weight"}
    assert all(m.name in result.stderr for m in stored.matrices)
    assert (out / "sensitivity.png").read_bytes().startswith(b"\x89PNG")
    assert "sensitivity.png" in (out / "README.md").read_text()


def test_the_zeros_of_padded_heads_are_no_weights(save_model: Callable[[GPT], Path]) -> None:
    checkpoint = load_checkpoint(save_model(scrambled(replace(LLAMA_SHAPE, head_dim=20))))
    padded = with_padded_heads(checkpoint)
    formats = Recipe("int4", block_size=32, head_bits=4).formats(padded.config)
    model = padded.frozen()
    stored = sum(matrix.nbytes for matrix in quantize_model(model, formats, "nearest").values())
    stored += sum(4 * p.numel() for p in model.parameters() if p.ndim == 1)
    weights = sum(p.numel() for p in checkpoint.frozen().parameters())
    assert average_bits(padded.config, formats) == pytest.approx(8 * stored / weights, rel=1e-3)


def test_calibration_and_verification_never_share_text(
    save_model: Callable[[GPT], Path], text_file: Path
) -> None:
    checkpoint = load_checkpoint(save_model(scrambled(GPT2_SHAPE)))
    assert checkpoint.tokenizer is not None
    whole = checkpoint.tokenizer.encode(text_file.read_text()).ids
    for files in (
        TextFiles(text_file, None, 1000),
        TextFiles(text_file, text_file, 1000),
        TextFiles(text_file, None, 10**6),
    ):
        texts = choose_texts(
            Path("nowhere"), checkpoint.tokenizer, files, calibrate=checkpoint.config
        )
        assert texts.calibration is not None
        both = [*texts.verify, *texts.calibration]
        assert both == whole[: len(both)]
        assert min(len(texts.verify), len(texts.calibration)) > 1000


def divergence(model: GPT, matrices: dict[str, BlockMatrix], windows: torch.Tensor) -> float:
    """Mean KL(model || model with rounded matrices), nats a token."""
    twin = GPT(model.config).eval()
    twin.load_state_dict(model.state_dict())
    with torch.no_grad():
        for name, matrix in matrices.items():
            rows = torch.from_numpy(matrix.dequantize())
            twin.get_parameter(parameter_of(name))[rows_of(name)] = rows
        a, b = (m(windows).log_softmax(-1) for m in (model, twin))
    return float((a.exp() * (a - b)).sum(-1).mean())


@pytest.mark.parametrize("parts", [False, True])
def test_learned_rounding_diverges_less_than_error_correction_on_text_it_has_not_seen(
    run: Run, parts: bool
) -> None:
    model = load_checkpoint(run.path).model().eval()
    seen = spread_windows(open_ids(run.train_ids), 32, 4096)
    unseen = torch.from_numpy(spread_windows(open_ids(run.valid_ids), 32, 1024))
    formats = Recipe("int4", block_size=32, head_bits=4).formats(model.config)
    if parts:
        first, rest = split("wte.weight", 100)
        whole = formats.pop("wte.weight")
        formats = {first: BlockFormat(8, 32), rest: whole} | formats
    corrected = quantize_model(model, formats, "gptq", seen)
    learned = learn_rounding(model, formats, seen, silent, steps=60)
    assert learned.keys() == corrected.keys()
    found, before = (divergence(model, matrices, unseen) for matrices in (learned, corrected))
    assert found < 0.95 * before


def test_learned_rounding_is_the_same_each_time(run: Run) -> None:
    model = load_checkpoint(run.path).model().eval()
    seen = spread_windows(open_ids(run.train_ids), 32, 4096)
    formats = Recipe("int4").formats(model.config)
    one, two = (learn_rounding(model, formats, seen, silent, steps=3) for _ in range(2))
    assert all((one[name].dequantize() == two[name].dequantize()).all() for name in formats)


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


def aware_plan(run: Run, text: Path, mode: Mode = "int4", **settings: str) -> RunPlan:
    changes = {"seq_len": "32", "batch_size": "4", "max_steps": "12", "eval_every": "6"}
    recipe = Recipe(mode, block_size=32, head_bits=4)
    return plan_run(None, run.path, [text], [], "cpu", changes | settings, None, recipe)


@pytest.fixture(scope="module")
def aware(
    run: Run, text_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[Mode], Run]:
    """A run made ready for its rounding, of which nothing is trained yet."""

    @cache
    def make(mode: Mode) -> Run:
        plan = aware_plan(run, text_file, mode, max_steps="0")
        return create_run(tmp_path_factory.mktemp("aware") / mode, plan)

    return make


def test_a_bundle_holds_the_very_matrices_that_training_computed_with(
    run: Run, text_file: Path, tmp_path: Path
) -> None:
    made = create_run(tmp_path / "aware", aware_plan(run, text_file, distill="1.0"))
    train(made, QUIET)
    checkpoint = load_checkpoint(made.path)
    out = tmp_path / "bundle"
    manifest = convert(made.path, out, ConvertOptions("int4", allow_loss=True))
    rounded, reopened = checkpoint.state, load_bundle(out).state
    for name, tensor in rounded.items():
        assert torch.allclose(reopened[name], tensor, atol=1e-6), name
    assert manifest.quantization.method == "trained rounding"
    assert manifest.quantization.head_bits == manifest.quantization.bits == 4
    # Compared with the teacher, which was never rounded.
    teacher = load_checkpoint(run.path)
    own = convert(
        made.path,
        tmp_path / "same",
        ConvertOptions("int4", allow_loss=True, against=run.path),
    )
    assert manifest.fidelity == own.fidelity == verify(out, made.path)[1]
    assert teacher.rounding is None
    for other in (("--quantize", "int8"), ("--asymmetric",), ("--bits-per-weight", 8)):
        result = run_cli(gptrt_export, "convert", made.path, "--out", tmp_path / "x", *other)
        assert_refused(result, "int4", "trained")


def test_a_bundle_has_the_bits_that_its_model_was_trained_for_without_being_told(
    aware: Callable[[Mode], Run], tmp_path: Path
) -> None:
    manifest = convert(aware("int2").path, tmp_path / "bundle", ConvertOptions(allow_loss=True))
    assert (manifest.quantization.mode, manifest.quantization.bits) == ("int2", 2)


@pytest.mark.parametrize("tied", [True, False])
def test_what_a_budget_leaves_is_for_the_rows_of_the_most_frequent_tokens(
    tied: bool,
) -> None:
    """As many as there is room for, and no more."""
    shape = replace(GPT2_SHAPE, vocab_size=2000, tied=tied)
    head = "wte.weight" if shape.tied else "lm_head.weight"
    least, most = (
        average_bits(shape, Recipe("int4", block_size=32, head_bits=bits).formats(shape))
        for bits in (4, 8)
    )
    found = {}
    for share in (0.0, 0.3, 0.6, 1.0, 2.0):
        budget = least + share * (most - least)
        formats = Recipe("int4", block_size=32, bits_per_weight=budget).formats(shape)
        assert average_bits(shape, formats) <= budget
        parts = [(name, formats[name].bits) for name in parts_of(head, formats)]
        rows = shape_of(parts[0][0], (shape.vocab_size, shape.n_embd))[0]
        found[share] = 0 if parts[0][1] == 4 else rows
        assert [bits for _, bits in parts] in ([4], [8], [8, 4])
        assert {fmt.bits for name, fmt in formats.items() if name.startswith("h.")} == {4}
        if 0 < share < 1:
            more = {f"{head}[:{rows + 32}]", f"{head}[{rows + 32}:]"}
            larger = {n: f for n, f in formats.items() if parameter_of(n) not in _VOCABULARY}
            for vocabulary in {parameter_of(n) for n in formats} & _VOCABULARY:
                first, rest = split(vocabulary, rows + 32)
                larger |= {first: BlockFormat(8, 32), rest: BlockFormat(4, 32)}
            assert more <= larger.keys()
            assert average_bits(shape, larger) > budget
    assert found[0.0] == 0 and found[1.0] == found[2.0] == shape.vocab_size
    assert 0 < found[0.3] < found[0.6] < shape.vocab_size


def test_a_budget_takes_bits_from_rows_that_are_hardly_read_for_those_that_are() -> None:
    shape = replace(GPT2_SHAPE, vocab_size=2000)
    least, most = (
        average_bits(shape, Recipe("int4", block_size=32, head_bits=bits).formats(shape))
        for bits in (4, 8)
    )
    budget = least + 0.1 * (most - least)
    recipe = Recipe("int4", block_size=32, bits_per_weight=budget)

    def rows_at(counts: NDArray[np.int64] | None) -> dict[int, int]:
        formats = recipe.formats(shape, counts)
        assert average_bits(shape, formats) <= budget
        parts = parts_of("wte.weight", formats)
        whole = (shape.vocab_size, shape.n_embd)
        return {formats[part].bits: shape_of(part, whole)[0] for part in parts}

    falling = 1_000_000 // np.arange(1, 2001) ** 2  # as the frequencies of words do, and faster
    unknown, known = rows_at(None), rows_at(falling)
    assert list(unknown) == [8, 4] and list(known) == [8, 4, 2]
    assert known[8] > unknown[8] and sum(known.values()) == shape.vocab_size
    assert rows_at(np.full(2000, 500)) == unknown
    falling[-1] = falling[0]  # a token that ends texts may be the last of all
    assert rows_at(falling) == unknown


def test_rows_of_eight_four_and_two_bits_run_as_they_were_trained(
    save_model: Callable[[GPT], Path], text_file: Path, tmp_path: Path
) -> None:
    shape = replace(LLAMA_SHAPE, vocab_size=1040, tied=True)
    source = save_model(scrambled(shape))
    plain = Recipe("int4", block_size=32, projection=False, head_bits=4)
    budget = average_bits(shape, plain.formats(shape)) + 0.05
    recipe = replace(plain, head_bits=None, bits_per_weight=budget)
    settings = {"seq_len": "32", "batch_size": "4", "max_steps": "4", "eval_every": "2"}
    plan = plan_run(None, source, [text_file], [], "cpu", settings, None, recipe)
    made = create_run(tmp_path / "run", plan)
    train(made, QUIET)
    checkpoint = load_checkpoint(made.path)
    assert checkpoint.rounding is not None
    formats = checkpoint.rounding.formats
    assert [formats[part].bits for part in parts_of("wte.weight", formats)] == [8, 4, 2]
    out = tmp_path / "bundle"
    manifest = convert(made.path, out, ConvertOptions(allow_loss=True, against=made.path))
    assert manifest.quantization.bits_per_weight <= budget + 1e-4
    assert manifest.fidelity is not None and manifest.fidelity.kl < 1e-3
    for name, tensor in load_bundle(out).state.items():
        assert torch.allclose(tensor, checkpoint.state[name], atol=1e-6), name


def test_a_small_vocabulary_whose_order_says_nothing_is_not_divided_by_a_budget() -> None:
    least, most = (
        average_bits(GPT2_SHAPE, Recipe("int4", block_size=32, head_bits=bits).formats(GPT2_SHAPE))
        for bits in (4, 8)
    )
    for budget, bits in ((least, 4), ((least + most) / 2, 4), (most, 8)):
        recipe = Recipe("int4", block_size=32, bits_per_weight=budget)
        assert recipe.formats(GPT2_SHAPE)["wte.weight"].bits == bits


@pytest.mark.parametrize(
    ("file", "change", "word"),
    [
        ("quantization.json", lambda text: text.replace('"bits": 4', '"bits": 5'), "bits"),
        ("quantization.json", lambda text: text.replace("h.0.mlp", "h.9.mlp"), "h.9.mlp"),
        ("quantization.json", lambda text: text.replace('size": 32', 'size": 64'), "fit"),
        ("quantization.json", lambda text: text[:-20], "JSON"),
        ("quantization.safetensors", lambda text: text[:0], "safetensors"),
    ],
)
def test_a_damaged_rounding_is_refused(
    aware: Callable[[Mode], Run], tmp_path: Path, file: str, change: Callable[[str], str], word: str
) -> None:
    damaged = shutil.copytree(aware("int4").path, tmp_path / "damaged")
    (path,) = damaged.glob(f"step-*/{file}")
    content = path.read_bytes().decode("latin-1")
    path.write_bytes(change(content).encode("latin-1"))
    result = run_cli(gptrt_export, "convert", damaged, "--out", tmp_path / "bundle")
    assert_refused(result, word)


def test_a_pull_keeps_weights_near_the_middle_of_their_integers(
    run: Run, text_file: Path, tmp_path: Path
) -> None:
    def distance(name: str, pull: str) -> float:
        settings = {"optimizer.position_pull": pull, "optimizer.position_lr": "0.02"}
        made = create_run(tmp_path / name, aware_plan(run, text_file, **settings))
        train(made, QUIET)
        rounding = made.last()[0].rounding
        assert rounding is not None
        found = torch.cat([p.detach().flatten() for p in rounding.positions.values()])
        return float((found - found.round()).abs().mean())

    assert distance("pulled", "0.2") < 0.7 * distance("free", "0.0")


def test_training_for_rounding_lowers_the_loss_of_the_rounded_model_and_resumes_bit_for_bit(
    run: Run, text_file: Path, tmp_path: Path
) -> None:
    plan = aware_plan(run, text_file, mode="int2", max_steps="40", eval_every="10")
    whole = create_run(tmp_path / "whole", plan)
    train(whole, QUIET)
    broken = create_run(tmp_path / "broken", plan)
    countdown = iter([False] * 6 + [True])
    assert train(broken, QUIET, lambda: next(countdown)).reason == "interrupted"
    train(open_run(broken.path), QUIET)
    found = [line for line in losses(broken) if "objective" in line]
    assert found == [line for line in losses(whole) if "objective" in line]
    assert len(found) == 40
    judged = {x["step"]: x["valid_objective"] for x in losses(whole) if "valid_objective" in x}
    assert judged[40] < judged[0]
    # Chance moves the loss of one rounding or another more than training does.
    best = min(judged, key=lambda step: judged[step])
    assert run_pointer(whole.path)["best"] == f"step-{best:08}"


def test_options_that_do_not_go_together_are_refused_before_any_work(
    run: Run, save_model: Callable[[GPT], Path], text_file: Path, tmp_path: Path
) -> None:
    short = tmp_path / "short.txt"
    short.write_text("Once upon a time there was a king. " * 8)
    other = save_model(scrambled(GPT2_SHAPE))
    odd = save_model(scrambled(replace(LLAMA_SHAPE, head_dim=20)))  # its heads are padded
    out = tmp_path / "bundle"
    for words, source, *options in (
        (["--bits-per-weight"], run.path, "--bits-per-weight", 3),
        (["budget"], run.path, "--bits-per-weight", 5, "--method", "nearest"),
        (["budget"], run.path, "--bits-per-weight", 5, "--target-ratio", 1.01),
        (["hqq"], run.path, "--quantize", "int8", "--method", "hqq"),
        (["symmetric"], run.path, "--method", "k-quant", "--symmetric"),
        (["bits"], run.path, "--head-bits", 3),
        (["--quantize"], run.path, "--quantize", "none", "--method", "gptq"),
        (["--window"], run.path, "--window", 1000),
        (["--calibration-text"], other, "--verify-text", short),
        (["--calibration-text"], other, "--verify-text", text_file, "--calibration-text", short),
        (["--verify-text"], other, "--calibration-text", text_file),
        (
            ["--calibration-text"],
            other,
            "--verify-text",
            short,
            *["--quantize", "int8"],
            *["--kv-cache", "int8"],
        ),
        (["--bits-per-weight"], odd, "--bits-per-weight", 5, "--verify-text", text_file),
        (["--bits-per-weight"], run.path, "--bits-per-weight", "nan"),
        (["--target-ratio"], run.path, "--target-ratio", "nan"),
        (["--target-ratio"], run.path, "--target-ratio", "inf"),
        (["--max-perplexity-ratio"], run.path, "--max-perplexity-ratio", "nan"),
        (["--max-perplexity-ratio"], run.path, "--max-perplexity-ratio", 0),
        (["block size"], run.path, "--block-size", 0),
        (["bits"], run.path, "--head-bits", 0),
        (["--window"], run.path, "--window", 0),
        (
            ["n_layer 1, not 2"],
            run.path,
            "--against",
            save_model(scrambled(replace(GPT2_SHAPE, n_layer=1))),
        ),
    ):
        result = run_cli(gptrt_export, "convert", source, "--out", out, *options)
        assert result.exit_code == 2, (options, result.output)
        lines = result.stderr.strip().splitlines()
        assert len(lines) == 1, lines  # no step was begun
        assert all(word in lines[-1] for word in words), (words, lines)
        assert not out.exists()
    for word, *options in (
        ("--from", "--quantize", "int4"),
        ("block size", "--quantize", "int4", "--block-size", 0),
        ("--quantize", "--block-size", 0),
        ("--quantize", "--bits-per-weight", 5),
    ):
        result = run_cli(
            gptrt_export, "train", "--preset", "nano-char", "--data", text_file, *options,
            "--out", tmp_path / "run",
        )  # fmt: skip
        assert_refused(result, word)
    result = run_cli(
        *(gptrt_export, "train", "--from", odd, "--data", text_file, "--quantize", "int4"),
        *("--out", tmp_path / "run"),
    )
    assert_refused(result, "head_dim", "multiple of 16", "20")
    for word, *options in (
        ("--bits-per-weight of at least", "--bits-per-weight", 4.1),
        ("--bits-per-weight of at least", "--bits-per-weight", "nan"),
        ("--head-bits 4", "--bits-per-weight", 5, "--head-bits", 4),
        ("int8", "--bits-per-weight", 9, "--quantize", "int8"),
    ):
        result = run_cli(
            gptrt_export, "train", "--from", run.path, "--data", text_file, "--quantize", "int4",
            *options, "--out", tmp_path / "run",
        )  # fmt: skip
        assert_refused(result, word)
        assert not (tmp_path / "run").exists()


def test_a_bundle_that_lost_too_much_ends_with_1_and_is_not_written(
    run: Run, tmp_path: Path
) -> None:
    out = tmp_path / "bundle"
    arguments = ("convert", run.path, "--out", out, "--method", "nearest", "--head-bits", 4)
    limit = ("--max-perplexity-ratio", 1.00001)
    assert run_cli(gptrt_export, *arguments, *limit).exit_code == 1
    assert not out.exists()
    allowed = run_cli(gptrt_export, *arguments, *limit, "--allow-loss", "--json")
    assert allowed.exit_code == 0
    assert 0 <= json.loads(allowed.stdout)["greedy"] <= 1
