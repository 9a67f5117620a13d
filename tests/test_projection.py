"""A vocabulary in a basis of its own: the model stays the same, rounds better, and is plain again
wherever other software reads it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from export.checkpoint import Checkpoint, load_checkpoint
from export.cli import main as gptrt_export
from export.model import GPT
from export.new_run import create_run
from export.options import ConvertOptions
from export.pipeline import convert
from export.projection import PROJECTIONS
from export.quantize import Recipe, average_bits, quantize_model
from export.reopen import load_bundle
from export.runs import Run, open_run
from export.start import load_checkpoint_or_bundle, plan_run, recipe_to_train
from export.train import train
from gptrt import Generator
from gptrt.architecture import ModelConfig
from gptrt.cli import main as gptrt
from gptrt.errors import OptionError

from .conftest import GPT2_SHAPE, LLAMA_SHAPE, assert_refused, run_cli, scrambled
from .test_quantize import divergence
from .test_train import QUIET, losses

# 16 rows a column and more.
WIDE = {"n_embd": 16, "head_dim": 16, "n_inner": 48, "n_head": 1, "n_kv_head": 1}
SHAPES = {
    "gpt2": replace(GPT2_SHAPE, **WIDE),
    "llama": replace(LLAMA_SHAPE, **WIDE),
    "llama-untied": replace(LLAMA_SHAPE, **WIDE, tied=False),
}


def uneven(config: ModelConfig) -> GPT:
    """A model whose vocabulary has columns of very different sizes, as trained ones have."""
    model = scrambled(config)
    with torch.no_grad():
        for matrix in {model.wte.weight, model.lm_head.weight}:
            matrix *= torch.logspace(-1, 0.5, config.n_embd)[torch.randperm(config.n_embd)]
    return model


def checkpoint_of(model: GPT) -> Checkpoint:
    return Checkpoint(model.config, dict(model.state_dict()), None, {})


@pytest.mark.parametrize("shape", SHAPES)
def test_a_projected_model_computes_the_same_and_can_be_made_plain_again(shape: str) -> None:
    model = uneven(SHAPES[shape])
    projected = checkpoint_of(model).projected()
    assert projected.config.projected
    ids = torch.randint(0, 300, (2, 20))
    with torch.no_grad():
        found, wanted = projected.model().eval()(ids), model(ids)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    plain = projected.plain()
    assert plain.config == model.config
    assert plain.state.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(plain.state[name], tensor, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_projected_vocabulary_loses_half_or_less_to_rounding(shape: str) -> None:
    plain = checkpoint_of(uneven(SHAPES[shape]))
    random = torch.Generator().manual_seed(1)
    seen, unseen = (torch.randint(0, 300, (32, 64), generator=random) for _ in range(2))
    lost = []
    for checkpoint in (plain, plain.projected()):
        model = checkpoint.model().eval()
        formats = Recipe("int4", block_size=16, head_bits=4).formats(model.config)
        head = "wte.weight" if model.config.tied else "lm_head.weight"
        own = {name: fmt for name, fmt in formats.items() if name in PROJECTIONS | {head}}
        matrices = quantize_model(model, own, "gptq", seen.numpy())
        lost.append(divergence(model, matrices, unseen))
    assert lost[1] < 0.5 * lost[0]


def test_a_bundle_of_a_projected_vocabulary_is_the_model_and_can_be_taught(
    save_model: Callable[[GPT], Path], text_file: Path, tmp_path: Path
) -> None:
    shape = SHAPES["llama-untied"]  # tests of conversion have a tied one
    source = save_model(uneven(shape))
    out = tmp_path / "bundle"
    options = ConvertOptions(verify_text=text_file, allow_loss=True, hidden_states=True)
    manifest = convert(source, out, options)
    assert manifest.model == replace(shape, projected=True)
    # Other runtimes know the model by its family, whatever basis its vocabulary has in the graph.
    assert json.loads((out / "config.json").read_text())["model_type"] == "llama"
    ids = list(range(5, 40))
    with torch.no_grad():
        states = load_checkpoint(source).model().eval().hidden(torch.tensor([ids]))[0].mean(0)
    with Generator(out, device="cpu") as generator:
        (embedded,) = generator.embed([ids])
    assert float(embedded @ states.numpy()) > 0.95 * float(states.norm())  # in its own basis
    assert run_cli(gptrt, "verify", out).exit_code == 0
    verified = run_cli(gptrt_export, "verify", out, "--against", source, "--text", text_file)
    assert verified.exit_code in (0, 1), verified.output  # 1: random weights lose much
    reopened = load_checkpoint_or_bundle(out)
    assert reopened.config == shape
    wanted = load_checkpoint(source).state["lm_head.weight"]
    error = (reopened.state["lm_head.weight"] - wanted).norm() / wanted.norm()
    assert error < 0.2
    # The small matrices cost bits, and they are counted.
    formats = Recipe("int4").formats(reopened.config)
    more = Recipe("int4").formats(manifest.model)  # type: ignore[arg-type]
    assert average_bits(manifest.model, more) > average_bits(reopened.config, formats)  # type: ignore[arg-type]


def test_a_budget_covers_the_projections(
    save_model: Callable[[GPT], Path], text_file: Path, tmp_path: Path
) -> None:
    source, out = save_model(uneven(SHAPES["gpt2"])), tmp_path / "bundle"
    budget = ConvertOptions(bits_per_weight=7.5, verify_text=text_file, allow_loss=True)
    manifest = convert(source, out, budget)
    assert manifest.model == replace(SHAPES["gpt2"], projected=True)
    assert manifest.quantization.bits_per_weight <= 7.5
    assert {matrix.name for matrix in manifest.quantization.matrices} >= PROJECTIONS


def test_training_for_rounding_projects_as_it_is_told() -> None:
    wide = uneven(SHAPES["gpt2"]).config
    for told, projects in ((None, True), (True, True), (False, False)):
        recipe = recipe_to_train("int4", None, None, told)
        assert recipe is not None
        assert recipe.projects(wide) is projects
    with pytest.raises(OptionError, match="found --block-size, --head-bits, --projection or"):
        recipe_to_train(None, None, None, projection=False)
    for given in ((0, None), (None, 0)):  # none of them is the same as left out
        with pytest.raises(OptionError, match="found --block-size"):
            recipe_to_train(None, *given)
        with pytest.raises(OptionError, match="found 0"):
            recipe_to_train("int4", *given)


def test_only_a_large_vocabulary_of_few_bits_is_projected(run: Run) -> None:
    wide, narrow = checkpoint_of(uneven(SHAPES["gpt2"])), load_checkpoint(run.path)
    assert ConvertOptions().projects(wide)
    assert ConvertOptions(projection=True).projects(narrow)
    for checkpoint, options in (
        (narrow, ConvertOptions()),
        (wide, ConvertOptions("none")),
        (wide, ConvertOptions("int8")),
        (wide, ConvertOptions(head_bits=8)),
        (wide, ConvertOptions(projection=False)),
        (wide.projected(), ConvertOptions()),
    ):
        assert not options.projects(checkpoint)


@pytest.fixture(scope="module")
def trained_for_rounding(
    tmp_path_factory: pytest.TempPathFactory, save_model: Callable[[GPT], Path], text_file: Path
) -> Run:
    source = save_model(uneven(replace(SHAPES["llama"], vocab_size=1040)))
    recipe = recipe_to_train("int4", 16, None)
    settings = {"seq_len": "32", "batch_size": "4", "max_steps": "8", "eval_every": "4"}
    plan = plan_run(None, source, [text_file], [], "cpu", settings, None, recipe)
    made = create_run(tmp_path_factory.mktemp("aware") / "run", plan)
    train(made, QUIET)
    return made


def test_a_basis_from_an_earlier_training_goes_if_there_is_to_be_none(
    trained_for_rounding: Run, text_file: Path
) -> None:
    for told, projected in ((None, True), (False, False)):
        recipe = recipe_to_train("int4", 16, None, told)
        source = trained_for_rounding.path
        plan = plan_run(None, source, [text_file], [], "cpu", {}, None, recipe)
        assert isinstance(plan.start, Checkpoint)
        assert plan.start.config.projected is projected


def test_training_for_rounding_keeps_the_basis_and_other_software_sees_a_plain_model(
    trained_for_rounding: Run, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    run = trained_for_rounding
    checkpoint = load_checkpoint(run.path)
    assert checkpoint.config.projected and checkpoint.rounding is not None
    assert set(checkpoint.rounding.formats) >= {"wte.weight[:130]", "wte.weight[130:]"}
    ids = torch.randint(0, 300, (1, 20))
    with torch.no_grad():
        ours = checkpoint.model().eval()(ids)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(run.last_folder)(ids).logits
    # The one matrix that is head and embedding there has what the head has here.
    assert (ours - theirs).norm() / theirs.norm() < 0.2
    out = tmp_path / "bundle"
    convert(run.path, out, ConvertOptions(allow_loss=True, hidden_states=True))
    wanted, found = checkpoint.state, load_bundle(out).state
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5)


def test_training_for_rounding_goes_on_where_it_stopped(trained_for_rounding: Run) -> None:
    done = [line for line in losses(trained_for_rounding) if "objective" in line]
    assert len(done) == 8
    longer = open_run(trained_for_rounding.path).continued(max_steps=10)
    before, *_ = trained_for_rounding.last()
    train(longer, QUIET)
    after, _, state = longer.last()
    assert state.step == 10
    assert after.config == before.config
    assert not torch.equal(after.state["project_out.weight"], before.state["project_out.weight"])


def test_a_basis_without_its_vocabulary_is_refused(
    trained_for_rounding: Run, tmp_path: Path
) -> None:
    import shutil

    copy = Path(shutil.copytree(trained_for_rounding.last_folder, tmp_path / "copy"))
    file = copy / "quantization.json"
    formats = json.loads(file.read_text())
    del formats["wte.weight[:130]"], formats["wte.weight[130:]"]
    file.write_text(json.dumps(formats))
    result = run_cli(gptrt_export, "convert", copy, "--out", tmp_path / "bundle")
    assert_refused(result, "wte.weight", "quantization.json")


def test_the_basis_is_the_same_each_time() -> None:
    one, two = (checkpoint_of(uneven(SHAPES["gpt2"])).projected().state for _ in range(2))
    assert all(torch.equal(one[name], two[name]) for name in one)
