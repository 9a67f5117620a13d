"""Names on a hub, offline: from its cache, or an error that says what is missing."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from export.cli import main as gptrt_export
from export.hub import local_checkpoint
from export.model import GPT
from gptrt.errors import CheckpointError

from .conftest import GPT2_SHAPE, assert_refused, run_cli, scrambled

hub = pytest.importorskip("huggingface_hub", reason="an optional package")

from huggingface_hub.utils import filter_repo_objects  # noqa: E402

REVISION = "0" * 40


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub, which is not to be reached."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "hub"


def store(cache: Path, folder: Path) -> None:
    repository = cache / "models--somebody--tiny"
    shutil.copytree(folder, repository / "snapshots" / REVISION)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(REVISION)


def test_a_name_is_found_in_the_cache(
    cache: Path, save_model: Callable[[GPT], Path], text_file: Path, tmp_path: Path
) -> None:
    store(cache, save_model(scrambled(GPT2_SHAPE)))
    result = run_cli(
        gptrt_export, "convert", "somebody/tiny", "--out", tmp_path / "bundle",
        "--quantize", "none", "--verify-text", text_file, "--against", "somebody/tiny",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert f"somebody/tiny@{REVISION}" in (tmp_path / "bundle" / "README.md").read_text()


SAFETENSORS = {
    *("model.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json")
}
PICKLED = {"pytorch_model.bin"}


@pytest.mark.parametrize(
    ("weights", "others"), [(SAFETENSORS, PICKLED), (PICKLED, set())], ids=["both", "pickled"]
)
def test_what_is_fetched_is_the_model_once_and_its_chat_template(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, weights: set[str], others: set[str]
) -> None:
    used = {"config.json", "tokenizer.json", "chat_template.jinja", "vocab.json", "merges.txt"}
    used |= weights
    others = others | {"consolidated.safetensors", "original/x.safetensors", "a.gguf"}

    def download(repository: str, *, allow_patterns: list[str], **_rest: object) -> str:
        assert repository == "somebody/large"
        kept = filter_repo_objects(used | others, allow_patterns=allow_patterns)
        for name in kept:
            (tmp_path / name).touch()
        return str(tmp_path)

    monkeypatch.setattr(hub, "snapshot_download", download)
    found = local_checkpoint(Path("somebody/large"))
    assert {path.name for path in found.iterdir()} == used


@pytest.mark.usefixtures("cache")
def test_a_folder_comes_before_a_name() -> None:
    Path("somebody/tiny").mkdir(parents=True)
    assert local_checkpoint(Path("somebody/tiny")) == Path("somebody/tiny")
    assert local_checkpoint(Path("no/such/name")) == Path("no/such/name")  # no hub has that


@pytest.mark.usefixtures("cache")
def test_a_name_that_is_nowhere_is_refused() -> None:
    result = run_cli(gptrt_export, "convert", "somebody/nothing", "--out", "bundle")
    assert_refused(result, "somebody/nothing", "network")


def test_a_repository_without_weights_is_refused(
    cache: Path, save_model: Callable[[GPT], Path]
) -> None:
    folder = save_model(scrambled(GPT2_SHAPE))
    (folder / "model.safetensors").unlink()
    store(cache, folder)
    with pytest.raises(CheckpointError, match="safetensors"):
        local_checkpoint(Path("somebody/tiny"))
