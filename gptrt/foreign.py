"""Folders that other tools exported: onnxruntime-genai, optimum and transformers.js.

What a graph takes and gives is read from the graph itself (`foreign_decoder`); of a folder's JSON
only what it cannot say: the context, the ids that end a text, where the graph lies.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptrt.architecture import MAX_COUNT
from gptrt.errors import BundleError, PromptError
from gptrt.format import (
    CONFIG_FILE,
    CONTEXT_KEYS,
    GENAI_CONFIG_FILE,
    GENERATION_CONFIG_FILE,
    GRAPH_FILE,
    MANIFEST_FILE,
    TOKENIZER_FILE,
    Bundle,
    describe_file,
)
from gptrt.schema import read_json
from gptrt.tokenizer import Tokenizer

# The first that is there is taken: whole decoders, then those for a CPU, blocks before whole rows.
GRAPHS = tuple(
    f"{folder}{name}.onnx"
    for name in (
        *("model", "decoder_model_merged", "model_q4", "decoder_model_merged_q4"),
        *("model_quantized", "decoder_model_merged_quantized", "model_int8", "model_fp16"),
    )
    for folder in ("", "onnx/")
)
_OF_WEIGHTS = {".data", ".onnx_data", ".bin"}
_GENAI_KEYS = {"head_size": "head_dim", "num_key_value_heads": "num_key_value_heads"}


@dataclass(frozen=True)
class ForeignFolder:
    """Where the parts of a decoder lie, and what its graph cannot say of it."""

    path: Path
    graph: Path
    context: int
    eos_token_ids: tuple[int, ...]
    config: Mapping[str, Any]

    def beside(self) -> list[Path]:
        """The files beside the graph that may hold its weights."""
        return [path for path in self.graph.parent.iterdir() if path.suffix in _OF_WEIGHTS]

    @property
    def weights_bytes(self) -> int:
        """Of the graph and of the files beside it that bear its name; where none does, of all."""
        own = [path for path in self.beside() if path.name.startswith(self.graph.name)]
        return sum(path.stat().st_size for path in (self.graph, *(own or self.beside())))

    def tokenizer(self) -> Tokenizer:
        """Its tokenizer, or one that refuses text where it has none."""
        path = self.path / TOKENIZER_FILE
        found = Tokenizer.read(path, self.eos_token_ids) if path.is_file() else None
        return found or _NoTokenizer(self.path, self.eos_token_ids)


def is_foreign(path: str | os.PathLike[str]) -> bool:
    """Whether there is a graph at `path` that no manifest of ours speaks for."""
    path = Path(path)
    if path.is_file():
        return path.suffix == ".onnx" and not (path.parent / MANIFEST_FILE).is_file()
    if not path.is_dir() or (path / MANIFEST_FILE).is_file():
        return False
    return (path / GENAI_CONFIG_FILE).is_file() or any((path / name).is_file() for name in GRAPHS)


def open_foreign(path: str | os.PathLike[str]) -> ForeignFolder:
    """A folder, or one graph in it. Raises BundleError for what is missing or out of bounds."""
    path = Path(path)
    folder, graph = (path, None) if path.is_dir() else (path.parent, path)
    if graph is not None and folder.name == "onnx":
        folder = folder.parent
    genai = _part(_read(folder / GENAI_CONFIG_FILE), "model")
    decoder = _part(genai, "decoder")
    known = {ours: decoder[theirs] for theirs, ours in _GENAI_KEYS.items() if theirs in decoder}
    config = known | _read(folder / CONFIG_FILE)
    generation = _read(folder / GENERATION_CONFIG_FILE)
    graph = graph or _graph(folder, decoder.get("filename"))
    context = genai.get("context_length")
    for key in CONTEXT_KEYS:
        context = config.get(key) if context is None else context
    if type(context) is not int or not 1 <= context <= MAX_COUNT:
        raise BundleError(
            f"the context of {graph}, as context_length in {GENAI_CONFIG_FILE} or as "
            f"{CONTEXT_KEYS[0]} in {CONFIG_FILE}",
            found=repr(context),
            do="write it there",
        )
    ends = (json.get("eos_token_id") for json in (genai, generation, config))
    found: Any = next((value for value in ends if value is not None), [])
    eos = found if isinstance(found, list) else [found]
    if any(type(token) is not int or token < 0 for token in eos):
        raise BundleError(f"ids as eos_token_id in {folder}", found=repr(eos), do="correct them")
    return ForeignFolder(folder, graph, context, tuple(eos), config)


def digest_of(folder: ForeignFolder) -> str:
    """One sha256 for the graph, the files beside it that may hold its weights, and the settings:
    where any of them changes, it is another model."""
    names = (CONFIG_FILE, GENERATION_CONFIG_FILE, GENAI_CONFIG_FILE, TOKENIZER_FILE)
    files = sorted({folder.graph, *folder.beside(), *(folder.path / n for n in names)})
    whole = hashlib.sha256()
    for path in filter(Path.is_file, files):
        whole.update(f"{path.name} {describe_file(path).sha256}\n".encode())
    return whole.hexdigest()


def folder_of(bundle: Bundle) -> ForeignFolder:
    """The same for a bundle, whose files are checked: its graph is another library's."""
    listed = CONFIG_FILE in bundle.manifest.files
    config = _read(bundle.file(CONFIG_FILE)) if listed else {}
    context = bundle.manifest.model.n_positions
    return ForeignFolder(bundle.path, bundle.file(GRAPH_FILE), context, (), config)


def warn_of(folder: ForeignFolder) -> None:
    """Once for each place that opens one, as warnings are."""
    warnings.warn(
        f"{folder.graph} has no manifest of gptrt beside it: whether its files are whole is not "
        "checked, and nothing is promised of what it computes",
        UserWarning,
        stacklevel=5,  # where the application makes its Generator
    )


def _read(path: Path) -> dict[str, Any]:
    json = read_json(path, error=BundleError) if path.is_file() else {}
    if not isinstance(json, dict):
        raise BundleError(f"an object in {path}", found=type(json).__name__, do="restore it")
    return json


def _part(json: dict[str, Any], key: str) -> dict[str, Any]:
    part = json.get(key, {})
    return part if isinstance(part, dict) else {}


def _graph(folder: Path, named: Any) -> Path:
    names = [named] if isinstance(named, str) else list(GRAPHS)
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise BundleError(
        f"a decoder in {folder}: {', '.join(names)}",
        found="none of them",
        do="give the path of the .onnx file itself",
    )


class _NoTokenizer(Tokenizer):
    """Ids still go in and come out."""

    def __init__(self, folder: Path, eos_token_ids: Sequence[int]) -> None:
        self._folder, self.eos_token_ids = folder, tuple(eos_token_ids)
        self.chat_template = None

    def encode(self, text: str, *, whole: bool = True) -> list[int]:
        del text, whole
        raise self._missing()

    def decode(self, ids: Sequence[int]) -> str:
        del ids
        raise self._missing()

    def stream_decoder(self) -> Any:
        raise self._missing()

    @property
    def _inner(self) -> Any:  # type: ignore[override]
        raise self._missing()

    def _missing(self) -> PromptError:
        return PromptError(
            f"{TOKENIZER_FILE} in {self._folder}, to read and write text",
            found="none",
            do="add it, or give ids and take them from Generator.tokens",
        )
