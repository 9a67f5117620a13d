"""Checkpoints by their name on the Hugging Face hub: `openai-community/gpt2`, with `@revision`."""

from __future__ import annotations

import re
from pathlib import Path

from gptrt.errors import CheckpointError, DependencyError, first_line

_NAME = re.compile(r"(?P<repository>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")
_FILES = (
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"),
    *("vocab.json", "merges.txt", "chat_template.jinja"),
)
# The first that are there, and no others: some repositories have them for other software too.
_WEIGHTS = (
    ("model.safetensors", "model-*.safetensors", "model.safetensors.index.json"),
    ("pytorch_model.bin", "pytorch_model-*.bin", "pytorch_model.bin.index.json"),
)
_SNAPSHOTS, _MODELS = "snapshots", "models--"  # of the hub's cache: models--NAME/snapshots/REVISION


def local_checkpoint(path: Path) -> Path:
    """`path` if it is there; else the folder in the hub's cache that bears its name, fetched if
    need be.

    Offline, what the cache has is taken. Raises CheckpointError if nothing is found under the
    name, DependencyError if it could be on the hub and huggingface_hub is not installed.
    """
    found = _NAME.fullmatch(path.as_posix())
    if path.exists() or not found:
        return path
    try:
        import huggingface_hub
    except ImportError as e:
        raise DependencyError(
            f"a checkpoint at {path}, or huggingface_hub to look for it on the hub",
            found="neither",
            do="check the path, or pip install 'gptrt[hub]'",
        ) from e
    try:
        for weights in _WEIGHTS:
            folder = Path(
                huggingface_hub.snapshot_download(
                    found["repository"],
                    revision=found["revision"],
                    allow_patterns=[*_FILES, *weights],
                )
            )
            if any(any(folder.glob(pattern)) for pattern in weights):
                return folder
    except Exception as e:  # a dozen classes, from validation to the network
        raise CheckpointError(
            f"a checkpoint at {path}, in the hub's cache or on the hub",
            found=first_line(e),
            do="check the name and the network, or fetch it elsewhere and give its folder",
        ) from e
    raise CheckpointError(
        f"model.safetensors or pytorch_model.bin of {path}",
        found=f"neither in {folder}",
        do="choose a repository or a revision that has them",
    )


def name_of(folder: Path) -> str:
    """What a model is called that lies there: in the hub's cache its name and its revision."""
    name = folder.parent.parent.name
    if folder.parent.name != _SNAPSHOTS or not name.startswith(_MODELS):
        return folder.name
    return f"{name.removeprefix(_MODELS).replace('--', '/')}@{folder.name}"
