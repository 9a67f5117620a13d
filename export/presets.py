"""Presets: a tokenizer, a shape and a way to train it, as data in `models/presets`."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from gptrt.architecture import ModelConfig
from gptrt.errors import CheckpointError
from gptrt.schema import decode, read_json

from .settings import TrainConfig
from .tokenization import TokenizerConfig


@dataclass(frozen=True)
class Preset:
    about: str
    tokenizer: TokenizerConfig
    model: ModelConfig
    train: TrainConfig


def preset_folder() -> Path:
    """Installed, `models/` is the package `gptrt_models`; in a checkout it lies beside us."""
    spec = find_spec("gptrt_models")
    root = (
        Path(spec.origin).parent if spec and spec.origin else Path(__file__).parents[1] / "models"
    )
    return root / "presets"


def preset_names() -> list[str]:
    return sorted(path.stem for path in preset_folder().glob("*.json"))


def load_preset(name: str) -> Preset:
    """A preset by name, or of one's own in a JSON file. Raises CheckpointError."""
    path = preset_file(name)
    value = read_json(path, error=CheckpointError)
    return decode(Preset, value, error=CheckpointError, source=str(path), do="correct the preset")


def preset_file(name: str) -> Path:
    """Where a preset stands. Raises CheckpointError, listing the names there are."""
    if name.endswith(".json"):
        return Path(name)
    if name not in preset_names():
        raise CheckpointError(
            f"a preset ({', '.join(preset_names())}) or the path of one, ending in .json",
            found=repr(name),
            do="choose one of these, or write your own: `gptrt-export presets NAME` shows one",
        )
    return preset_folder() / f"{name}.json"
