"""Small real models, made on the spot: text, a training run, bundles."""

from __future__ import annotations

import os

# Before torch and onnxruntime are imported, here and in the processes that tests start: models this
# small are slower on two threads than on one, and a host must turn telemetry off itself.
os.environ |= {"OMP_NUM_THREADS": "1", "ORT_DISABLE_TELEMETRY": "1"}

import json
import signal
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from export.checkpoint import Checkpoint, save_checkpoint
from export.cli import main as gptrt_export
from export.data import find_texts
from export.model import GPT
from export.new_run import RunPlan, create_run
from export.options import ConvertOptions
from export.pipeline import convert
from export.progress import ProgressBar
from export.runs import Run
from export.settings import TrainConfig
from export.tokenization import TokenizerConfig, special_ids, train_tokenizer
from export.train import train
from gptrt.architecture import ModelConfig
from gptrt.cli import main as gptrt
from gptrt.format import MANIFEST_FILE, describe_file

# A shell has what it starts in the background ignore Ctrl-C, and so would what the tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)

SHARED = Path(__file__).parents[2] / "shared" / "data"

_SENTENCE = "The {0} king said to the {1} queen that {2} of the birds had flown over the hills. "
_WORDS = ("old", "young", "wise", "merry", "silent", "none", "seven", "many")

GPT2_SHAPE = ModelConfig(
    vocab_size=300,
    n_positions=64,
    n_layer=2,
    n_head=4,
    n_kv_head=4,
    n_embd=64,
    head_dim=16,
    n_inner=128,
)
LLAMA_SHAPE = ModelConfig(
    vocab_size=300,
    n_positions=64,
    n_layer=2,
    n_head=4,
    n_kv_head=2,
    n_embd=96,
    head_dim=16,
    n_inner=100,
    positions="rotary",
    norm="rmsnorm",
    activation="swiglu",
    bias=False,
)


def story(length: int = 400) -> str:
    """Text with something to learn and nothing to remember."""
    return "".join(
        _SENTENCE.format(*(_WORDS[(i * k) % len(_WORDS)] for k in (1, 3, 5))) for i in range(length)
    )


def scrambled(config: ModelConfig, seed: int = 0) -> GPT:
    """A model none of whose parameters is zero or one, so that none can be left out unseen."""
    torch.manual_seed(seed)
    model = GPT(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            center = 1.0 if "ln_" in name and name.endswith("weight") else 0.0
            parameter.normal_(center, 0.15)
    return model.eval()


def run_cli(command: Any, *arguments: object) -> Result:
    return CliRunner().invoke(command, [str(argument) for argument in arguments])


def assert_refused(result: Result, *words: str) -> None:
    """Exit status 2 and one line that says what was wanted, what was found and what to do."""
    assert result.exit_code == 2, (result.exit_code, result.output, result.exception)
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, lines
    assert "error: " in lines[0]
    for word in ("wanted", "found", *words):
        assert word in lines[0], (word, lines[0])


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "story.txt"
    path.write_text(story(), encoding="utf-8")
    return path


def make_plan(text: Path, **settings: Any) -> RunPlan:
    values: dict[str, Any] = {"seq_len": 32, "batch_size": 4, "max_steps": 12, "eval_every": 6}
    train_config = TrainConfig(**values | {"warmup_steps": 2, "dropout": 0.1} | settings)
    tokenizer = TokenizerConfig("bpe", vocab_size=300)
    return RunPlan(train_config, GPT2_SHAPE, tokenizer, find_texts([text]), [], "cpu")


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> Run:
    """A short training run, finished."""
    made = create_run(tmp_path_factory.mktemp("run") / "run", make_plan(text_file, max_steps=60))
    train(made, ProgressBar("training", quiet=True))
    return made


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory, run: Run) -> Path:
    """The run as an int8 bundle."""
    path = tmp_path_factory.mktemp("bundle") / "tiny"
    convert(run.path, path, ConvertOptions("int8", block_size=32))
    return path


@pytest.fixture(scope="session")
def exact(tmp_path_factory: pytest.TempPathFactory, run: Run) -> Path:
    """The run as a bundle without quantization: passes and steps agree but for the last bits of a
    logit."""
    path = tmp_path_factory.mktemp("exact") / "bundle"
    convert(run.path, path, ConvertOptions("none"))
    return path


@pytest.fixture
def copied(bundle: Path, tmp_path: Path) -> Path:
    """A copy of the bundle, to be damaged."""
    import shutil

    return Path(shutil.copytree(bundle, tmp_path / "copy"))


def change_manifest(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / MANIFEST_FILE
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def rehash(folder: Path, name: str) -> None:
    """Let the manifest agree with a file that was changed."""
    entry = asdict(describe_file(folder / name))
    change_manifest(folder, lambda manifest: manifest["files"].update({name: entry}))


@pytest.fixture
def edit_manifest(copied: Path) -> Callable[[Callable[[dict[str, Any]], object]], Path]:
    """Change the manifest of the copy."""

    def edit(change: Callable[[dict[str, Any]], object]) -> Path:
        change_manifest(copied, change)
        return copied

    return edit


# The command `gptrt` at the pace of a model that is large: every pass takes a while.
SLOW_GPTRT = """
import time
from gptrt.cli import main
from gptrt.decoder import Decoder
run = Decoder.run
Decoder.run = lambda *args, **kwargs: time.sleep(0.03) or run(*args, **kwargs)
main()
"""


@pytest.fixture(scope="session")
def save_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[GPT], Path]:
    """Write a model as a checkpoint folder, with a tokenizer of its vocabulary."""

    def save(model: GPT) -> Path:
        folder = tmp_path_factory.mktemp("checkpoint") / "model"
        tokenizer = train_tokenizer(TokenizerConfig("bpe", model.config.vocab_size), [story()])
        state, special = model.state_dict(), special_ids(tokenizer)
        checkpoint = Checkpoint(model.config, state, tokenizer, {}, special=special)
        save_checkpoint(checkpoint, folder)
        return folder

    return save


__all__ = ["gptrt", "gptrt_export"]
